// What memory allows: reads the bytes that an op reads, in the same threads, and does nothing with them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../cpu/parallel.h"

namespace {

using torch::stable::Tensor;

// Rows of bytes, `stride` apart.
struct Block {
  const char* data;
  int64_t rows, row_bytes, stride;
};

uint64_t read_block(const Block& block, const Block* next) {
  uint64_t sum[8] = {};
  for (int64_t r = 0; r < block.rows; ++r)
    for (int64_t i = 0; i < block.row_bytes; i += 64) {
      if (next) __builtin_prefetch(next->data + r * next->stride + i, 0, 2);  // into L2, as the kernels do
      const auto* line = reinterpret_cast<const uint64_t*>(block.data + r * block.stride + i);
      for (int j = 0; j < 8; ++j) sum[j] += line[j];
    }
  return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

// starts: [blocks] byte offsets into memory. prefetch: touch the next block while reading one.
void read_blocks(const Tensor& memory, const Tensor& starts, int64_t rows, int64_t row_bytes, int64_t stride,
                 bool prefetch, Tensor sums) {
  constexpr int64_t kItem = 16;
  const char* base = static_cast<const char*>(memory.const_data_ptr());
  const auto* start = static_cast<const int64_t*>(starts.const_data_ptr());
  auto* sum = static_cast<int64_t*>(sums.mutable_data_ptr());
  const int64_t count = starts.numel();
  sparseserve::cpu::for_each_item((count + kItem - 1) / kItem, count * rows * row_bytes, [&](int64_t item, int64_t) {
    const int64_t end = (item + 1) * kItem < count ? (item + 1) * kItem : count;
    for (int64_t i = item * kItem; i < end; ++i) {
      const Block block{base + start[i], rows, row_bytes, stride};
      const Block next{base + start[i + 1 < count ? i + 1 : i], rows, row_bytes, stride};
      sum[i] = static_cast<int64_t>(read_block(block, prefetch ? &next : nullptr));
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(sparseserve_bench, m) {
  m.def(
      "read(Tensor memory, Tensor starts, int rows, int row_bytes, int stride, bool prefetch, Tensor(a!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparseserve_bench, CPU, m) { m.impl("read", TORCH_BOX(&read_blocks)); }
