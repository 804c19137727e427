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

// The largest value of type T that is not nearer to b than to a <= b: the midpoint, rounded down, with the rounding error
// of the sum (Knuth's two-sum) saying on which side of a representable midpoint the true one lies.
template <class T>
T limit_between(double a, double b) {
  if (a == b) return T(a);
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
  for (int64_t i = 0; i < iterations; ++i) {
    before = cuts;
    // Computed centroids may be out of order by a rounding where values lie that close; cuts must not be.
    for (size_t j = 1; j < size_t(k); ++j)
      cuts[j] = std::max(cuts[j - 1], sorted.count_to(limit_between<T>(std::min(c[j - 1], c[j]), c[j])));
    if (i > 0 && cuts == before) break;
    double moved = 0;
    for (size_t j = 0; j < size_t(k); ++j) {
      if (i > 0 && cuts[j] == before[j] && cuts[j + 1] == before[j + 1]) continue;
      const Sum sum = sorted.range(cuts[j], cuts[j + 1]);
      if (!(sum.w > 0)) continue;
      // Rounding must not carry a mean out of its cluster: values that are all alike are their own mean.
      const double mean =
          std::min(std::max(sum.wx / sum.w, double(sorted.value(cuts[j]))), double(sorted.value(cuts[j + 1] - 1)));
      moved = std::max(moved, std::abs(mean - c[j]));
      c[j] = mean;
    }
    if (moved <= tolerance) break;
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

// Comparing with every limit is four lanes at a time and has no chain; from some number of limits on, halving is less.
constexpr int64_t kCompared = 24;

template <class T>
bool assign_few(const T* values, int64_t n, const T* limits, int64_t count, uint8_t* codes) {
  constexpr int kLanes = 16;
  using I = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  int64_t i = 0;
  I nan = 0;
  for (; i + kLanes <= n; i += kLanes) {
    I above[kLanes] = {};
    T x[kLanes];
    std::memcpy(x, values + i, sizeof x);
    for (int64_t j = 0; j < count; ++j)
      for (int l = 0; l < kLanes; ++l) above[l] += x[l] > limits[j];
    for (int l = 0; l < kLanes; ++l) nan |= x[l] != x[l];
    for (int l = 0; l < kLanes; ++l) codes[i + l] = uint8_t(above[l]);
  }
  for (; i < n; ++i) {
    int above = 0;
    for (int64_t j = 0; j < count; ++j) above += values[i] > limits[j];
    nan |= values[i] != values[i];
    codes[i] = uint8_t(above);
  }
  return !nan;
}

// limits [255], filled up with infinity.
template <class T>
bool assign_many(const T* values, int64_t n, const T* limits, uint8_t* codes) {
  bool nan = false;
  for (int64_t i = 0; i < n; ++i) {
    const T x = values[i];
    unsigned at = 0;
    for (unsigned step = 128; step; step /= 2) at += x > limits[at + step - 1] ? step : 0;
    nan |= x != x;
    codes[i] = uint8_t(at);
  }
  return !nan;
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
  if (centroids[0] != centroids[0]) return false;
  for (int64_t j = 1; j < k; ++j) {
    if (!(centroids[j - 1] <= centroids[j])) return false;
    limits[j - 1] = limit_between<T>(double(centroids[j - 1]), double(centroids[j]));
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
