// SPDX-License-Identifier: Apache-2.0
// y = x w^T in bfloat16: a block of four warps has 64 rows of w and 8 rows of x, two buffers of 32 steps of depth.
#include "cuda/common/launch.cuh"
#include "planted.h"

namespace slim::cuda::planted {

namespace {

constexpr int kRows = 64, kColumns = 8, kDepth = 32, kStride = kDepth + 8;  // elements; padded against bank conflicts
constexpr int kBuffer = (kRows + kColumns) * kStride;

__global__ void planted_kernel(const Params p) {
  auto* shared = reinterpret_cast<uint16_t*>(dynamic_shared());
  const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int row0 = int(blockIdx.x) * kRows, column0 = int(blockIdx.y) * kColumns;

  const auto fetch = [&](int step) {
    uint16_t* buffer = shared + step % 2 * kBuffer;
    for (int i = thread; i < (kRows + kColumns) * (kDepth / 8); i += int(blockDim.x)) {
      const int line = i / (kDepth / 8), chunk = i % (kDepth / 8) * 8;
      const bool of_w = line < kRows;
      const int at = of_w ? row0 + line : column0 + line - kRows, end = of_w ? p.rows : p.columns;
      const bool valid = at < end || (p.bug == Bug::out_of_bounds_tail && of_w);
      const uint16_t* from = (of_w ? p.w : p.x) + (valid ? int64_t(at) * p.depth + step * kDepth + chunk : 0);
      copy_async<16>(buffer + line * kStride + chunk, from, valid ? 16 : 0);
    }
    copy_commit();
  };

  if (p.bug == Bug::misaligned && thread == 1) p.y[0] = load_constant(reinterpret_cast<const float4*>(p.w + 1)).x;
  if (p.bug == Bug::shared_overrun && thread == 0) shared[2 * kBuffer] = 1;
  if (p.bug == Bug::deadlock && warp == 3) return;

  float d[4] = {};
  const int steps = p.depth / kDepth;
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) fetch(step + 1);
    if (p.bug != Bug::missing_wait) {
      if (step + 1 < steps)
        copy_wait<1>();
      else
        copy_wait<0>();
    }
    if (p.bug == Bug::divergent_barrier && warp % 2)
      sync_threads();
    else if (p.bug != Bug::missing_barrier)
      sync_threads();
    const uint16_t* buffer = shared + step % 2 * kBuffer;
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[4], b[2];
      load_matrix(a, buffer + (warp * 16 + lane % 16) * kStride + k + lane / 16 * 8);
      load_matrix(b, buffer + (kRows + lane % 8) * kStride + k + lane / 8 % 2 * 8);
      if (p.bug == Bug::swapped_fragment) {
        const uint32_t other = a[1];
        a[1] = a[2];
        a[2] = other;
      }
      mma_m16n8k16<BFloat16>(d, a, b);
    }
    if (p.bug != Bug::missing_trailing_barrier) sync_threads();
  }
  if (p.bug == Bug::divergent_warp) {
    if (lane < 16)
      d[0] = shuffle(d[0], lane);
    else
      d[0] = shuffle(d[0], lane);
  }

  for (int i = 0; i < 4; ++i) {
    const int row = row0 + warp * 16 + lane / 4 + 8 * (i / 2), column = column0 + lane % 4 * 2 + i % 2;
    if (row < p.rows && column < p.columns) p.y[int64_t(column) * p.rows + row] = d[i];
  }
}

}  // namespace

const char* matmul(const Params& p) {
  const dim3 grid(unsigned((p.rows + kRows - 1) / kRows), unsigned((p.columns + kColumns - 1) / kColumns));
  return launch(planted_kernel, {"planted::matmul", grid, dim3(4 * kWarp), 2 * kBuffer * 2, nullptr}, p);
}

}  // namespace slim::cuda::planted
