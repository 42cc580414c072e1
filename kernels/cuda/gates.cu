// Learned gates (SeerAttention-R, arXiv 2506.08889). Gate keys are the same bits as on the CPU: their sums have its
// order, and nothing is a fused multiply-add.
#include <algorithm>

#include "fold.h"
#include "launch.h"
#include "select.h"

namespace sparseserve::cuda {

namespace {

constexpr float kNormEpsilon = 1e-6f;
constexpr int kScoreThreads = 512, kScoreWarps = kScoreThreads / 32;

// The dim that turns together with `dim`.
__device__ __forceinline__ int partner(int dim, int dims) { return dim < dims / 2 ? dim + dims / 2 : dim - dims / 2; }

// A number and its partner's turned by `angles`, cos and sin [dims], or turned back: what becomes of the number.
__device__ __forceinline__ float turn(const float* angles, int dim, int dims, float x, float other, bool back) {
  const int half = dims / 2, pair = dim % half;
  const float sin = angles[half + pair];
  return __fadd_rn(__fmul_rn(x, angles[pair]), __fmul_rn(other, (dim >= half) == back ? -sin : sin));
}

// One number of x [inputs] @ weight [inputs, dims]; of the inputs every `step`-th from `begin`.
__device__ __forceinline__ float project(const float* x, int begin, int inputs, int step, const float* weight,
                                         int dims) {
  float sum = 0.f;
#pragma unroll 16
  for (int i = begin; i < inputs; i += step) sum = __fadd_rn(sum, __fmul_rn(x[i], weight[i * dims]));
  return sum;
}

// 1 / sqrt(mean square) of x [dims], in every thread of the block.
__device__ __forceinline__ float norm_scale(const float* x, int dims) {
  float sum = 0.f;
  for (int i = threadIdx.x % kSums; i < dims; i += kSums) sum = __fadd_rn(sum, __fmul_rn(x[i], x[i]));
#pragma unroll
  for (int step = kSums / 2; step > 0; step /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, step));
  const float mean = __fdiv_rn(sum, static_cast<float>(dims));
  return __fdiv_rn(1.f, __fsqrt_rn(__fadd_rn(mean, kNormEpsilon)));
}

// RMS norm and rotation of what a branch projected to, x [dims]: the number of this thread, 0 beyond the last.
__device__ __forceinline__ float finish(const GateBranch& gate, int64_t position, const float* x) {
  const int dims = static_cast<int>(gate.dim), dim = threadIdx.x;
  const float scale = gate.norm ? norm_scale(x, dims) : 1.f;
  if (dim >= dims) return 0.f;
  const auto normed = [&](int i) { return gate.norm ? __fmul_rn(__fmul_rn(x[i], scale), gate.norm[i]) : x[i]; };
  if (!gate.rope) return normed(dim);
  return turn(gate.rope + position * dims, dim, dims, normed(dim), normed(partner(dim, dims)), false);
}

// Maximum, minimum and mean of value(token), a `stride` apart.
template <class Value>
__device__ __forceinline__ void pool(int tokens, Value value, float* pooled, int stride) {
  float most[kSums], least[kSums], sum[kSums];
#pragma unroll
  for (int i = 0; i < kSums; ++i) most[i] = least[i] = sum[i] = value(i);
  for (int begin = kSums; begin < tokens; begin += kSums)
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const float x = value(begin + i);
      most[i] = More{}(most[i], x), least[i] = Less{}(least[i], x), sum[i] = Plus{}(sum[i], x);
    }
  pooled[0] = fold_sums(most, More{});
  pooled[stride] = fold_sums(least, Less{});
  pooled[2 * stride] = __fdiv_rn(fold_sums(sum, Plus{}), static_cast<float>(tokens));
}

