// SPDX-License-Identifier: Apache-2.0
// What the emulator has run: tests show that nothing was left out.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>

#include "cuda_host.h"

namespace slim::cuda::host {

struct Statistics {
  int64_t launches = 0, threads = 0, warp_instructions = 0, copies = 0;
  // By mode and name: where in the module (see nm) each kernel is that has run.
  std::map<std::string, std::set<uintptr_t>> kernels[2];
};

Statistics& statistics();
Mode mode();

}  // namespace slim::cuda::host
