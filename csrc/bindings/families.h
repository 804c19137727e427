// SPDX-License-Identifier: Apache-2.0
// The functions behind the schemas in library.cpp, one namespace per family.
#pragma once

#include "bindings/common.h"

#define SLIM_OPT std::optional<Tensor>
#define SLIM_INTS std::vector<int64_t>

namespace slim::sparse {
Tensor plan(Tensor columns, Tensor row_offsets, int64_t width, int64_t groups, int64_t taps, bool transposed);
Tensor pack_values(Tensor values, Tensor plan);
Tensor linear(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, SLIM_OPT plan, SLIM_OPT backward_plan,
              SLIM_OPT packed_values, SLIM_OPT bias, bool relu);
Tensor linear_grad_input(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets, SLIM_OPT backward_plan,
                         int64_t width);
Tensor linear_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, SLIM_OPT plan);
Tensor conv2d(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, SLIM_OPT plan, SLIM_OPT backward_plan,
              SLIM_OPT packed_values, SLIM_OPT bias, SLIM_INTS kernel, SLIM_INTS stride, SLIM_INTS padding,
              SLIM_INTS dilation, int64_t groups, bool relu);
Tensor conv2d_grad_columns(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets, SLIM_OPT backward_plan,
                           int64_t width, int64_t groups);
Tensor conv2d_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, SLIM_OPT plan, SLIM_INTS kernel,
                          SLIM_INTS stride, SLIM_INTS padding, SLIM_INTS dilation, int64_t groups);
}  // namespace slim::sparse

namespace slim::block_sparse {
Tensor plan(Tensor columns, Tensor row_offsets, SLIM_INTS block_size, int64_t rows, int64_t width, int64_t groups,
            int64_t taps, bool transposed);
Tensor linear(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, SLIM_OPT plan, SLIM_OPT backward_plan,
              SLIM_OPT bias, int64_t rows, bool relu);
Tensor linear_grad_input(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets, SLIM_OPT backward_plan,
                         int64_t width);
Tensor linear_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, SLIM_OPT plan,
                          SLIM_INTS block_size);
Tensor conv2d(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, SLIM_OPT plan, SLIM_OPT backward_plan,
              SLIM_OPT bias, int64_t rows, SLIM_INTS kernel, SLIM_INTS stride, SLIM_INTS padding, SLIM_INTS dilation,
              int64_t groups, bool relu);
Tensor conv2d_grad_columns(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets, SLIM_OPT backward_plan,
                           int64_t width, int64_t groups);
Tensor conv2d_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, SLIM_OPT plan,
                          SLIM_INTS block_size, SLIM_INTS kernel, SLIM_INTS stride, SLIM_INTS padding,
                          SLIM_INTS dilation, int64_t groups);
#ifdef SLIM_CUDA
Tensor linear_cuda(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, SLIM_OPT plan, SLIM_OPT backward_plan,
                   SLIM_OPT bias, int64_t rows, bool relu);
#endif
}  // namespace slim::block_sparse

namespace slim::codebook {
Tensor linear(Tensor x, Tensor codebook, Tensor codes, int64_t rows, int64_t bits, int64_t group_size, bool zero,
              SLIM_OPT bias, bool relu);
Tensor conv2d(Tensor x, Tensor codebook, Tensor codes, int64_t rows, int64_t bits, int64_t group_size, bool zero,
              SLIM_OPT bias, SLIM_INTS kernel, SLIM_INTS stride, SLIM_INTS padding, SLIM_INTS dilation, int64_t groups,
              bool relu);
Tensor decode(Tensor codebook, Tensor codes, int64_t rows, int64_t width, int64_t bits, int64_t group_size);
Tensor sum_members(Tensor grad_weight, Tensor codes, int64_t bits, int64_t group_size, bool zero);
}  // namespace slim::codebook

namespace slim::kmeans {
Tensor kmeans_1d(Tensor values, Tensor centroids, SLIM_OPT importance, int64_t iterations, double tolerance);
Tensor quantiles_1d(Tensor values, SLIM_OPT importance, int64_t k);
Tensor assign_1d(Tensor values, Tensor centroids);
}  // namespace slim::kmeans

namespace slim::huffman {
Tensor huffman_lengths(Tensor histogram);
Tensor huffman_size(Tensor histogram);
Tensor huffman_encode(Tensor symbols);
Tensor huffman_decode(Tensor blob, int64_t n);
}  // namespace slim::huffman
