// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace slim {

// Name and presence of every CPU feature that some kernel needs.
std::vector<std::pair<std::string, bool>> cpu_features();

enum class Isa { scalar, avx2, avx512, avx512_emulated };

// The instruction sets of this build, best first, with what each still lacks on this CPU ("" if nothing).
struct IsaEntry {
  Isa isa;
  const char* name;
  std::string missing;
};
std::vector<IsaEntry> isa_list();

// The instruction set in use: the best that the CPU has, or the one that SLIMTORCH_CPU names. Resolved once; throws
// std::runtime_error if SLIMTORCH_CPU names none of this build's, or one that this CPU cannot run.
Isa isa();
const char* isa_name();

}  // namespace slim
