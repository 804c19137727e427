// SPDX-License-Identifier: Apache-2.0
#define SLIM_ISA scalar
#define SLIM_VECTOR_BYTES 16
#include "cpu/codebook/codebook_kernel.h"

namespace slim::codebook {
const Kernels& scalar_kernels() { return cpu::scalar::cb::kernels; }
}  // namespace slim::codebook
