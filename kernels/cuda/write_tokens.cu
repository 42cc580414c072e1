// New keys and values into the pages of their heads: a block for each token and KV head, 16 bytes a thread.
#include "launch.h"

namespace sparseserve::cuda {

namespace {

constexpr int kNumbers = 8;  // in 16 bytes

// D / 8 threads for the key, as many for the value.
__global__ void __launch_bounds__(64) write_kernel(const __grid_constant__ WriteParams p) {
  const int64_t token = blockIdx.x, head = blockIdx.y, slot = p.slot_of(token, head);
  if (slot < 0) return;
  const int each = static_cast<int>(p.head_dim) / kNumbers, thread = threadIdx.x;
  const bool is_key = thread < each;
  const TokenRows& from = is_key ? p.from_key : p.from_value;
  const Pool& to = is_key ? p.key : p.value;
  const int64_t page = slot / p.page_size, first = thread % each * kNumbers;
  const int64_t read = token * from.token_stride + head * from.head_stride + first;
  const int64_t write = page * to.page_stride + p.places[2 * head + 1] * to.head_stride +
                        (slot - page * p.page_size) * to.token_stride + first;
  const auto* source = static_cast<const uint16_t*>(from.data) + read;
  auto* target = static_cast<uint16_t*>(const_cast<void*>(to.data)) + write;
  *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
}

}  // namespace

void write_tokens(const WriteParams& params) {
  if (params.dtype == DType::kFloat) throw std::invalid_argument("key must be bfloat16 or float16 on CUDA");
  launch(write_kernel, dim3(params.tokens, params.heads), static_cast<int>(2 * params.head_dim / kNumbers), 0, params);
}

}  // namespace sparseserve::cuda
