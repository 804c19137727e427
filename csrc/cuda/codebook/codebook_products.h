// SPDX-License-Identifier: Apache-2.0
// Which file has which products: they compile side by side.
#pragma once

#include "cuda/codebook/codebook_heuristics.h"

namespace slim::cuda::codebook {

const char* linear_few(const Activations& a, const Weight& w, void* stream);
const char* linear_pair(const Activations& a, const Weight& w, const Choice& c, float* partial, void* stream);
const char* linear_single(const Activations& a, const Weight& w, const Choice& c, float* partial, void* stream);
const char* conv(const Activations& a, const Weight& w, const Choice& c, float* partial, void* stream);

// CodeParams::group_magic for fragments of `k` columns. Products of it are exact up to 2^32.
inline uint32_t group_magic(const Weight& w, int k) {
  if (w.group_size <= 0 || w.group_size % k != 0) return 0;
  const uint64_t per = uint64_t(w.group_size / k), count = uint64_t(w.width + k - 1) / k;
  if (per == 1) return 1;
  return count * per < (uint64_t(1) << 32) ? uint32_t(((uint64_t(1) << 32) + per - 1) / per) : 0;
}

}  // namespace slim::cuda::codebook
