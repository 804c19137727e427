// SPDX-License-Identifier: Apache-2.0
// The functions behind the schemas in library.cpp, one namespace per family.
#pragma once

#include <tuple>

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
}  // namespace slim::block_sparse

namespace slim::binary {
// kind: 0 for sign x sign, 1 for signs x float32 or bfloat16, 2 for signs x float64.
Tensor plan(Tensor signs, int64_t rows, int64_t channels, SLIM_INTS kernel, int64_t groups, int64_t kind);
Tensor linear(Tensor x, Tensor signs, Tensor scale, SLIM_OPT plan, SLIM_OPT bias, bool binarize_input, bool relu);
Tensor conv2d(Tensor x, Tensor signs, Tensor scale, SLIM_OPT plan, SLIM_OPT bias, SLIM_INTS kernel, SLIM_INTS stride,
              SLIM_INTS padding, SLIM_INTS dilation, int64_t groups, bool binarize_input, bool relu);
// Packed activations: uint8 [..., bytes] of a linear layer, [N, H, W, bytes] of a convolution; bit b & 7 of byte b >> 3
// belongs to feature or channel b, in whole 64-bit words, the rest 0.
Tensor linear_from_bits(Tensor x, int64_t width, Tensor signs, Tensor scale, SLIM_OPT plan, SLIM_OPT bias, bool relu);
Tensor conv2d_from_bits(Tensor x, int64_t channels, Tensor signs, Tensor scale, SLIM_OPT plan, SLIM_OPT bias,
                        SLIM_INTS kernel, SLIM_INTS stride, SLIM_INTS padding, SLIM_INTS dilation, int64_t groups,
                        bool relu);
Tensor linear_to_bits(Tensor x, int64_t width, Tensor signs, SLIM_OPT plan, Tensor thresholds, Tensor rising);
Tensor conv2d_to_bits(Tensor x, int64_t channels, Tensor signs, SLIM_OPT plan, Tensor thresholds, Tensor rising,
                      SLIM_INTS kernel, SLIM_INTS stride, SLIM_INTS padding, SLIM_INTS dilation, int64_t groups);
Tensor scale_dots(Tensor dots, Tensor scale, SLIM_OPT bias, bool relu);
}  // namespace slim::binary

namespace slim::codebook {
// plan: what a GPU reads in place of the codes; none on the CPU, whose kernels read the codes as they are.
Tensor linear(Tensor x, Tensor codebook, Tensor codes, SLIM_OPT plan, int64_t rows, int64_t bits, int64_t group_size,
              bool zero, SLIM_OPT bias, bool relu);
Tensor conv2d(Tensor x, Tensor codebook, Tensor codes, SLIM_OPT plan, int64_t rows, int64_t bits, int64_t group_size,
              bool zero, SLIM_OPT bias, SLIM_INTS kernel, SLIM_INTS stride, SLIM_INTS padding, SLIM_INTS dilation,
              int64_t groups, bool relu);
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

#define SLIM_STORED Tensor codebook, Tensor codes, Tensor gaps, Tensor row_offsets

namespace slim::sparse_codebook {
Tensor plan(Tensor gaps, Tensor row_offsets, int64_t width, int64_t groups, int64_t taps);
std::tuple<Tensor, Tensor> positions(Tensor gaps, Tensor row_offsets, int64_t width);
Tensor decode(SLIM_STORED, Tensor columns, int64_t width, int64_t bits, int64_t group_size);
Tensor sum_members(Tensor values, SLIM_STORED, int64_t width, int64_t bits, int64_t group_size);
Tensor linear(Tensor x, SLIM_STORED, SLIM_OPT plan, SLIM_OPT columns, SLIM_OPT offsets, SLIM_OPT forward_plan,
              SLIM_OPT backward_plan, int64_t bits, int64_t group_size, SLIM_OPT bias, bool relu);
Tensor conv2d(Tensor x, SLIM_STORED, SLIM_OPT plan, SLIM_OPT columns, SLIM_OPT offsets, SLIM_OPT forward_plan,
              SLIM_OPT backward_plan, int64_t bits, int64_t group_size, SLIM_OPT bias, SLIM_INTS kernel,
              SLIM_INTS stride, SLIM_INTS padding, SLIM_INTS dilation, int64_t groups, bool relu);
}  // namespace slim::sparse_codebook

// Plans for the kernels on CUDA tensors, made of CPU tensors.
namespace slim::cuda {
Tensor block_sparse_plan(Tensor columns, Tensor row_offsets, SLIM_INTS block_size, int64_t rows, int64_t width,
                         int64_t groups, bool transposed);
Tensor sparse_codebook_plan(Tensor codes, Tensor gaps, Tensor row_offsets, int64_t width, int64_t groups, int64_t bits);
}  // namespace slim::cuda

// On CUDA tensors, behind the same schemas.
#if defined(SLIM_CUDA) || defined(SLIM_CUDA_HOST)
namespace slim::cuda {

Tensor sparse_pack_values(Tensor values, Tensor plan);
Tensor sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, SLIM_OPT plan, SLIM_OPT backward_plan,
                     SLIM_OPT packed_values, SLIM_OPT bias, bool relu);
Tensor sparse_linear_grad_input(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets, SLIM_OPT backward_plan,
                                int64_t width);
Tensor sparse_linear_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, SLIM_OPT plan);
Tensor sparse_conv2d(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, SLIM_OPT plan, SLIM_OPT backward_plan,
                     SLIM_OPT packed_values, SLIM_OPT bias, SLIM_INTS kernel, SLIM_INTS stride, SLIM_INTS padding,
                     SLIM_INTS dilation, int64_t groups, bool relu);
