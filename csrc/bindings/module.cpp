// SPDX-License-Identifier: Apache-2.0
// slimtorch._C: what Python asks about the build and the machine. No torch header here: pybind11 and the stable ABI meet
// only in the linker. Loading the module registers the operators of library.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/cpu_features.h"

#define SLIM_STRING2(x) #x
#define SLIM_STRING(x) SLIM_STRING2(x)

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of slimtorch";
  m.attr("version") = SLIM_STRING(SLIM_VERSION);
  m.def("cpu_features", [] {
    pybind11::dict features;
    for (const auto& [name, present] : slim::cpu_features()) features[pybind11::str(name)] = present;
    return features;
  }, "CPU features that some kernel needs, and whether this CPU has them.");
  m.def("isa", [] { return std::string(slim::isa_name()); },
        "Instruction set of the CPU kernels in use; RuntimeError if SLIMTORCH_CPU names one that cannot be.");
  m.def("isas", [] {
    pybind11::dict list;
    for (const auto& entry : slim::isa_list()) list[pybind11::str(entry.name)] = entry.missing;
    return list;
  }, "Instruction sets of this build, best first, with what each lacks on this CPU.");
  m.def("cuda_archs", [] {
    pybind11::list archs;
#ifdef SLIM_CUDA
    std::string arch;
    for (char c : std::string(SLIM_CUDA_ARCHS) + ",") {
      if (c != ',') {
        arch += c;
        continue;
      }
      if (!arch.empty()) archs.append(arch);
      arch.clear();
    }
#endif
    return archs;
  }, "CUDA architectures compiled in; empty without CUDA.");
}
