// SPDX-License-Identifier: Apache-2.0
#define SLIM_ISA avx2
#define SLIM_VECTOR_BYTES 32
#include "cpu/codebook/codebook_kernel.h"

namespace slim::codebook {
const Kernels& avx2_kernels() { return cpu::avx2::cb::kernels; }
}  // namespace slim::codebook
