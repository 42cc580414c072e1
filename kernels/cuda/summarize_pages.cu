// Summaries of the units that a step completed: a block for each token and KV head, most of which have nothing to do, a
// thread for each dim. Sixteen sums and their tree are those of the CPU kernel, so the bits are the same.
#include "fold.h"
#include "fragments.h"
#include "launch.h"

namespace sparseserve::cuda {

namespace {

// Folds map(key) over the tokens of one dim, `stride` apart.
template <class T, class Map, class Fold>
__device__ __forceinline__ float fold_tokens(const T* key, int64_t stride, int tokens, Map map, Fold fold) {
  float x[kSums];
#pragma unroll
  for (int i = 0; i < kSums; ++i) x[i] = map(Numbers<T>::widen(key[i * stride]));
  for (int begin = kSums; begin < tokens; begin += kSums)
#pragma unroll
    for (int i = 0; i < kSums; ++i) x[i] = fold(x[i], map(Numbers<T>::widen(key[(begin + i) * stride])));
  return fold_sums(x, fold);
}

template <class T>
__global__ void __launch_bounds__(256, 4) summarize_kernel(const __grid_constant__ SummarizeParams p) {
  const Written& from = p.written;
  const int tokens = static_cast<int>(from.unit_tokens), head = blockIdx.y, dim = threadIdx.x;
  if (!from.completes_unit(blockIdx.x)) return;
  const int64_t begin = from.slots[blockIdx.x] + 1 - tokens, page = begin / from.page_size;
  const int64_t column = begin - page * from.page_size, stride = from.key.token_stride;
  const T* key = static_cast<const T*>(from.key.data) + page * from.key.page_stride + head * from.key.head_stride +
                 column * stride + dim;
  T* out = static_cast<T*>(p.summary.data) + page * p.summary.page_stride + head * p.summary.head_stride +
           column / tokens * 2 * from.head_dim + dim;
  const auto itself = [](float x) { return x; };
  if (p.bound == Bound::kMinMax) {
    out[0] = Numbers<T>::round(fold_tokens(key, stride, tokens, itself, Less{}));
    out[from.head_dim] = Numbers<T>::round(fold_tokens(key, stride, tokens, itself, More{}));
  } else {
    const float count = static_cast<float>(tokens);
    const float mean = __fdiv_rn(fold_tokens(key, stride, tokens, itself, Plus{}), count);
    const auto square = [mean](float x) { return __fmul_rn(__fsub_rn(x, mean), __fsub_rn(x, mean)); };
    const float variance = __fdiv_rn(fold_tokens(key, stride, tokens, square, Plus{}), count);
    out[0] = Numbers<T>::round(mean);
    out[from.head_dim] = Numbers<T>::round(__fsqrt_rn(variance));
  }
}

}  // namespace

void summarize_pages(const SummarizeParams& params) {
  const Written& from = params.written;
  const dim3 grid(from.tokens, from.kv_heads);
  if (from.dtype == DType::kBFloat16)
    launch(summarize_kernel<__nv_bfloat16>, grid, from.head_dim, 0, params);
  else if (from.dtype == DType::kHalf)
    launch(summarize_kernel<__half>, grid, from.head_dim, 0, params);
  else
    throw std::invalid_argument("key must be bfloat16 or float16 on CUDA");
}

}  // namespace sparseserve::cuda
