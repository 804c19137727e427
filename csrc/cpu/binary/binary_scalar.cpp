// SPDX-License-Identifier: Apache-2.0
#define SLIM_ISA scalar
#define SLIM_VECTOR_BYTES 16
#include "cpu/binary/binary_float.h"

namespace slim::binary {
const Kernels& scalar_kernels() { return cpu::scalar::bin::kernels; }
}  // namespace slim::binary
