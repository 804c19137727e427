// SPDX-License-Identifier: Apache-2.0
// Binary weights: y = scale * (sign(W) x) + bias, with x as it is or as signs, in floats or in bits.
#pragma once

#include "core/params.h"
#include "cpu/binary/binary_plan.h"

namespace slim::binary {

struct Params {
  Activations a;  // n: all rows; k: all channels times taps
  Plan plan;
  const void* scale;  // [n] of a.dtype
  int64_t ranges;     // the rows are cut into this many ranges; tasks = ranges * groups of columns

  // Sign x sign: activations as bits, 1 where x >= 0. A linear layer's row m is at m * pixel_stride; a pixel of a
  // convolution at image * image_stride + group * group_stride + pixel * pixel_stride. In bytes; whole bytes each.
  uint8_t* bits;
  int64_t image_stride, group_stride, pixel_stride;

  // Bits instead of a.y: output row n of column m is 1 where rising[n] ? dot >= thresholds[n] : dot <= thresholds[n].
  const int32_t* thresholds;  // [n], or null: a.y is written
  const uint8_t* rising;      // [n]
  uint8_t* out_bits;          // [columns, out_stride] zeroed
  int64_t out_stride;
};

// One entry per instruction set. Tasks are independent and may run on any thread, each with a workspace of its own.
struct Kernels {
  Layout signs, floats, doubles;  // of the plans for sign x sign and for signs x float32 or bfloat16, float64
  int64_t (*pack_tasks)(const Params&);
  void (*pack)(const Params&, int64_t task);  // a.x -> bits
  int64_t (*group_count)(const Params&);
  int64_t (*row_units)(const Params&);  // into how many ranges the rows can be cut
  int64_t (*workspace_bytes)(const Params&);
  void (*forward)(const Params&, int64_t task, void* workspace);
  int64_t (*float_group_count)(const Params&);
  int64_t (*float_row_units)(const Params&);
  int64_t (*float_workspace_bytes)(const Params&);
  void (*float_forward)(const Params&, int64_t task, void* workspace);
  // dots [m, n] -> y [m, n]: what forward does to a dot product, for a.m rows and a.n outputs.
  void (*scale)(const Params&, const int32_t* dots);
};

const Kernels& scalar_kernels();
#ifdef SLIM_X86
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif
#ifdef SLIM_EMULATED_AVX512
const Kernels& avx512_emulated_kernels();
#endif

}  // namespace slim::binary
