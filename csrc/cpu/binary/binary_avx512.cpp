// SPDX-License-Identifier: Apache-2.0
// Tests compile this file a second time, under AVX2's flags, to run its logic on machines without AVX-512.
#ifndef SLIM_ISA
#define SLIM_ISA avx512
#endif
#define SLIM_VECTOR_BYTES 64
#include "cpu/binary/binary_float.h"

namespace slim::binary {
#define SLIM_NAME2(isa) isa##_kernels
#define SLIM_NAME(isa) SLIM_NAME2(isa)
const Kernels& SLIM_NAME(SLIM_ISA)() { return cpu::SLIM_ISA::bin::kernels; }
}  // namespace slim::binary
