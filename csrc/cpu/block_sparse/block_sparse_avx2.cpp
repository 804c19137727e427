// SPDX-License-Identifier: Apache-2.0
#define SLIM_ISA avx2
#define SLIM_VECTOR_BYTES 32
#include "cpu/block_sparse/block_sparse_kernel.h"

namespace slim::block_sparse {
const Kernels& avx2_kernels() { return cpu::avx2::bs::kernels; }
}  // namespace slim::block_sparse
