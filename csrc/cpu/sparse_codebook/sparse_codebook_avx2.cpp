// SPDX-License-Identifier: Apache-2.0
#define SLIM_ISA avx2
#define SLIM_VECTOR_BYTES 32
#include "cpu/sparse_codebook/sparse_codebook_kernel.h"

namespace slim::sparse_codebook {
const Kernels& avx2_kernels() { return cpu::avx2::sc::kernels; }
}  // namespace slim::sparse_codebook