// A block for each token and KV head, most of which have nothing to do; a thread for each dim.
template <class T>
__global__ void __launch_bounds__(256) summarize_gates_kernel(const __grid_constant__ SummarizeGatesParams p) {
  const Written& from = p.written;
  if (!from.completes_unit(blockIdx.x)) return;
  SPARSESERVE_DYNAMIC_SHARED(shared);
  const int tokens = static_cast<int>(from.unit_tokens), dims = static_cast<int>(from.head_dim);
  const int out_dims = static_cast<int>(p.gate.dim), head = blockIdx.y, dim = threadIdx.x;
  const int64_t begin = from.slots[blockIdx.x] + 1 - tokens, page = begin / from.page_size;
  const int64_t column = begin - page * from.page_size, stride = from.key.token_stride;
  const int64_t position = p.positions[blockIdx.x] + 1 - tokens;
  float *pooled = reinterpret_cast<float*>(shared), *projected = pooled + 3 * dims;
  if (dim < dims) {
    const T* key = static_cast<const T*>(from.key.data) + page * from.key.page_stride + head * from.key.head_stride +
                   column * stride;
    const T *own = key + dim, *other = key + partner(dim, dims);
    const float* angles = p.gate.unrope + position * dims;
    const auto plain = [&](int i) {
      const float x = Numbers<T>::widen(own[i * stride]), y = Numbers<T>::widen(other[i * stride]);
      return turn(angles + i * dims, dim, dims, x, y, true);
    };
    pool(tokens, plain, pooled + dim, dims);
  }
  __syncthreads();
  const float* weight = p.gate.weight + static_cast<int64_t>(head) * 3 * dims * out_dims + dim;
  if (dim < out_dims) projected[dim] = project(pooled, 0, 3 * dims, 1, weight, out_dims);
  __syncthreads();
  const float x = finish(p.gate, position, projected);
  float* out = static_cast<float*>(p.summary.data) + page * p.summary.page_stride + head * p.summary.head_stride +
               column / tokens * out_dims;
  if (dim < out_dims) out[dim] = x;
}

template <class Fold>
__device__ float fold_block(float x, Fold fold, float* shared) {
  static_assert(32 % kScoreWarps == 0);
  for (int step = 16; step > 0; step /= 2) x = fold(x, __shfl_xor_sync(kAllLanes, x, step));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[threadIdx.x % kScoreWarps];
  for (int step = kScoreWarps / 2; step > 0; step /= 2) x = fold(x, __shfl_xor_sync(kAllLanes, x, step));
  __syncthreads();
  return x;
}

// One row under one KV head.
template <class T>
class GateScores {
 public:
  __device__ GateScores(const ScoreGatesParams& params, unsigned char* shared)
      : p_(params),
        row_(blockIdx.y),
        head_(blockIdx.x),
        dims_(static_cast<int>(params.gate.dim)),
        length_(params.table.seq_lens[row_]),
        units_(length_ / static_cast<int>(params.unit_tokens)),
        scores_(params.scores.of(row_, head_)),
        best_(reinterpret_cast<BestShared<kScoreThreads>*>(shared)),
        partial_(reinterpret_cast<float*>(best_ + 1)),
        projected_(partial_ + kScoreThreads),
        plain_(projected_ + dims_) {}

  static int64_t shared_bytes(const ScoreGatesParams& p) {
    const int64_t numbers = kScoreThreads + p.gate.dim + p.query.heads / p.kv_heads * p.query.head_dim;
    return sizeof(BestShared<kScoreThreads>) + numbers * sizeof(float);
  }

  __device__ void run() {
    if (length_ > 0) score();
    if (!p_.wanted.any()) return;
    __syncthreads();
    select_row(p_.scores, p_.wanted, row_, head_, *best_);
  }

 private:
  __device__ void score() {
    make_query();
    const int last = (length_ - 1) / static_cast<int>(p_.unit_tokens);
    const bool zero = last == units_;  // one more logit, of an incomplete unit
    const float top = fold_block(score_units(zero ? 0.f : -INFINITY), More{}, plain_);
    float sum = 0.f;
    for (int i = threadIdx.x; i < units_; i += kScoreThreads) sum += expf(scores_[i] - top);
    const float total = fold_block(sum, Plus{}, plain_) + (zero ? expf(-top) : 0.f);
    const float lse = top + logf(total);
    for (int i = threadIdx.x; i <= last; i += kScoreThreads) scores_[i] = i == last ? INFINITY : scores_[i] - lse;
  }

