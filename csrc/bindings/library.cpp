// SPDX-License-Identifier: Apache-2.0
// Every operator of the library on one screen. Fake kernels and autograd stand in python/slimtorch/ops.
#include "bindings/codebook_plan.h"
#include "bindings/cuda_sparse_plan.h"
#include "bindings/families.h"

#define WEIGHT "Tensor values, Tensor columns, Tensor row_offsets"
#define PLANS "Tensor? plan, Tensor? backward_plan"
#define SIGNS "Tensor signs, Tensor scale, Tensor? plan"
#define TABLES "int bits, int group_size, bool zero"
#define STORED "Tensor codebook, Tensor codes, Tensor gaps, Tensor row_offsets"
#define CSR "Tensor? columns, Tensor? offsets, Tensor? forward_plan, Tensor? backward_plan"
#define GEOMETRY "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups"

// A forward operator and the same without a derivative, named _inference: autograd's wrapper costs as much as a small layer.
#define SLIM_DEF(name, arguments) (m.def(name arguments), m.def(name "_inference" arguments))
#define SLIM_IMPL(name, function) (m.impl(name, TORCH_BOX(&function)), m.impl(name "_inference", TORCH_BOX(&function)))

// tests/cuda_host builds this file a second time: there the CUDA functions run in the emulator, on the CPU's tensors.
#ifdef SLIM_CUDA_HOST
#define SLIM_LIBRARY slimtorch_cuda_host
#define SLIM_CUDA_KEY CPU
#else
#define SLIM_LIBRARY slimtorch
#define SLIM_CUDA_KEY CUDA
#endif

