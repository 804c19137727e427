// SPDX-License-Identifier: Apache-2.0
#define SLIM_ISA scalar
#define SLIM_VECTOR_BYTES 16
#include "cpu/sparse_codebook/sparse_codebook_kernel.h"

namespace slim::sparse_codebook {
const Kernels& scalar_kernels() { return cpu::scalar::sc::kernels; }
}  // namespace slim::sparse_codebook
