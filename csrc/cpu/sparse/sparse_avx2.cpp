// SPDX-License-Identifier: Apache-2.0
#define SLIM_ISA avx2
#define SLIM_VECTOR_BYTES 32
#include "cpu/sparse/sparse_kernel.h"

namespace slim::sparse {
const Kernels& avx2_kernels() { return cpu::avx2::sp::kernels; }
}  // namespace slim::sparse