STABLE_TORCH_LIBRARY(SLIM_LIBRARY, m) {
  m.def("sparse_plan(Tensor columns, Tensor row_offsets, int width, int groups, int taps, bool transposed) -> Tensor");
  m.def("sparse_cuda_plan(Tensor columns, Tensor row_offsets, int width, int groups, bool transposed) -> Tensor");
  m.def("sparse_pack_values(Tensor values, Tensor plan) -> Tensor");
  SLIM_DEF("sparse_linear",
           "(Tensor x, " WEIGHT ", " PLANS ", Tensor? packed_values, Tensor? bias, bool relu) -> Tensor");
  m.def("sparse_linear_grad_input(Tensor grad, " WEIGHT ", Tensor? backward_plan, int width) -> Tensor");
  m.def("sparse_linear_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, Tensor? plan) -> Tensor");
  SLIM_DEF("sparse_conv2d",
           "(Tensor x, " WEIGHT ", " PLANS ", Tensor? packed_values, Tensor? bias, " GEOMETRY ", bool relu) -> Tensor");
  m.def("sparse_conv2d_grad_columns(Tensor grad, " WEIGHT ", Tensor? backward_plan, int width, int groups) -> Tensor");
  m.def("sparse_conv2d_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, Tensor? plan, " GEOMETRY
        ") -> Tensor");

  m.def("block_sparse_plan(Tensor columns, Tensor row_offsets, int[] block_size, int rows, int width, int groups, "
        "int taps, bool transposed) -> Tensor");
  SLIM_DEF("block_sparse_linear", "(Tensor x, " WEIGHT ", " PLANS ", Tensor? bias, int rows, bool relu) -> Tensor");
  m.def("block_sparse_linear_grad_input(Tensor grad, " WEIGHT ", Tensor? backward_plan, int width) -> Tensor");
  m.def("block_sparse_linear_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, Tensor? plan, "
        "int[] block_size) -> Tensor");
  SLIM_DEF("block_sparse_conv2d",
           "(Tensor x, " WEIGHT ", " PLANS ", Tensor? bias, int rows, " GEOMETRY ", bool relu) -> Tensor");
  m.def("block_sparse_conv2d_grad_columns(Tensor grad, " WEIGHT ", Tensor? backward_plan, int width, int groups) "
        "-> Tensor");
  m.def("block_sparse_conv2d_grad_values(Tensor grad, Tensor x, Tensor columns, Tensor row_offsets, Tensor? plan, "
        "int[] block_size, " GEOMETRY ") -> Tensor");

  m.def("block_sparse_cuda_plan(Tensor columns, Tensor row_offsets, int[] block_size, int rows, int width, int groups, "
        "bool transposed) -> Tensor");

  m.def("binary_plan(Tensor signs, int rows, int channels, int[] kernel, int groups, int kind) -> Tensor");
  SLIM_DEF("binary_linear", "(Tensor x, " SIGNS ", Tensor? bias, bool binarize_input, bool relu) -> Tensor");
  SLIM_DEF("binary_conv2d",
           "(Tensor x, " SIGNS ", Tensor? bias, " GEOMETRY ", bool binarize_input, bool relu) -> Tensor");
  m.def("binary_linear_from_bits(Tensor x, int width, " SIGNS ", Tensor? bias, bool relu) -> Tensor");
  m.def("binary_conv2d_from_bits(Tensor x, int channels, " SIGNS ", Tensor? bias, " GEOMETRY ", bool relu) -> Tensor");
  m.def("binary_linear_to_bits(Tensor x, int width, Tensor signs, Tensor? plan, Tensor thresholds, Tensor rising) "
        "-> Tensor");
  m.def("binary_conv2d_to_bits(Tensor x, int channels, Tensor signs, Tensor? plan, Tensor thresholds, Tensor "
        "rising, " GEOMETRY ") -> Tensor");
  m.def("binary_scale_dots(Tensor dots, Tensor scale, Tensor? bias, bool relu) -> Tensor");

  m.def("codebook_cuda_plan(Tensor codes, int rows, int width, int bits, int groups) -> Tensor");
  SLIM_DEF("codebook_linear", "(Tensor x, Tensor codebook, Tensor codes, Tensor? plan, int rows, " TABLES
                              ", Tensor? bias, bool relu) -> Tensor");
  SLIM_DEF("codebook_conv2d", "(Tensor x, Tensor codebook, Tensor codes, Tensor? plan, int rows, " TABLES
                              ", Tensor? bias, " GEOMETRY ", bool relu) -> Tensor");
  m.def("codebook_decode(Tensor codebook, Tensor codes, int rows, int width, int bits, int group_size) -> Tensor");
  m.def("codebook_sum_members(Tensor grad_weight, Tensor codes, " TABLES ") -> Tensor");

  m.def("kmeans_1d(Tensor values, Tensor centroids, Tensor? importance, int iterations, float tolerance) -> Tensor");
  m.def("quantiles_1d(Tensor values, Tensor? importance, int k) -> Tensor");
  m.def("assign_1d(Tensor values, Tensor centroids) -> Tensor");

  m.def("huffman_lengths(Tensor histogram) -> Tensor");
  m.def("huffman_size(Tensor histogram) -> Tensor");
  m.def("huffman_encode(Tensor symbols) -> Tensor");
  m.def("huffman_decode(Tensor blob, int n) -> Tensor");

  m.def("sparse_codebook_plan(Tensor gaps, Tensor row_offsets, int width, int groups, int taps) -> Tensor");
  m.def("sparse_codebook_cuda_plan(Tensor codes, Tensor gaps, Tensor row_offsets, int width, int groups, int bits) "
        "-> Tensor");
  m.def("sparse_codebook_positions(Tensor gaps, Tensor row_offsets, int width) -> (Tensor, Tensor)");
  m.def("sparse_codebook_decode(" STORED ", Tensor columns, int width, int bits, int group_size) -> Tensor");
  m.def("sparse_codebook_sum_members(Tensor values, " STORED ", int width, int bits, int group_size) -> Tensor");
  SLIM_DEF("sparse_codebook_linear", "(Tensor x, " STORED ", Tensor? plan, " CSR ", int bits, int group_size, "
                                     "Tensor? bias, bool relu) -> Tensor");
  SLIM_DEF("sparse_codebook_conv2d", "(Tensor x, " STORED ", Tensor? plan, " CSR ", int bits, int group_size, "
                                     "Tensor? bias, " GEOMETRY ", bool relu) -> Tensor");
}

