// SPDX-License-Identifier: Apache-2.0
#define SLIM_ISA avx2
#define SLIM_VECTOR_BYTES 32
#include "cpu/binary/binary_float.h"

namespace slim::binary {
const Kernels& avx2_kernels() { return cpu::avx2::bin::kernels; }
}  // namespace slim::binary