  // The gate's query over sqrt(dim), into partial_.
  __device__ void make_query() {
    const int head_dim = static_cast<int>(p_.query.head_dim), group = static_cast<int>(p_.query.heads / p_.kv_heads);
    const int inputs = group * head_dim;
    const T* query =
        static_cast<const T*>(p_.query.data) + row_ * p_.query.row_stride + head_ * group * p_.query.head_stride;
    const float* angles = p_.gate.unrope + static_cast<int64_t>(length_ - 1) * head_dim;
    for (int i = threadIdx.x; i < inputs; i += kScoreThreads) {
      const int dim = i % head_dim;
      const T* x = query + i / head_dim * p_.query.head_stride;
      plain_[i] = turn(angles, dim, head_dim, Numbers<T>::widen(x[dim]),
                       Numbers<T>::widen(x[partner(dim, head_dim)]), true);
    }
    __syncthreads();
    const int thread = threadIdx.x, parts = kScoreThreads / dims_, part = thread / dims_, dim = thread % dims_;
    const float* weight = p_.gate.weight + head_ * inputs * dims_ + dim;
    if (part < parts) partial_[thread] = project(plain_, part, inputs, parts, weight, dims_);
    __syncthreads();
    if (part == 0) {
      float sum = 0.f;
      for (int i = 0; i < parts; ++i) sum += partial_[i * dims_ + dim];
      projected_[dim] = sum;
    }
    __syncthreads();
    const float x = finish(p_.gate, length_ - 1, projected_);
    if (part == 0) partial_[dim] = x * __fdiv_rn(1.f, __fsqrt_rn(static_cast<float>(dims_)));
    __syncthreads();
  }

  // Logits of the complete units, four lanes for each; returns the largest of this thread's and `top`.
  __device__ float score_units(float top) {
    const int lane = threadIdx.x % 32, units = static_cast<int>(p_.summary.units), first = lane % 4 * 4;
    const int32_t* pages = p_.table.pages + row_ * p_.table.stride;
    const float* data = static_cast<const float*>(p_.summary.data) + head_ * p_.summary.head_stride + first;
    for (int begin = threadIdx.x / 32 * 8; begin < units_; begin += kScoreThreads / 4) {
      const int unit = begin + lane / 4, at = min(unit, units_ - 1), page = at / units;
      const float* key = data + pages[page] * p_.summary.page_stride + (at - page * units) * dims_;
      float x = 0.f;
#pragma unroll 8
      for (int i = 0; i < dims_; i += 16) {
        const float4 k = *reinterpret_cast<const float4*>(key + i);
        const float4 q = *reinterpret_cast<const float4*>(partial_ + first + i);
        x += k.x * q.x + k.y * q.y + (k.z * q.z + k.w * q.w);
      }
      x = sum_of_heads(x);
      if (unit >= units_) continue;
      top = fmaxf(top, x);
      if (lane % 4 == 0) scores_[unit] = x;
    }
    return top;
  }

  const ScoreGatesParams& p_;
  const int row_, head_;
  const int dims_, length_, units_;
  float* scores_;
  BestShared<kScoreThreads>* best_;
  float *partial_, *projected_, *plain_;
};

template <class T>
__global__ void __launch_bounds__(kScoreThreads, 1)
    score_gates_kernel(const __grid_constant__ ScoreGatesParams params) {
  SPARSESERVE_DYNAMIC_SHARED(shared);
  GateScores<T>(params, shared).run();
}

// Calls f.template operator()<T>().
template <class F>
void for_dtype(DType dtype, const char* name, F f) {
  if (dtype == DType::kBFloat16)
    f.template operator()<__nv_bfloat16>();
  else if (dtype == DType::kHalf)
    f.template operator()<__half>();
  else
    throw std::invalid_argument(std::string(name) + " must be bfloat16 or float16 on CUDA");
}

}  // namespace

void summarize_gates(const SummarizeGatesParams& params) {
  const Written& from = params.written;
  const int64_t threads = (std::max(from.head_dim, params.gate.dim) + 31) / 32 * 32;
  const int64_t shared = (3 * from.head_dim + params.gate.dim) * sizeof(float);
  for_dtype(from.dtype, "key", [&]<class T>() {
    launch(summarize_gates_kernel<T>, dim3(from.tokens, from.kv_heads), threads, shared, params);
  });
}

void score_gates(const ScoreGatesParams& params) {
  for_dtype(params.query.dtype, "query", [&]<class T>() {
    launch(score_gates_kernel<T>, dim3(params.kv_heads, params.query.rows), kScoreThreads,
           GateScores<T>::shared_bytes(params), params);
  });
}

}  // namespace sparseserve::cuda
