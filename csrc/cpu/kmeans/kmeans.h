// SPDX-License-Identifier: Apache-2.0
// k-means in one dimension: clusters of sorted values are intervals, so that Lloyd's algorithm needs the values only once,
// to sort them.
#pragma once

#include <cstdint>

namespace slim::kmeans {

constexpr int64_t kMaxValues = INT64_C(0xffffffff);
constexpr int kMaxCentroids = 256;

// T is float or double. Null, or what is wrong with the arguments (a value or weight that cannot be). Memory: two copies
// of the values, with their weights if there are any.

// Lloyd's iterations from `centroids` [k], which come back ascending. values [n]; weights [n] or null. At most
// `iterations`; fewer if a fixed point is reached or no centroid moves by more than `tolerance`. A value halfway between
// two centroids belongs to the lower. A cluster without values, or without weight, keeps its centroid.
template <class T>
const char* lloyd(const T* values, const T* weights, int64_t n, T* centroids, int64_t k, int64_t iterations,
                  double tolerance);

// k values that cut the mass into equal parts: centroids[i] is the smallest value below or at which lies the fraction
// (i + 1/2) / k of the weight. n > 0.
template <class T>
const char* quantiles(const T* values, const T* weights, int64_t n, T* centroids, int64_t k);

// codes [n]: the nearest of the ascending centroids [k], the lower one of two equally near (and the first of equal ones).
// False if the centroids do not ascend or a value is NaN; codes are then arbitrary. k > 0.
template <class T>
bool assign(const T* values, int64_t n, const T* centroids, int64_t k, uint8_t* codes);

}  // namespace slim::kmeans
