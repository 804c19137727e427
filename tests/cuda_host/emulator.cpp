// SPDX-License-Identifier: Apache-2.0
// Fibers, warps, barriers, shared memory with its history, and the calls that -fsanitize=thread puts before accesses.
// Blocks run one after another; one launch at a time.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "cuda/common/device.cuh"
#include "cuda/common/params.h"
#include "statistics.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace slim::cuda {

// An H100, as far as heuristics ask.
const DeviceInfo* device_info(int) {
  static const DeviceInfo info{9, 0, 132, 232448};
  return &info;
}

namespace host {

namespace {

// ---- switching between fibers ----------------------------------------------------------------------------------------

#if !defined(__x86_64__) && !defined(__aarch64__)
#error "the emulator switches fibers in assembly: add this processor's callee-saved registers"
#endif

extern "C" void slim_switch(void** save, void* load);
#ifdef __x86_64__
asm(R"(
.text
.type slim_switch, @function
slim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size slim_switch, .-slim_switch
)");
constexpr int kSavedWords = 6;  // below the return address
#else
asm(R"(
.text
.type slim_switch, %function
slim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp d8, d9, [sp, #80]
  stp d10, d11, [sp, #96]
  stp d12, d13, [sp, #112]
  stp d14, d15, [sp, #128]
  stp x29, x30, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp d8, d9, [sp, #80]
  ldp d10, d11, [sp, #96]
  ldp d12, d13, [sp, #112]
  ldp d14, d15, [sp, #128]
  ldp x29, x30, [sp, #144]
  add sp, sp, #160
  ret
.size slim_switch, .-slim_switch
)");
#endif

// ---- state -----------------------------------------------------------------------------------------------------------

constexpr size_t kStack = 64 << 10;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kMaxShared = 232448;
constexpr int kNamedBarriers = 16;

enum class Wait { none, warp, block, some, ended };

struct Copy {
  unsigned char* shared;
  const unsigned char* global;
  int bytes, valid;
  Place place;
};

struct Fiber {
  void* sp;
  Wait wait;
  Place place;
  int barrier;  // of Wait::some
  void* lane;   // arguments of Wait::warp
  void (*all)(void* const*);
  dim3 index;
  std::vector<Copy> open;                 // copies not committed yet
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  int arrived, first;        // lanes at a warp-wide instruction, and the first of them
  uint32_t epoch;            // advances where lanes of the warp are ordered among each other
  uint32_t seen[kMaxWarps];  // the last epoch of each warp that this one is ordered after
};

// What happened to two bytes of shared memory.
struct Cell {
  struct Access {
    uint32_t epoch;
    uint16_t thread;
  };
  uint32_t block;    // serial number of the block that this was written for
  uint16_t pending;  // copies on their way to here
  uint16_t readers;  // entries of `read` in use
  Access write;      // epoch 0: none
  Access read[8];
};

struct Range {
  uintptr_t begin, end;
  bool writable;
};

struct State {
  Mode mode = Mode::lazy;
  bool checks = true;
  std::vector<Range> memory;
  std::vector<Range> constants;  // of this module
  // of the launch
  const char* name = "";
  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
  Range launcher{};
  bool running = false;  // a fiber is: accesses are checked
  bool failed = false;
  std::string error;
  // of the block
  int threads = 0, warps = 0, alive = 0, at_barrier = 0, first_at_barrier = 0, current = 0;
  uint32_t block_serial = 0;
  int shared_bytes = 0;
  void* scheduler = nullptr;
  unsigned char* stacks = nullptr;
  unsigned char* shared = nullptr;
  std::vector<Fiber> fibers;
  Warp warp[kMaxWarps];
  std::vector<Cell> cells;
  Statistics statistics;
};

State g;
std::mutex one_launch;

int warp_of(int thread) { return thread / kWarp; }

// ---- errors ----------------------------------------------------------------------------------------------------------

const char* short_name(const char* file) {
  for (const char* folder : {"csrc/", "tests/"})
    if (const char* at = std::strstr(file, folder)) return at;
  return file;
}

std::string where(int thread, const Place& place) {
  char text[512];
  std::snprintf(text, sizeof text, "warp %d, lane %d, %s:%d", thread / kWarp, thread % kWarp, short_name(place.file),
                place.line);
  return text;
}

// Source line of an instruction, as addr2line knows it: only asked for once something is wrong.
Place place_of(const void* pc) {
  static char file[512];
  std::snprintf(file, sizeof file, "an unknown line");
  int line = 0;
  Dl_info info;
  if (dladdr(pc, &info) && info.dli_fname) {
    char command[1024];
    std::snprintf(command, sizeof command, "addr2line -e '%s' %p 2>/dev/null", info.dli_fname,
                  reinterpret_cast<void*>(uintptr_t(pc) - 1 - uintptr_t(info.dli_fbase)));
    if (FILE* out = popen(command, "r")) {
      char text[512];
      if (std::fgets(text, sizeof text, out)) {
        if (char* colon = std::strrchr(text, ':')) {
          *colon = 0;
          line = std::atoi(colon + 1);
          std::snprintf(file, sizeof file, "%s", text);
        }
      }
      pclose(out);
    }
  }
  return {file, line};
}

void back_to_scheduler() {
  g.running = false;
  void* ignored;
  slim_switch(&ignored, g.scheduler);
}

// Ends the launch from inside a fiber.
[[noreturn]] void fail_at(const std::string& place, const std::string& what) {
  char block[128];
  std::snprintf(block, sizeof block, ": block (%u, %u, %u), ", blockIdx.x, blockIdx.y, blockIdx.z);
  g.error = std::string(g.name) + block + place + ": " + what;
  g.failed = true;
  back_to_scheduler();
  std::abort();  // nobody resumes this fiber
}
[[noreturn]] void fail(const Place& place, const std::string& what) { fail_at(where(g.current, place), what); }

// ---- running fibers --------------------------------------------------------------------------------------------------

void enter() {
  g.body(g.context);
  Fiber& f = g.fibers[g.current];
  f.wait = Wait::ended;
  --g.alive;
  back_to_scheduler();
  std::abort();
}

void prepare(int thread) {
  Fiber& f = g.fibers[thread];
  auto* top = reinterpret_cast<void**>(g.stacks + kStack * size_t(thread + 1));
  f = Fiber{};
  f.index = dim3(unsigned(thread) % blockDim.x, unsigned(thread) / blockDim.x % blockDim.y,
                 unsigned(thread) / (blockDim.x * blockDim.y));
#ifdef __x86_64__
  *--top = nullptr;  // aligns the stack as a call would
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < kSavedWords; ++i) *--top = nullptr;
#else
  top -= 20;
  std::fill(top, top + 20, nullptr);
  top[19] = reinterpret_cast<void*>(&enter);
#endif
  f.sp = top;
}

void resume(int thread) {
  g.current = thread;
  threadIdx = g.fibers[thread].index;
  g.running = true;
  slim_switch(&g.scheduler, g.fibers[thread].sp);
  g.running = false;
}

// Until somebody makes this fiber ready again.
void wait(Wait what, const Place& place) {
  Fiber& f = g.fibers[g.current];
  f.wait = what;
  f.place = place;
  g.running = false;
  slim_switch(&f.sp, g.scheduler);
}

std::string stuck() {
  std::string text = "deadlock:";
  int listed = 0;
  for (int t = 0; t < g.threads; ++t) {
    const Fiber& f = g.fibers[t];
    const bool as_before = t % kWarp && f.wait == g.fibers[t - 1].wait &&
                           (f.wait == Wait::ended || f.place.line == g.fibers[t - 1].place.line);
    if (as_before) continue;
    if (++listed > 8) return text + " …";
    const char* what = f.wait == Wait::ended   ? " has ended"
                       : f.wait == Wait::block ? " waits at a barrier of the block"
                       : f.wait == Wait::some  ? " waits at a named barrier"
                                               : " waits at an instruction of the warp";
    text += listed > 1 ? "; " : " ";
    text += f.wait == Wait::ended ? "warp " + std::to_string(t / kWarp) + ", lane " + std::to_string(t % kWarp)
                                  : where(t, f.place);
    text += what;
  }
  return text;
}

void run_block() {
  const int last = g.warps - 1;
  while (g.alive > 0 && !g.failed) {
    bool moved = false;
    for (int i = 0; i < g.warps && !g.failed; ++i) {
      const int warp = g.mode == Mode::lazy ? i : last - i;
      bool again = true;
      while (again && !g.failed) {
        again = false;
        for (int lane = 0; lane < kWarp && !g.failed; ++lane) {
          const int t = warp * kWarp + lane;
          if (g.fibers[t].wait != Wait::none) continue;
          resume(t);
          moved = true;
          again = g.mode == Mode::eager;
        }
      }
    }
    if (!moved && !g.failed) {
      char block[128];
      std::snprintf(block, sizeof block, ": block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z);
      g.error = std::string(g.name) + block + stuck();
      g.failed = true;
    }
  }
}

// ---- order among warps -----------------------------------------------------------------------------------------------

void advance(int warp) { ++g.warp[warp].epoch; }

void order(const bool (&takes_part)[kMaxWarps]) {
  uint32_t latest[kMaxWarps] = {};
  for (int w = 0; w < g.warps; ++w) {
    if (!takes_part[w]) continue;
    g.warp[w].seen[w] = g.warp[w].epoch;
    for (int v = 0; v < g.warps; ++v) latest[v] = std::max(latest[v], g.warp[w].seen[v]);
  }
  for (int w = 0; w < g.warps; ++w) {
    if (!takes_part[w]) continue;
    std::copy_n(latest, g.warps, g.warp[w].seen);
    advance(w);
  }
}

// Whether what `before` did is ordered before what this thread does now.
bool ordered(const Cell::Access& before) {
  if (before.epoch == 0 || before.thread == g.current) return true;
  const int mine = warp_of(g.current), theirs = warp_of(before.thread);
  return mine == theirs ? before.epoch < g.warp[mine].epoch : before.epoch <= g.warp[mine].seen[theirs];
}

Cell& cell_at(size_t offset) {
  Cell& c = g.cells[offset / 2];
  if (c.block != g.block_serial) {
    c = Cell{};
    c.block = g.block_serial;
  }
  return c;
}

template <class Where>
[[noreturn]] void race(const char* what, const char* other, const Cell::Access& a, size_t offset, const Where& place) {
  char text[256];
  std::snprintf(text, sizeof text, "race: %s shared byte %zu, which warp %d, lane %d %s, with no barrier between", what,
                offset, a.thread / kWarp, a.thread % kWarp, other);
  fail(place(), text);
}

template <class Where>
void check_conflicts(size_t offset, size_t bytes, bool write, const Where& place) {
  if (!g.checks) return;
  for (size_t at = offset & ~size_t(1); at < offset + bytes; at += 2) {
    Cell& c = cell_at(at);
    if (c.pending)
      fail(place(), "access to shared byte " + std::to_string(at) + ", which a copy_async is on its way to");
    if (!ordered(c.write)) race(write ? "writes" : "reads", "wrote", c.write, at, place);
    if (write)
      for (int i = 0; i < c.readers; ++i)
        if (!ordered(c.read[i])) race("writes", "read", c.read[i], at, place);
  }
}

void note(size_t offset, size_t bytes, bool write) {
  const Cell::Access now{g.warp[warp_of(g.current)].epoch, uint16_t(g.current)};
  for (size_t at = offset & ~size_t(1); at < offset + bytes; at += 2) {
    Cell& c = cell_at(at);
    if (write) {
      c.write = now;
      c.readers = 0;
      continue;
    }
    // One entry per warp tells all that matters, unless two lanes read in one epoch: then lane and epoch of the later
    // one stand for both, which loses only a race with the earlier lane's own write.
    int i = 0;
    while (i < c.readers && warp_of(c.read[i].thread) != warp_of(now.thread)) ++i;
    if (i == c.readers) {
      if (c.readers < 8)
        ++c.readers;
      else
        i = g.current & 7;
    }
    c.read[i] = now;
  }
}

const Range* find(const std::vector<Range>& ranges, uintptr_t a, size_t bytes) {
  for (const Range& r : ranges)
    if (a >= r.begin && a + bytes <= r.end) return &r;
  return nullptr;
}

template <class Where>
void check_access(uintptr_t a, size_t bytes, bool write, bool aligned, const Where& place) {
  if (!g.checks) return;
  const uintptr_t stacks = uintptr_t(g.stacks);
  if (a - stacks < kStack * kMaxThreads) return;
  if (aligned && a % bytes)
    fail(place(), "address not a multiple of " + std::to_string(bytes) + " in an access of as many bytes");
  const uintptr_t shared = uintptr_t(g.shared);
  if (a - shared < size_t(kMaxShared) + kStack) {
    const size_t offset = a - shared;
    if (offset + bytes > size_t(g.shared_bytes))
      fail(place(), "out of bounds: shared byte " + std::to_string(offset) + " of " + std::to_string(g.shared_bytes));
    if (write && bytes < 2) fail(place(), "shared memory is written in units of two bytes or more");
    check_conflicts(offset, bytes, write, place);
    note(offset, bytes, write);
    return;
  }
  if (const Range* r = find(g.memory, a, bytes)) {
    if (write && !r->writable) fail(place(), "write to memory that the launch may only read");
    return;
  }
  if (!write && (find(g.constants, a, bytes) || (a >= g.launcher.begin && a < g.launcher.end))) return;
  std::string near;
  uintptr_t nearest = 1 << 20;
  for (const Range& r : g.memory) {
    const bool past = a + bytes > r.end && a >= r.begin;
    const uintptr_t distance = past ? a + bytes - r.end : r.begin - a;
    if (distance >= nearest) continue;
    nearest = distance;
    near = ", " + std::to_string(distance) + (past ? " bytes past the end" : " bytes before the start") +
           " of a tensor of " + std::to_string(r.end - r.begin) + " bytes";
  }
  fail(place(), std::string("out of bounds: ") + (write ? "write to" : "read of") +
                    " global memory that is not the launch's" + near);
}

void access(const void* p, size_t bytes, bool write, bool aligned, const void* pc) {
  if (!g.running) return;
  check_access(uintptr_t(p), bytes, write, aligned, [pc] {
    g.running = false;
    const Place place = place_of(pc);
    g.running = true;
    return place;
  });
}

// ---- copies ----------------------------------------------------------------------------------------------------------

void land(const Copy& c) {
  std::memcpy(c.shared, c.global, size_t(c.valid));
  std::memset(c.shared + c.valid, 0, size_t(c.bytes - c.valid));
}

void finish(const Copy& c) {
  const size_t offset = size_t(c.shared - g.shared);
  for (int i = 0; i < c.bytes; i += 2) --cell_at(offset + i).pending;
  if (g.mode == Mode::lazy) land(c);
  note(offset, size_t(c.bytes), true);
}

}  // namespace

void set_mode(Mode mode) { g.mode = mode; }
void set_checks(bool on) { g.checks = on; }
Mode mode() { return g.mode; }
Statistics& statistics() { return g.statistics; }

void clear_memory() { g.memory.clear(); }
void add_memory(const void* data, int64_t bytes, bool writable) {
  if (bytes > 0) g.memory.push_back({uintptr_t(data), uintptr_t(data) + uintptr_t(bytes), writable});
}

unsigned char* shared() { return g.shared; }

void check_read(const void* p, size_t bytes, const Place& place) {
  if (g.running) check_access(uintptr_t(p), bytes, false, true, [&place] { return place; });
}

int lane_id() { return g.current % kWarp; }

unsigned atomic_add(unsigned* p, unsigned v) {
  const uintptr_t a = uintptr_t(p), offset = a - uintptr_t(g.shared);
  if (offset < uintptr_t(kMaxShared)) {  // atomics do not race with each other
    if (offset + 4 > uintptr_t(g.shared_bytes)) fail({"atomic_add", 0}, "out of bounds in shared memory");
  } else {
    access(p, 4, true, true, __builtin_return_address(0));
  }
  const unsigned old = *p;
  *p = old + v;
  return old;
}

void warp_call(void (*all)(void* const*), void* lane, const Place& place) {
  const int me = g.current, first = me / kWarp * kWarp;
  Warp& warp = g.warp[warp_of(me)];
  if (warp.arrived == 0) warp.first = me;
  const Fiber& other = g.fibers[warp.first];
  if (warp.arrived > 0 && (other.all != all || other.place.line != place.line))
    fail(place, "divergent warp: " + where(warp.first, other.place) + " waits at another instruction");
  Fiber& f = g.fibers[me];
  f.lane = lane;
  f.all = all;
  f.place = place;
  if (++warp.arrived < kWarp) return wait(Wait::warp, place);
  warp.arrived = 0;
  void* lanes[kWarp];
  for (int i = 0; i < kWarp; ++i) lanes[i] = g.fibers[first + i].lane;
  if (all) {
    ++g.statistics.warp_instructions;
    all(lanes);
  } else {
    advance(warp_of(me));
  }
  for (int i = 0; i < kWarp; ++i) g.fibers[first + i].wait = Wait::none;
}

void warp_barrier(const Place& place) { warp_call(nullptr, nullptr, place); }

void block_barrier(const Place& place) {
  for (int t = 0; t < g.threads && g.alive < g.threads; ++t)
    if (g.fibers[t].wait == Wait::ended)
      fail(place, "barrier of the block after warp " + std::to_string(t / kWarp) + ", lane " +
                      std::to_string(t % kWarp) + " has ended");
  if (g.at_barrier == 0) g.first_at_barrier = g.current;
  const Place& first = g.fibers[g.first_at_barrier].place;
  if (g.at_barrier > 0 && first.line != place.line)
    fail(place, "divergent barrier: " + where(g.first_at_barrier, first) + " waits at another one");
  if (++g.at_barrier < g.threads) return wait(Wait::block, place);
  g.at_barrier = 0;
  bool everyone[kMaxWarps];
  std::fill_n(everyone, kMaxWarps, true);
  order(everyone);
  for (int t = 0; t < g.threads; ++t) g.fibers[t].wait = Wait::none;
}

void some_barrier(int id, int threads, const Place& place) {
  if (id < 1 || id >= kNamedBarriers || threads < kWarp || threads % kWarp || threads > g.threads)
    fail(place, "named barrier: expected an id from 1 to 15 and whole warps");
  int arrived = 1;
  for (int t = 0; t < g.threads; ++t) arrived += g.fibers[t].wait == Wait::some && g.fibers[t].barrier == id;
  g.fibers[g.current].barrier = id;
  if (arrived < threads) return wait(Wait::some, place);
  bool takes_part[kMaxWarps] = {};
  takes_part[warp_of(g.current)] = true;
  for (int t = 0; t < g.threads; ++t)
    if (g.fibers[t].wait == Wait::some && g.fibers[t].barrier == id) {
      takes_part[warp_of(t)] = true;
      g.fibers[t].wait = Wait::none;
    }
  order(takes_part);
}

void copy_async(void* to, const void* from, int bytes, int valid, const Place& place) {
  const auto here = [&place] { return place; };
  const uintptr_t shared = uintptr_t(to), offset = shared - uintptr_t(g.shared);
  if (valid < 0 || valid > bytes) fail(place, "copy_async: valid bytes out of range");
  if (offset >= uintptr_t(g.shared_bytes) || offset + uintptr_t(bytes) > uintptr_t(g.shared_bytes))
    fail(place, "copy_async: the target is out of bounds of shared memory");
  if (shared % uintptr_t(bytes) || uintptr_t(from) % uintptr_t(bytes)) fail(place, "copy_async: misaligned address");
  if (valid > 0) check_access(uintptr_t(from), size_t(valid), false, false, here);
  check_conflicts(offset, size_t(bytes), true, here);
  for (int i = 0; i < bytes; i += 2) ++cell_at(offset + i).pending;
  const Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, valid, place};
  if (g.mode == Mode::eager) land(copy);
  g.fibers[g.current].open.push_back(copy);
  ++g.statistics.copies;
}

void copy_commit() {
  Fiber& f = g.fibers[g.current];
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

void copy_wait(int pending) {
  Fiber& f = g.fibers[g.current];
  const size_t done = f.groups.size() > size_t(pending) ? f.groups.size() - size_t(pending) : 0;
  for (size_t i = 0; i < done; ++i)
    for (const Copy& c : f.groups[i]) finish(c);
  f.groups.erase(f.groups.begin(), f.groups.begin() + std::ptrdiff_t(done));
}

// ---- warp-wide instructions ------------------------------------------------------------------------------------------

void all_load_matrix(void* const* lanes) {
  const int count = static_cast<LoadMatrix*>(lanes[0])->count, me = g.current, first = me / kWarp * kWarp;
  uint16_t element[4][8][8];
  for (int i = 0; i < 8 * count; ++i) {
    const void* row = static_cast<LoadMatrix*>(lanes[i])->row;
    const Place place = g.fibers[me].place;
    g.current = first + i;  // whose read it is
    const size_t offset = size_t(uintptr_t(row) - uintptr_t(g.shared));
    if (offset >= size_t(g.shared_bytes)) fail(place, "load_matrix: a row is not in shared memory");
    check_access(uintptr_t(row), 16, false, true, [&place] { return place; });
    std::memcpy(element[i / 8][i % 8], row, 16);
  }
  g.current = me;
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* l = static_cast<LoadMatrix*>(lanes[lane]);
    const int row = lane / 4, column = lane % 4 * 2;
    for (int m = 0; m < count; ++m)
      l->out[m] = l->trans ? uint32_t(element[m][column][row]) | uint32_t(element[m][column + 1][row]) << 16
                           : uint32_t(element[m][row][column]) | uint32_t(element[m][row][column + 1]) << 16;
  }
}

namespace {

// D [16, 8] += A [16, K] B [K, 8]. Products are exact, sums of one instruction kept in double and rounded once.
template <int K, class Convert>
void mma16(void* const* lanes, const Convert& convert) {
  float a[16][K], b[K][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* m = static_cast<Mma*>(lanes[lane]);
    const int row = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r)
      for (int half = 0; half < 2; ++half)
        a[row + 8 * (r & 1)][2 * t + 8 * (r >> 1) + half] = convert(uint16_t(m->a[r] >> (16 * half)));
    for (int r = 0; r < 2; ++r)
      for (int half = 0; half < 2; ++half) b[2 * t + 8 * r + half][row] = convert(uint16_t(m->b[r] >> (16 * half)));
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* d = static_cast<float*>(static_cast<Mma*>(lanes[lane])->d);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i >> 1), column = lane % 4 * 2 + (i & 1);
      double sum = d[i];
      for (int k = 0; k < K; ++k) sum += double(a[row][k]) * double(b[k][column]);
      d[i] = float(sum);
    }
  }
}

}  // namespace

void all_mma_f16(void* const* lanes) {
  mma16<16>(lanes, [](uint16_t bits) { return to_float(Half{bits}); });
}
void all_mma_bf16(void* const* lanes) {
  mma16<16>(lanes, [](uint16_t bits) { return to_float(BFloat16{bits}); });
}

void all_mma_tf32(void* const* lanes) {
  const auto value = [](uint32_t bits) { return as_float(bits & ~0x1fffu); };  // the hardware looks at 19 bits
  float a[16][8], b[8][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* m = static_cast<Mma*>(lanes[lane]);
    const int row = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) a[row + 8 * (r & 1)][t + 4 * (r >> 1)] = value(m->a[r]);
    for (int r = 0; r < 2; ++r) b[t + 4 * r][row] = value(m->b[r]);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* d = static_cast<float*>(static_cast<Mma*>(lanes[lane])->d);
    for (int i = 0; i < 4; ++i) {
      double sum = d[i];
      for (int k = 0; k < 8; ++k) sum += double(a[lane / 4 + 8 * (i >> 1)][k]) * double(b[k][lane % 4 * 2 + (i & 1)]);
      d[i] = float(sum);
    }
  }
}

void all_mma_b1(void* const* lanes) {
  uint32_t a[16][8], b[8][8];  // [row][word], [column][word]
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* m = static_cast<Mma*>(lanes[lane]);
    const int row = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) a[row + 8 * (r & 1)][t + 4 * (r >> 1)] = m->a[r];
    for (int r = 0; r < 2; ++r) b[row][t + 4 * r] = m->b[r];
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* d = static_cast<int32_t*>(static_cast<Mma*>(lanes[lane])->d);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i >> 1), column = lane % 4 * 2 + (i & 1);
      for (int w = 0; w < 8; ++w) d[i] += __builtin_popcount(a[row][w] & b[column][w]);
    }
  }
}

void all_shuffle(void* const* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* s = static_cast<Shuffle*>(lanes[lane]);
    s->out = static_cast<Shuffle*>(lanes[s->from])->value;
  }
}