Tensor sparse_conv2d_grad_columns(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets,
                                  SLIM_OPT backward_plan, int64_t width, int64_t groups);
Tensor sparse_conv2d_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, SLIM_OPT plan,
                                 SLIM_INTS kernel, SLIM_INTS stride, SLIM_INTS padding, SLIM_INTS dilation,
                                 int64_t groups);

Tensor block_sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, SLIM_OPT plan,
                           SLIM_OPT backward_plan, SLIM_OPT bias, int64_t rows, bool relu);
Tensor block_sparse_linear_grad_input(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets,
                                      SLIM_OPT backward_plan, int64_t width);
Tensor block_sparse_linear_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, SLIM_OPT plan,
                                       SLIM_INTS block_size);
Tensor block_sparse_conv2d(Tensor x, Tensor values, Tensor columns, Tensor row_offsets, SLIM_OPT plan,
                           SLIM_OPT backward_plan, SLIM_OPT bias, int64_t rows, SLIM_INTS kernel, SLIM_INTS stride,
                           SLIM_INTS padding, SLIM_INTS dilation, int64_t groups, bool relu);
Tensor block_sparse_conv2d_grad_columns(Tensor grad, Tensor values, Tensor columns, Tensor row_offsets,
                                        SLIM_OPT backward_plan, int64_t width, int64_t groups);
Tensor block_sparse_conv2d_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, SLIM_OPT plan,
                                       SLIM_INTS block_size, SLIM_INTS kernel, SLIM_INTS stride, SLIM_INTS padding,
                                       SLIM_INTS dilation, int64_t groups);

// As in slim::binary; plans are made on the device, of kind 0 or 1 (floats of any of its dtypes).
Tensor binary_plan(Tensor signs, int64_t rows, int64_t channels, SLIM_INTS kernel, int64_t groups, int64_t kind);
Tensor binary_linear(Tensor x, Tensor signs, Tensor scale, SLIM_OPT plan, SLIM_OPT bias, bool binarize_input,
                     bool relu);
Tensor binary_conv2d(Tensor x, Tensor signs, Tensor scale, SLIM_OPT plan, SLIM_OPT bias, SLIM_INTS kernel,
                     SLIM_INTS stride, SLIM_INTS padding, SLIM_INTS dilation, int64_t groups, bool binarize_input,
                     bool relu);
Tensor binary_linear_from_bits(Tensor x, int64_t width, Tensor signs, Tensor scale, SLIM_OPT plan, SLIM_OPT bias,
                               bool relu);
Tensor binary_conv2d_from_bits(Tensor x, int64_t channels, Tensor signs, Tensor scale, SLIM_OPT plan, SLIM_OPT bias,
                               SLIM_INTS kernel, SLIM_INTS stride, SLIM_INTS padding, SLIM_INTS dilation,
                               int64_t groups, bool relu);
Tensor binary_linear_to_bits(Tensor x, int64_t width, Tensor signs, SLIM_OPT plan, Tensor thresholds, Tensor rising);
Tensor binary_conv2d_to_bits(Tensor x, int64_t channels, Tensor signs, SLIM_OPT plan, Tensor thresholds, Tensor rising,
                             SLIM_INTS kernel, SLIM_INTS stride, SLIM_INTS padding, SLIM_INTS dilation, int64_t groups);
Tensor binary_scale_dots(Tensor dots, Tensor scale, SLIM_OPT bias, bool relu);

Tensor codebook_linear(Tensor x, Tensor codebook, Tensor codes, SLIM_OPT plan, int64_t rows, int64_t bits,
                       int64_t group_size, bool zero, SLIM_OPT bias, bool relu);
Tensor codebook_conv2d(Tensor x, Tensor codebook, Tensor codes, SLIM_OPT plan, int64_t rows, int64_t bits,
                       int64_t group_size, bool zero, SLIM_OPT bias, SLIM_INTS kernel, SLIM_INTS stride,
                       SLIM_INTS padding, SLIM_INTS dilation, int64_t groups, bool relu);
Tensor codebook_decode(Tensor codebook, Tensor codes, int64_t rows, int64_t width, int64_t bits, int64_t group_size);
Tensor codebook_sum_members(Tensor grad_weight, Tensor codes, int64_t bits, int64_t group_size, bool zero);

std::tuple<Tensor, Tensor> sparse_codebook_positions(Tensor gaps, Tensor row_offsets, int64_t width);
Tensor sparse_codebook_decode(SLIM_STORED, Tensor columns, int64_t width, int64_t bits, int64_t group_size);
Tensor sparse_codebook_sum_members(Tensor values, SLIM_STORED, int64_t width, int64_t bits, int64_t group_size);
Tensor sparse_codebook_linear(Tensor x, SLIM_STORED, SLIM_OPT plan, SLIM_OPT columns, SLIM_OPT offsets,
                              SLIM_OPT forward_plan, SLIM_OPT backward_plan, int64_t bits, int64_t group_size,
                              SLIM_OPT bias, bool relu);
Tensor sparse_codebook_conv2d(Tensor x, SLIM_STORED, SLIM_OPT plan, SLIM_OPT columns, SLIM_OPT offsets,
                              SLIM_OPT forward_plan, SLIM_OPT backward_plan, int64_t bits, int64_t group_size,
                              SLIM_OPT bias, SLIM_INTS kernel, SLIM_INTS stride, SLIM_INTS padding, SLIM_INTS dilation,
                              int64_t groups, bool relu);

}  // namespace slim::cuda
#endif
