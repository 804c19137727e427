// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.{kmeans,quantiles,assign}_1d: tensors in, raw pointers out.
#include "cpu/kmeans/kmeans.h"

#include "bindings/common.h"
#include "bindings/families.h"

namespace slim::kmeans {

namespace {

void check_values(const Tensor& values) {
  STD_TORCH_CHECK(values.is_cpu() && values.dim() == 1 &&
                      (values.scalar_type() == ScalarType::Float || values.scalar_type() == ScalarType::Double),
                  "values: expected a 1-D CPU tensor of float32 or float64");
}

void check_sortable(const Tensor& values) {
  STD_TORCH_CHECK(values.numel() <= kMaxValues, "values: expected fewer than 2**32");
}

Tensor checked_centroids(const Tensor& centroids, const Tensor& values) {
  check_same(centroids, values, "centroids");
  STD_TORCH_CHECK(centroids.dim() == 1 && centroids.numel() >= 1 && centroids.numel() <= kMaxCentroids,
                  "centroids: expected 1 to 256 of them");
  return as_contiguous(centroids);
}

std::optional<Tensor> checked_importance(const std::optional<Tensor>& importance, const Tensor& values) {
  if (!importance) return std::nullopt;
  check_same(*importance, values, "importance");
  STD_TORCH_CHECK(importance->dim() == 1 && importance->numel() == values.numel(),
                  "importance: expected one entry per value");
  return as_contiguous(*importance);
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

// f(T{}) with the element type of values.
template <class F>
auto by_type(const Tensor& values, const F& f) {
  return values.scalar_type() == ScalarType::Float ? f(float{}) : f(double{});
}

}  // namespace

Tensor kmeans_1d(Tensor values, Tensor centroids, std::optional<Tensor> importance, int64_t iterations,
                 double tolerance) {
  check_values(values);
  check_sortable(values);
  STD_TORCH_CHECK(iterations >= 0, "iterations: expected none below 0");
  STD_TORCH_CHECK(tolerance >= 0, "tolerance: expected none below 0");
  values = as_contiguous(values);
  centroids = checked_centroids(centroids, values);
  importance = checked_importance(importance, values);
  Tensor out = like(centroids, {centroids.numel()});
  std::memcpy(out.mutable_data_ptr(), centroids.const_data_ptr(), size_t(out.numel()) * out.element_size());
  const char* wrong = by_type(values, [&](auto zero) {
    using T = decltype(zero);
    T* c = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t i = 0; i < out.numel(); ++i)
      if (!(c[i] - c[i] == 0)) return "centroids: expected finite numbers, got NaN or infinity";
    return lloyd(data<T>(values), data<T>(importance), values.numel(), c, out.numel(), iterations, tolerance);
  });
  STD_TORCH_CHECK(!wrong, wrong);
  return out;
}

Tensor quantiles_1d(Tensor values, std::optional<Tensor> importance, int64_t k) {
  check_values(values);
  check_sortable(values);
  STD_TORCH_CHECK(values.numel() > 0, "values: expected at least one");
  STD_TORCH_CHECK(k >= 1 && k <= kMaxCentroids, "k: expected 1 to 256");
  values = as_contiguous(values);
  importance = checked_importance(importance, values);
  Tensor out = like(values, {k});
  const char* wrong = by_type(values, [&](auto zero) {
    using T = decltype(zero);
    T* c = static_cast<T*>(out.mutable_data_ptr());
    return quantiles(data<T>(values), data<T>(importance), values.numel(), c, k);
  });
  STD_TORCH_CHECK(!wrong, wrong);
  return out;
}

Tensor assign_1d(Tensor values, Tensor centroids) {
  check_values(values);
  values = as_contiguous(values);
  centroids = checked_centroids(centroids, values);
  Tensor out = torch::stable::new_empty(values, {values.numel()}, ScalarType::Byte);
  const bool sound = by_type(values, [&](auto zero) {
    using T = decltype(zero);
    return assign(data<T>(values), values.numel(), data<T>(centroids), centroids.numel(),
                  static_cast<uint8_t*>(out.mutable_data_ptr()));
  });
  STD_TORCH_CHECK(sound, "centroids: expected ascending numbers, and no value that is NaN");
  return out;
}

}  // namespace slim::kmeans