void all_ballot(void* const* lanes) {
  uint32_t mask = 0;
  for (int lane = 0; lane < kWarp; ++lane) mask |= uint32_t(static_cast<Ballot*>(lanes[lane])->value) << lane;
  for (int lane = 0; lane < kWarp; ++lane) static_cast<Ballot*>(lanes[lane])->out = mask;
}

// ---- launching -------------------------------------------------------------------------------------------------------

namespace {

void note_module() {
  dl_iterate_phdr([](dl_phdr_info* info, size_t, void*) {
    const auto me = uintptr_t(&note_module);
    std::vector<Range> ranges;
    bool mine = false;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& h = info->dlpi_phdr[i];
      if (h.p_type != PT_LOAD) continue;
      const uintptr_t begin = info->dlpi_addr + h.p_vaddr;
      ranges.push_back({begin, begin + h.p_memsz, false});
      mine = mine || (me >= begin && me < begin + h.p_memsz);
    }
    if (mine) g.constants = ranges;
    return int(mine);
  }, nullptr);
}

// Offset of a function in this module, as nm lists it: kernels are told apart by their template arguments.
uintptr_t offset_of(const void* kernel) {
  Dl_info info;
  return dladdr(kernel, &info) ? uintptr_t(kernel) - uintptr_t(info.dli_fbase) : 0;
}

}  // namespace

