// SPDX-License-Identifier: Apache-2.0
// Values become integers of the same order, are sorted by radix, and are summed once in blocks:
//
//   sorted   x x x x x x x x … (64 values)          an iteration: k - 1 binary searches for the midpoints, and
//   level 0  [     sum     ][     sum     ] …       k range sums of at most 63 + 63 terms on each level
//   level 1  [   sum of 64 of level 0  ] …
//
// What it costs is the sort: three passes of 11 bits over float32. Range sums instead of differences of prefix sums: an
// outlier of 1e30 would else take every digit from the clusters around 0.
#include "cpu/kmeans/kmeans.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

namespace slim::kmeans {

namespace {

constexpr int64_t kFan = 64;
constexpr int kRadixBits = 11;
constexpr int kBuckets = 1 << kRadixBits;

template <class T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};

// An unsigned integer in the order of the value: negative numbers have all their bits turned, others their sign.
template <class T, class K = typename KeyOf<T>::type>
K key_of(T value) {
  K bits;
  std::memcpy(&bits, &value, sizeof bits);
  constexpr int kSign = 8 * sizeof(K) - 1;
  return bits ^ ((K(0) - (bits >> kSign)) | K(1) << kSign);
}
template <class T, class K = typename KeyOf<T>::type>
T value_of(K key) {
  constexpr int kSign = 8 * sizeof(K) - 1;
  const K bits = key ^ (((key >> kSign) - 1) | K(1) << kSign);
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
struct Plain {
  typename KeyOf<T>::type key;
  T value() const { return value_of<T>(key); }
  static constexpr double weight() { return 1; }
};
template <class T>
struct Weighted {
  typename KeyOf<T>::type key;
  T w;
  T value() const { return value_of<T>(key); }
  double weight() const { return double(w); }
};

// Without the zeroing of std::vector, which would touch every page once more.
template <class E>
struct Buffer {
  explicit Buffer(int64_t n) : data(static_cast<E*>(::operator new(size_t(std::max<int64_t>(1, n)) * sizeof(E)))) {}
  ~Buffer() { ::operator delete(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  E* data;
};

// Least significant digit first. Returns whichever of the two buffers the result is in.
template <class E>
E* radix_sort(E* from, E* to, int64_t n) {
  using K = decltype(E::key);
  constexpr int kPasses = (8 * int(sizeof(K)) + kRadixBits - 1) / kRadixBits;
  if (n < 4096) {  // the tables below would cost more
    std::sort(from, from + n, [](const E& a, const E& b) { return a.key < b.key; });
    return from;
  }
  std::vector<uint32_t> counts(size_t(kPasses) * kBuckets);
  for (int64_t i = 0; i < n; ++i) {
    const K key = from[i].key;
    for (int p = 0; p < kPasses; ++p) ++counts[size_t(p * kBuckets) + (key >> (p * kRadixBits) & (kBuckets - 1))];
  }
  for (int p = 0; p < kPasses; ++p) {
    uint32_t* places = counts.data() + p * kBuckets;
    const int shift = p * kRadixBits;
    if (places[from[0].key >> shift & (kBuckets - 1)] == uint64_t(n)) continue;  // all alike: widened bfloat16, say
    uint32_t sum = 0;
    for (int b = 0; b < kBuckets; ++b) {
      const uint32_t count = places[b];
      places[b] = sum;
      sum += count;
    }
    for (int64_t i = 0; i < n; ++i) to[places[from[i].key >> shift & (kBuckets - 1)]++] = from[i];
    std::swap(from, to);
  }
  return from;
}

struct Sum {
  double w = 0, wx = 0;
  void operator+=(const Sum& other) { w += other.w, wx += other.wx; }
};

template <class T, class E>
class Sorted {
 public:
  Sorted(const T* values, const T* weights, int64_t n) : a_(n), b_(n), n_(n) {
    bool finite = true, sound = true;
    for (int64_t i = 0; i < n; ++i) {
      finite &= std::abs(values[i]) <= std::numeric_limits<T>::max();
      a_.data[i].key = key_of<T>(values[i]);
      if constexpr (std::is_same_v<E, Weighted<T>>) {
        sound &= weights[i] >= 0 && weights[i] <= std::numeric_limits<T>::max();
        a_.data[i].w = weights[i];
      }
    }
    if (!finite) wrong_ = "values: expected finite numbers, got NaN or infinity";
    if (!sound) wrong_ = "importance: expected finite numbers that are not negative";
    if (wrong_) return;
    sorted_ = radix_sort(a_.data, b_.data, n);
    for (int64_t size = n / kFan; size > 0; size /= kFan) {
      std::vector<Sum> level(static_cast<size_t>(size));
      for (int64_t b = 0; b < size; ++b)
        for (int64_t i = b * kFan; i < (b + 1) * kFan; ++i)
          level[size_t(b)] += levels_.empty() ? leaf(i) : levels_.back()[size_t(i)];
      levels_.push_back(std::move(level));
    }
  }

  const char* wrong() const { return wrong_; }
  int64_t size() const { return n_; }
  T value(int64_t i) const { return sorted_[i].value(); }
  double weight(int64_t i) const { return sorted_[i].weight(); }

  // How many values are at most `limit`.
  int64_t count_to(T limit) const {
    const auto key = key_of<T>(limit + T(0));  // 0 for -0: they are equal, but their keys are not
    return std::upper_bound(sorted_, sorted_ + n_, key, [](auto a, const E& e) { return a < e.key; }) - sorted_;
  }

  Sum range(int64_t from, int64_t to) const {
    Sum total;
    for (size_t l = 0; from < to; ++l) {
      const bool top = l == levels_.size();
      const auto at = [&](int64_t i) { return l == 0 ? leaf(i) : levels_[l - 1][size_t(i)]; };
      if (top || to - from < 2 * kFan) {
        for (; from < to; ++from) total += at(from);
        break;
      }
      for (; from % kFan; ++from) total += at(from);
      for (; to % kFan; --to) total += at(to - 1);
      from /= kFan;
      to /= kFan;
    }
    return total;
  }

 private:
  Sum leaf(int64_t i) const {
    const double w = sorted_[i].weight();
    return {w, w * double(sorted_[i].value())};
  }

  Buffer<E> a_, b_;
  int64_t n_;
  const E* sorted_ = nullptr;
  std::vector<std::vector<Sum>> levels_;
  const char* wrong_ = nullptr;
};

// The largest value of type T that is not nearer to b than to a < b: the midpoint, rounded down, with the rounding error
// of the sum (Knuth's two-sum) saying on which side of a representable midpoint the true one lies.
template <class T>
T limit_between(double a, double b) {
  if (std::abs(a) > 1e300 || std::abs(b) > 1e300) return T(a / 2 + b / 2);  // their sum might overflow
  const double sum = a + b, part = sum - a, error = (a - (sum - part)) + (b - part), middle = sum / 2;
  T limit = T(middle);
  if (double(limit) > middle || (double(limit) == middle && error < 0))
    limit = std::nextafter(limit, -std::numeric_limits<T>::infinity());
  return limit;
}

template <class T, class E>
const char* lloyd_of(const T* values, const T* weights, int64_t n, T* centroids, int64_t k, int64_t iterations,
                     double tolerance) {
  std::sort(centroids, centroids + k);
  const Sorted<T, E> sorted(values, weights, n);
  if (sorted.wrong()) return sorted.wrong();
  if (n == 0) return nullptr;
  std::vector<double> c(centroids, centroids + k);
  std::vector<int64_t> cuts(size_t(k) + 1, 0), before;
  cuts.back() = n;
  bool first = true;  // or the centroids have changed places: cuts say nothing about the centroid of this number
  for (int64_t i = 0; i < iterations; ++i) {
    before = cuts;
    for (size_t j = size_t(k) - 1; j > 0; --j)  // of equal centroids the first gets everything
      cuts[j] =
          c[j - 1] < c[j] ? std::min(cuts[j + 1], sorted.count_to(limit_between<T>(c[j - 1], c[j]))) : cuts[j + 1];
    if (!first && cuts == before) break;
    double moved = 0;
    for (size_t j = 0; j < size_t(k); ++j) {
      if (!first && cuts[j] == before[j] && cuts[j + 1] == before[j + 1]) continue;
      const Sum sum = sorted.range(cuts[j], cuts[j + 1]);
      if (!(sum.w > 0)) continue;
      // Rounding must not carry a mean out of its cluster: values that are all alike are their own mean.
      const double mean =
          std::min(std::max(sum.wx / sum.w, double(sorted.value(cuts[j]))), double(sorted.value(cuts[j + 1] - 1)));
      moved = std::max(moved, std::abs(mean - c[j]));
      c[j] = mean;
    }
    if (moved <= tolerance) break;
    first = !std::is_sorted(c.begin(), c.end());  // one of several equal centroids has overtaken the others
    if (first) std::sort(c.begin(), c.end());
  }
  std::copy(c.begin(), c.end(), centroids);
  std::sort(centroids, centroids + k);
  return nullptr;
}

template <class T, class E>
const char* quantiles_of(const T* values, const T* weights, int64_t n, T* centroids, int64_t k) {
  const Sorted<T, E> sorted(values, weights, n);
  if (sorted.wrong()) return sorted.wrong();
  const double total = sorted.range(0, n).w;
  if (!(total > 0)) return "importance: expected a positive sum";
  double mass = 0;
  int64_t i = 0;
  for (int64_t j = 0; j < k; ++j) {
    const double goal = total * ((double(j) + 0.5) / double(k));
    for (; i + 1 < n; ++i) {
      const double w = sorted.weight(i);
      if (mass + w >= goal) break;
      mass += w;
    }
    centroids[j] = sorted.value(i);
  }
  return nullptr;
}

// Comparing with every limit needs two instructions a vector and has no chain; halving needs five a value and step.
constexpr int64_t kCompared = 24;

template <class T>
bool assign_few(const T* values, int64_t n, const T* limits, int64_t count, uint8_t* codes) {
  typedef T V __attribute__((vector_size(16)));
  typedef decltype(V{} < V{}) M;
  constexpr int kLanes = 16 / int(sizeof(T)), kVectors = 4, kStep = kLanes * kVectors;
  int64_t i = 0;
  M nan{};
  for (; i + kStep <= n; i += kStep) {
    V x[kVectors];
    M above[kVectors] = {};
    for (int v = 0; v < kVectors; ++v) {
      std::memcpy(&x[v], values + i + v * kLanes, sizeof(V));
      nan |= x[v] != x[v];
    }
    for (int64_t j = 0; j < count; ++j) {
      const V limit = V{} + limits[j];
      for (int v = 0; v < kVectors; ++v) above[v] -= x[v] > limit;  // true is -1
    }
    for (int v = 0; v < kVectors; ++v)
      for (int l = 0; l < kLanes; ++l) codes[i + v * kLanes + l] = uint8_t(above[v][l]);
  }
  bool sound = true;
  for (int l = 0; l < kLanes; ++l) sound &= nan[l] == 0;
  for (; i < n; ++i) {
    int above = 0;
    for (int64_t j = 0; j < count; ++j) above += values[i] > limits[j];
    sound &= values[i] == values[i];
    codes[i] = uint8_t(above);
  }
  return sound;
}

// limits [255], filled up with infinity.
template <class T>
bool assign_many(const T* values, int64_t n, const T* limits, uint8_t* codes) {
  bool sound = true;
  for (int64_t i = 0; i < n; ++i) {
    const T x = values[i];
    unsigned at = 0;
#pragma GCC unroll 8
    for (int bit = 7; bit >= 0; --bit) at += unsigned(x > limits[at + (1u << bit) - 1]) << bit;
    sound &= x == x;
    codes[i] = uint8_t(at);
  }
  return sound;
}

}  // namespace

template <class T>
const char* lloyd(const T* values, const T* weights, int64_t n, T* centroids, int64_t k, int64_t iterations,
                  double tolerance) {
  return weights ? lloyd_of<T, Weighted<T>>(values, weights, n, centroids, k, iterations, tolerance)
                 : lloyd_of<T, Plain<T>>(values, weights, n, centroids, k, iterations, tolerance);
}

template <class T>
const char* quantiles(const T* values, const T* weights, int64_t n, T* centroids, int64_t k) {
  return weights ? quantiles_of<T, Weighted<T>>(values, weights, n, centroids, k)
                 : quantiles_of<T, Plain<T>>(values, weights, n, centroids, k);
}

template <class T>
bool assign(const T* values, int64_t n, const T* centroids, int64_t k, uint8_t* codes) {
  T limits[kMaxCentroids - 1];
  std::fill(limits, limits + kMaxCentroids - 1, std::numeric_limits<T>::infinity());
  for (int64_t j = 0; j < k; ++j)
    if (!(centroids[std::max<int64_t>(0, j - 1)] <= centroids[j])) return false;
  for (int64_t j = k - 1; j > 0; --j) {
    const T low = centroids[j - 1], high = centroids[j];
    if (low < high)
      limits[j - 1] = limit_between<T>(double(low), double(high));
    else if (j < k - 1)
      limits[j - 1] = limits[j];  // of equal centroids the first gets everything
  }
  return k - 1 <= kCompared ? assign_few(values, n, limits, k - 1, codes) : assign_many(values, n, limits, codes);
}

#define SLIM_KMEANS(T) \
  template const char* lloyd<T>(const T*, const T*, int64_t, T*, int64_t, int64_t, double); \
  template const char* quantiles<T>(const T*, const T*, int64_t, T*, int64_t); \
  template bool assign<T>(const T*, int64_t, const T*, int64_t, uint8_t*);
SLIM_KMEANS(float)
SLIM_KMEANS(double)

}  // namespace slim::kmeans
