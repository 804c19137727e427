// SPDX-License-Identifier: Apache-2.0
// torch.ops.slimtorch.huffman_*: tensors in, raw pointers out.
#include "cpu/huffman/huffman.h"

#include "bindings/common.h"
#include "bindings/families.h"

namespace slim::huffman {

namespace {

Tensor checked_bytes(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.scalar_type() == ScalarType::Byte, name,
                  ": expected a 1-D uint8 CPU tensor");
  return as_contiguous(t);
}

const uint8_t* data(const Tensor& bytes) { return static_cast<const uint8_t*>(bytes.const_data_ptr()); }

// counts [kSymbols] from a histogram [symbols].
void read_counts(const Tensor& histogram, int64_t* counts) {
  STD_TORCH_CHECK(histogram.is_cpu() && histogram.dim() == 1 && histogram.scalar_type() == ScalarType::Long &&
                      histogram.numel() <= kSymbols,
                  "histogram: expected a 1-D int64 CPU tensor of at most 256 entries");
  const Tensor contiguous = as_contiguous(histogram);
  std::fill(counts, counts + kSymbols, 0);
  if (contiguous.numel())
    std::memcpy(counts, contiguous.const_data_ptr(), size_t(contiguous.numel()) * sizeof(int64_t));
  for (int s = 0; s < kSymbols; ++s)
    STD_TORCH_CHECK(counts[s] >= 0 && counts[s] <= INT64_C(1) << 48, "histogram: expected counts from 0 to 2**48");
}

}  // namespace

Tensor huffman_lengths(Tensor histogram) {
  int64_t counts[kSymbols];
  read_counts(histogram, counts);
  Tensor out = torch::stable::new_empty(histogram, {kSymbols}, ScalarType::Byte);
  code_lengths(counts, static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor huffman_size(Tensor histogram) {
  int64_t counts[kSymbols];
  uint8_t lengths[kSymbols];
  read_counts(histogram, counts);
  code_lengths(counts, lengths);
  Tensor out = torch::stable::new_empty(histogram, {}, ScalarType::Long);
  *static_cast<int64_t*>(out.mutable_data_ptr()) = encoded_size(counts, lengths);
  return out;
}

Tensor huffman_encode(Tensor symbols) {
  symbols = checked_bytes(symbols, "symbols");
  const int64_t n = symbols.numel();
  int64_t counts[kSymbols];
  uint8_t lengths[kSymbols];
  count(data(symbols), n, counts);
  code_lengths(counts, lengths);
  const int64_t bytes = encoded_size(counts, lengths);
  Tensor out = torch::stable::new_empty(symbols, {bytes}, ScalarType::Byte);
  encode(data(symbols), n, lengths, bytes, static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor huffman_decode(Tensor blob, int64_t n) {
  blob = checked_bytes(blob, "blob");
  Header header;
  const char* wrong = read_header(data(blob), blob.numel(), n, &header);
  STD_TORCH_CHECK(!wrong, wrong);
  Tensor out = torch::stable::new_empty(blob, {n}, ScalarType::Byte);
  wrong = decode(header, static_cast<uint8_t*>(out.mutable_data_ptr()));
  STD_TORCH_CHECK(!wrong, wrong);
  return out;
}

}  // namespace slim::huffman
