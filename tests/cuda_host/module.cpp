// SPDX-License-Identifier: Apache-2.0
// slimtorch._cuda_host: what tests ask of the emulator. Loading it registers torch.ops.slimtorch_cuda_host.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "planted.h"
#include "statistics.h"

namespace host = slim::cuda::host;

PYBIND11_MODULE(_cuda_host, m) {
  m.doc() = "The CUDA kernels of slimtorch, run thread by thread on the CPU";
  m.def("set_mode", [](const std::string& mode) {
    if (mode != "lazy" && mode != "eager")
      throw pybind11::value_error("mode: expected 'lazy' or 'eager', got '" + mode + "'");
    host::set_mode(mode == "lazy" ? host::Mode::lazy : host::Mode::eager);
  }, "When copies land and in which order warps run: 'lazy' or 'eager'.");
  m.def("set_checks", &host::set_checks, "Whether accesses are checked; off only to see what the modes alone find.");
  pybind11::dict bugs;
  using slim::cuda::planted::Bug;
  for (const auto& [name, bug] : {std::pair("none", Bug::none),
                                  {"missing_wait", Bug::missing_wait},
                                  {"missing_barrier", Bug::missing_barrier},
                                  {"missing_trailing_barrier", Bug::missing_trailing_barrier},
                                  {"swapped_fragment", Bug::swapped_fragment},
                                  {"out_of_bounds_tail", Bug::out_of_bounds_tail},
                                  {"misaligned", Bug::misaligned},
                                  {"divergent_barrier", Bug::divergent_barrier},
                                  {"deadlock", Bug::deadlock},
                                  {"divergent_warp", Bug::divergent_warp},
                                  {"shared_overrun", Bug::shared_overrun}})
    bugs[name] = int(bug);
  m.attr("bugs") = bugs;
  m.def("planted",
        [](int bug, uintptr_t w, uintptr_t x, uintptr_t y, int rows, int columns, int depth) {
    const slim::cuda::planted::Params p{reinterpret_cast<const uint16_t*>(w),
                                        reinterpret_cast<const uint16_t*>(x),
                                        reinterpret_cast<float*>(y),
                                        rows,
                                        columns,
                                        depth,
                                        Bug(bug)};
    host::clear_memory();
    host::add_memory(p.w, int64_t(rows) * depth * 2, false);
    host::add_memory(p.x, int64_t(columns) * depth * 2, false);
    host::add_memory(p.y, int64_t(rows) * columns * 4, true);
    const char* error = slim::cuda::planted::matmul(p);
    host::clear_memory();
    if (error) throw std::runtime_error(error);
  },
        "y = x w^T by a kernel with one of `bugs`; addresses of bfloat16 [rows, depth], [columns, depth], float32 "
        "[columns, rows].");
  m.def("statistics", [] {
    const host::Statistics& s = host::statistics();
    pybind11::dict out;
    out["launches"] = s.launches;
    out["threads"] = s.threads;
    out["warp_instructions"] = s.warp_instructions;
    out["copies"] = s.copies;
    out["kernels_lazy"] = s.kernels[int(host::Mode::lazy)];
    out["kernels_eager"] = s.kernels[int(host::Mode::eager)];
    return out;
  }, "Counts since the module was loaded, and by mode and name the offsets in the module of kernels that ran.");
}
