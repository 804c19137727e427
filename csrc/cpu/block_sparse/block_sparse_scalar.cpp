// SPDX-License-Identifier: Apache-2.0
#define SLIM_ISA scalar
#define SLIM_VECTOR_BYTES 16
#include "cpu/block_sparse/block_sparse_kernel.h"

namespace slim::block_sparse {
const Kernels& scalar_kernels() { return cpu::scalar::bs::kernels; }
}  // namespace slim::block_sparse