const char* run(const char* name, const void* kernel, dim3 grid, dim3 block, int shared_bytes, const void* stack_top,
                void (*body)(const void*), const void* context) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const int64_t threads = int64_t(block.x) * block.y * block.z;
  if (threads <= 0 || threads > kMaxThreads || threads % kWarp || grid.y > 65535 || grid.z > 65535 ||
      grid.x > 0x7fffffffu || shared_bytes < 0 || shared_bytes > kMaxShared) {
    g.error = std::string(name) + ": invalid launch: " + std::to_string(threads) +
              " threads (whole warps, at most 1024), grid (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) +
              ", " + std::to_string(grid.z) + "), " + std::to_string(shared_bytes) +
              " bytes of shared memory (at most " + std::to_string(kMaxShared) + ")";
    return g.error.c_str();
  }
  if (!g.stacks) {
    const int prot = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    g.stacks = static_cast<unsigned char*>(mmap(nullptr, kStack * kMaxThreads, prot, flags, -1, 0));
    g.shared = static_cast<unsigned char*>(mmap(nullptr, kMaxShared + kStack, prot, flags, -1, 0));
    if (g.stacks == MAP_FAILED || g.shared == MAP_FAILED) std::abort();
    g.fibers.resize(kMaxThreads);
    g.cells.resize(kMaxShared / 2);
    note_module();
  }
  g.name = name;
  g.body = body;
  g.context = context;
  g.launcher = {uintptr_t(stack_top) - 65536, uintptr_t(stack_top) + 65536, false};
  g.failed = false;
  g.threads = int(threads);
  g.warps = int(threads / kWarp);
  g.shared_bytes = shared_bytes;
  blockDim = block;
  gridDim = grid;
  ++g.statistics.launches;
  g.statistics.threads += int64_t(grid.x) * grid.y * grid.z * threads;
  g.statistics.kernels[int(g.mode)][name].insert(offset_of(kernel));
  for (unsigned z = 0; z < grid.z && !g.failed; ++z)
    for (unsigned y = 0; y < grid.y && !g.failed; ++y)
      for (unsigned x = 0; x < grid.x && !g.failed; ++x) {
        blockIdx = dim3(x, y, z);
        g.alive = g.threads;
        g.at_barrier = 0;
        ++g.block_serial;
        std::memset(g.shared, 0xff, size_t(shared_bytes));
        for (int w = 0; w < g.warps; ++w) {
          g.warp[w] = Warp{};
          g.warp[w].epoch = 1;
        }
        for (int t = 0; t < g.threads; ++t) prepare(t);
        run_block();
      }
  return g.failed ? g.error.c_str() : nullptr;
}

}  // namespace host

}  // namespace slim::cuda

// ---- what the compiler calls before accesses -------------------------------------------------------------------------

using slim::cuda::host::access;

#define SLIM_ACCESS(bytes) \
  extern "C" void __tsan_read##bytes(void* p) { access(p, bytes, false, true, __builtin_return_address(0)); } \
  extern "C" void __tsan_write##bytes(void* p) { access(p, bytes, true, true, __builtin_return_address(0)); }
#define SLIM_UNALIGNED(bytes) \
  extern "C" void __tsan_unaligned_read##bytes(void* p) { \
    access(p, bytes, false, false, __builtin_return_address(0)); \
  } \
  extern "C" void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, true, false, __builtin_return_address(0)); }
SLIM_ACCESS(1)
SLIM_ACCESS(2)
SLIM_ACCESS(4)
SLIM_ACCESS(8)
SLIM_ACCESS(16)
SLIM_UNALIGNED(2)
SLIM_UNALIGNED(4)
SLIM_UNALIGNED(8)
SLIM_UNALIGNED(16)
extern "C" void __tsan_read_range(void* p, unsigned long bytes) {
  access(p, bytes, false, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, unsigned long bytes) {
  access(p, bytes, true, false, __builtin_return_address(0));
}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