#ifndef SLIM_CUDA_HOST
STABLE_TORCH_LIBRARY_IMPL(slimtorch, CPU, m) {
  m.impl("sparse_plan", TORCH_BOX(&slim::sparse::plan));
  m.impl("sparse_pack_values", TORCH_BOX(&slim::sparse::pack_values));
  SLIM_IMPL("sparse_linear", slim::sparse::linear);
  m.impl("sparse_linear_grad_input", TORCH_BOX(&slim::sparse::linear_grad_input));
  m.impl("sparse_linear_grad_values", TORCH_BOX(&slim::sparse::linear_grad_values));
  SLIM_IMPL("sparse_conv2d", slim::sparse::conv2d);
  m.impl("sparse_conv2d_grad_columns", TORCH_BOX(&slim::sparse::conv2d_grad_columns));
  m.impl("sparse_conv2d_grad_values", TORCH_BOX(&slim::sparse::conv2d_grad_values));

  m.impl("block_sparse_plan", TORCH_BOX(&slim::block_sparse::plan));
  SLIM_IMPL("block_sparse_linear", slim::block_sparse::linear);
  m.impl("block_sparse_linear_grad_input", TORCH_BOX(&slim::block_sparse::linear_grad_input));
  m.impl("block_sparse_linear_grad_values", TORCH_BOX(&slim::block_sparse::linear_grad_values));
  SLIM_IMPL("block_sparse_conv2d", slim::block_sparse::conv2d);
  m.impl("block_sparse_conv2d_grad_columns", TORCH_BOX(&slim::block_sparse::conv2d_grad_columns));
  m.impl("block_sparse_conv2d_grad_values", TORCH_BOX(&slim::block_sparse::conv2d_grad_values));

  m.impl("binary_plan", TORCH_BOX(&slim::binary::plan));
  SLIM_IMPL("binary_linear", slim::binary::linear);
  SLIM_IMPL("binary_conv2d", slim::binary::conv2d);
  m.impl("binary_linear_from_bits", TORCH_BOX(&slim::binary::linear_from_bits));
  m.impl("binary_conv2d_from_bits", TORCH_BOX(&slim::binary::conv2d_from_bits));
  m.impl("binary_linear_to_bits", TORCH_BOX(&slim::binary::linear_to_bits));
  m.impl("binary_conv2d_to_bits", TORCH_BOX(&slim::binary::conv2d_to_bits));
  m.impl("binary_scale_dots", TORCH_BOX(&slim::binary::scale_dots));

  SLIM_IMPL("codebook_linear", slim::codebook::linear);
  SLIM_IMPL("codebook_conv2d", slim::codebook::conv2d);
  m.impl("codebook_decode", TORCH_BOX(&slim::codebook::decode));
  m.impl("codebook_sum_members", TORCH_BOX(&slim::codebook::sum_members));

  m.impl("kmeans_1d", TORCH_BOX(&slim::kmeans::kmeans_1d));
  m.impl("quantiles_1d", TORCH_BOX(&slim::kmeans::quantiles_1d));
  m.impl("assign_1d", TORCH_BOX(&slim::kmeans::assign_1d));

  m.impl("huffman_lengths", TORCH_BOX(&slim::huffman::huffman_lengths));
  m.impl("huffman_size", TORCH_BOX(&slim::huffman::huffman_size));
  m.impl("huffman_encode", TORCH_BOX(&slim::huffman::huffman_encode));
  m.impl("huffman_decode", TORCH_BOX(&slim::huffman::huffman_decode));

  m.impl("sparse_codebook_plan", TORCH_BOX(&slim::sparse_codebook::plan));
  m.impl("sparse_codebook_positions", TORCH_BOX(&slim::sparse_codebook::positions));
  m.impl("sparse_codebook_decode", TORCH_BOX(&slim::sparse_codebook::decode));
  m.impl("sparse_codebook_sum_members", TORCH_BOX(&slim::sparse_codebook::sum_members));
  SLIM_IMPL("sparse_codebook_linear", slim::sparse_codebook::linear);
  SLIM_IMPL("sparse_codebook_conv2d", slim::sparse_codebook::conv2d);
}
#endif

