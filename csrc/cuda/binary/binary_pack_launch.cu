// SPDX-License-Identifier: Apache-2.0
#include "cuda/binary/binary_epilogue.cuh"
#include "cuda/binary/binary_pack_kernel.cuh"
#include "cuda/common/launch.cuh"

namespace slim::cuda::binary {

namespace {

unsigned blocks_of(int64_t threads) { return unsigned((threads + kPackThreads - 1) / kPackThreads); }

__global__ void __launch_bounds__(kPackThreads) scale_kernel(const ScaleParams p) {
  const int64_t i = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (i >= p.m * p.n) return;
  const int64_t row = i % p.n;
  const float bias = p.bias ? value_at(p.bias, p.type, row) : 0.0f;
  write(p.y, p.type, i, scaled(load_constant(p.dots + i), value_at(p.scale, p.type, row), bias, p.relu));
}

template <class T>
const char* start_rows(const PackRowsParams& p, void* stream) {
  const int64_t rows = kPackWarps / p.warps;
  const dim3 grid(unsigned((p.m + rows - 1) / rows));
  return launch(pack_rows_kernel<T>, {"binary::pack_rows", grid, dim3(kPackThreads), kPackWarps * 4, stream}, p);
}

template <class T>
const char* start_pixels(const PackPixelsParams& p, void* stream) {
  const dim3 grid(unsigned((p.images * p.plane + kWarp - 1) / kWarp));
  return launch(pack_pixels_kernel<T>, {"binary::pack_pixels", grid, dim3(kPackThreads), kPackThreads * 4, stream}, p);
}

}  // namespace

const char* make_plan(const PlanParams& p, void* stream) {
  const dim3 words(blocks_of(p.shape.rows * (p.layout.row_bytes / 8))), rows(blocks_of(p.shape.rows));
  if (const char* error = launch(plan_words_kernel, {"binary::plan_words", words, dim3(kPackThreads), 0, stream}, p))
    return error;
  return launch(plan_border_kernel, {"binary::plan_border", rows, dim3(kPackThreads), 0, stream}, p);
}

const char* make_float_plan(const FloatPlanParams& p, void* stream) {
  const dim3 grid(blocks_of(p.shape.groups * p.layout.blocks * p.layout.rows));
  return launch(float_plan_kernel, {"binary::float_plan", grid, dim3(kPackThreads), 0, stream}, p);
}

const char* pack_rows(const PackRowsParams& given, const DeviceInfo& device, void* stream) {
  PackRowsParams p = given;
  // A warp reads about 2 KB at a time; where rows alone do not fill the GPU with warps, a block shares each row.
  p.warps = p.m < int64_t(device.multiprocessors) * 16 && p.k > 512 ? kPackWarps : 1;
  const bool vectors = p.k * size_of(p.type) % 16 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  p.vectors = vectors;
  switch (p.type) {
    case DType::f32:
      return start_rows<float>(p, stream);
    case DType::f16:
      return start_rows<Half>(p, stream);
    default:
      return start_rows<BFloat16>(p, stream);
  }
}

const char* pack_pixels(const PackPixelsParams& p, void* stream) {
  switch (p.type) {
    case DType::f32:
      return start_pixels<float>(p, stream);
    case DType::f16:
      return start_pixels<Half>(p, stream);
    default:
      return start_pixels<BFloat16>(p, stream);
  }
}

const char* regroup(const RegroupParams& p, void* stream) {
  const dim3 grid(blocks_of(p.pixels * p.groups * p.words * 2));
  return launch(regroup_kernel, {"binary::regroup", grid, dim3(kPackThreads), 0, stream}, p);
}

const char* count(const CountParams& p, void* stream) {
  return launch(count_kernel, {"binary::count", dim3(blocks_of(p.items * 4)), dim3(kPackThreads), 0, stream}, p);
}

const char* scale_dots(const ScaleParams& p, void* stream) {
  return launch(scale_kernel, {"binary::scale", dim3(blocks_of(p.m * p.n)), dim3(kPackThreads), 0, stream}, p);
}

}  // namespace slim::cuda::binary
