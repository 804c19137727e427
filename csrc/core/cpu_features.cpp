// SPDX-License-Identifier: Apache-2.0
#include "core/cpu_features.h"

#include <cstdlib>
#include <stdexcept>

namespace slim {

namespace {

#ifdef SLIM_X86
// What the files of an instruction set are compiled with, feature by feature: x86-64-v4 alone does not imply the rest.
#define SLIM_AVX2_FEATURES(X) X("avx2") X("fma") X("f16c") X("bmi2")
#define SLIM_AVX512_FEATURES(X) \
  X("avx512f") \
  X("avx512bw") \
  X("avx512cd") \
  X("avx512dq") X("avx512vl") X("avx512vnni") X("avx512vbmi") X("avx512vbmi2") X("avx512vpopcntdq") X("avx512bf16")
#define SLIM_MISSING(name) \
  if (!__builtin_cpu_supports(name)) missing += missing.empty() ? name : ", " name;
#define SLIM_FEATURE(name) features.emplace_back(name, __builtin_cpu_supports(name) != 0);

std::string missing_avx2() {
  std::string missing;
  SLIM_AVX2_FEATURES(SLIM_MISSING)
  return missing;
}

std::string missing_avx512() {
  std::string missing = missing_avx2();
  SLIM_AVX512_FEATURES(SLIM_MISSING)
  return missing;
}
#endif

IsaEntry resolve() {
  const char* forced = std::getenv("SLIMTORCH_CPU");
  std::string names;
  for (IsaEntry& entry : isa_list()) {
    names += (names.empty() ? "" : ", ") + std::string(entry.name);
    // The emulated set is slower than what it emulates and exists for tests: only ever by name.
    if (!forced || !*forced) {
      if (entry.missing.empty() && entry.isa != Isa::avx512_emulated) return entry;
      continue;
    }
    if (entry.name != std::string(forced)) continue;
    if (entry.missing.empty()) return entry;
    throw std::runtime_error("SLIMTORCH_CPU=" + std::string(forced) + ": this CPU lacks " + entry.missing);
  }
  throw std::runtime_error("SLIMTORCH_CPU: expected one of " + names + ", got '" + std::string(forced) + "'");
}

const IsaEntry& chosen() {
  static const IsaEntry entry = resolve();
  return entry;
}

}  // namespace

std::vector<std::pair<std::string, bool>> cpu_features() {
  std::vector<std::pair<std::string, bool>> features;
#ifdef SLIM_X86
  SLIM_AVX2_FEATURES(SLIM_FEATURE)
  SLIM_AVX512_FEATURES(SLIM_FEATURE)
#endif
  return features;
}

std::vector<IsaEntry> isa_list() {
  std::vector<IsaEntry> list;
#ifdef SLIM_X86
  list.push_back({Isa::avx512, "avx512", missing_avx512()});
  list.push_back({Isa::avx2, "avx2", missing_avx2()});
#ifdef SLIM_EMULATED_AVX512
  list.push_back({Isa::avx512_emulated, "avx512_emulated", missing_avx2()});
#endif
#endif
  list.push_back({Isa::scalar, "scalar", ""});
  return list;
}

Isa isa() { return chosen().isa; }
const char* isa_name() { return chosen().name; }

}  // namespace slim