#if defined(SLIM_CUDA) || defined(SLIM_CUDA_HOST)
STABLE_TORCH_LIBRARY_IMPL(SLIM_LIBRARY, SLIM_CUDA_KEY, m) {
  m.impl("sparse_pack_values", TORCH_BOX(&slim::cuda::sparse_pack_values));
  SLIM_IMPL("sparse_linear", slim::cuda::sparse_linear);
  m.impl("sparse_linear_grad_input", TORCH_BOX(&slim::cuda::sparse_linear_grad_input));
  m.impl("sparse_linear_grad_values", TORCH_BOX(&slim::cuda::sparse_linear_grad_values));
  SLIM_IMPL("sparse_conv2d", slim::cuda::sparse_conv2d);
  m.impl("sparse_conv2d_grad_columns", TORCH_BOX(&slim::cuda::sparse_conv2d_grad_columns));
  m.impl("sparse_conv2d_grad_values", TORCH_BOX(&slim::cuda::sparse_conv2d_grad_values));

  SLIM_IMPL("block_sparse_linear", slim::cuda::block_sparse_linear);
  m.impl("block_sparse_linear_grad_input", TORCH_BOX(&slim::cuda::block_sparse_linear_grad_input));
  m.impl("block_sparse_linear_grad_values", TORCH_BOX(&slim::cuda::block_sparse_linear_grad_values));
  SLIM_IMPL("block_sparse_conv2d", slim::cuda::block_sparse_conv2d);
  m.impl("block_sparse_conv2d_grad_columns", TORCH_BOX(&slim::cuda::block_sparse_conv2d_grad_columns));
  m.impl("block_sparse_conv2d_grad_values", TORCH_BOX(&slim::cuda::block_sparse_conv2d_grad_values));

  m.impl("binary_plan", TORCH_BOX(&slim::cuda::binary_plan));
  SLIM_IMPL("binary_linear", slim::cuda::binary_linear);
  SLIM_IMPL("binary_conv2d", slim::cuda::binary_conv2d);
  m.impl("binary_linear_from_bits", TORCH_BOX(&slim::cuda::binary_linear_from_bits));
  m.impl("binary_conv2d_from_bits", TORCH_BOX(&slim::cuda::binary_conv2d_from_bits));
  m.impl("binary_linear_to_bits", TORCH_BOX(&slim::cuda::binary_linear_to_bits));
  m.impl("binary_conv2d_to_bits", TORCH_BOX(&slim::cuda::binary_conv2d_to_bits));
  m.impl("binary_scale_dots", TORCH_BOX(&slim::cuda::binary_scale_dots));

  SLIM_IMPL("codebook_linear", slim::cuda::codebook_linear);
  SLIM_IMPL("codebook_conv2d", slim::cuda::codebook_conv2d);
  m.impl("codebook_decode", TORCH_BOX(&slim::cuda::codebook_decode));
  m.impl("codebook_sum_members", TORCH_BOX(&slim::cuda::codebook_sum_members));

  m.impl("sparse_codebook_positions", TORCH_BOX(&slim::cuda::sparse_codebook_positions));
  m.impl("sparse_codebook_decode", TORCH_BOX(&slim::cuda::sparse_codebook_decode));
  m.impl("sparse_codebook_sum_members", TORCH_BOX(&slim::cuda::sparse_codebook_sum_members));
  SLIM_IMPL("sparse_codebook_linear", slim::cuda::sparse_codebook_linear);
  SLIM_IMPL("sparse_codebook_conv2d", slim::cuda::sparse_codebook_conv2d);
}
#endif

// What CUDA kernels want precomputed is made on the CPU, by builds without CUDA too.
STABLE_TORCH_LIBRARY_IMPL(SLIM_LIBRARY, CPU, m) {
  m.impl("sparse_cuda_plan", TORCH_BOX(&slim::cuda::sparse_plan));
  m.impl("block_sparse_cuda_plan", TORCH_BOX(&slim::cuda::block_sparse_plan));
  m.impl("codebook_cuda_plan", TORCH_BOX(&slim::cuda::codebook::plan));
  m.impl("sparse_codebook_cuda_plan", TORCH_BOX(&slim::cuda::sparse_codebook_plan));
}
