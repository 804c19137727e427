// SPDX-License-Identifier: Apache-2.0
#define SLIM_ISA scalar
#define SLIM_VECTOR_BYTES 16
#include "cpu/sparse/sparse_kernel.h"

namespace slim::sparse {
const Kernels& scalar_kernels() { return cpu::scalar::sp::kernels; }
}  // namespace slim::sparse
