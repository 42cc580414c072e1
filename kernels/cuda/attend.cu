// Attention over a selection. A row is cut into splits by its own length alone, so that its result does not depend on
// the batch; the block that finishes a row last merges its splits.
#include <algorithm>

#include "attended.h"
#include "blocks.h"
#include "launch.h"

namespace sparseserve::cuda {

namespace {

constexpr float kNothing = -1e30f;  // a maximum of no scores, which must survive a subtraction

// Output, maximum and sum of NT * 8 query heads; O^T = V^T P^T, dims on the 16-wide side.
template <int D, int NT>
struct Accumulator {
  static constexpr int kWords = D / 16;
  float out[NT][kWords][4] = {};
  float most[NT][2], sum[NT][2] = {};

  __device__ __forceinline__ Accumulator() {
    for (auto& pair : most) pair[0] = pair[1] = kNothing;
  }

  // Dim of out[n][word][j]; its head is 8 n + 2 t + j % 2. Lane g holds 8 dims of every 64, 4 of the last 32.
  static __device__ __forceinline__ int dim(int g, int word, int j) {
    constexpr int kFull = D / 64 * 4;
    return word < kFull ? word / 4 * 64 + 8 * g + 2 * (word % 4) + j / 2
                        : kFull * 16 + 4 * g + 2 * (word - kFull) + j / 2;
  }
};

// Dims of four values, those of tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, zeros for tokens that do not count.
template <class T, int D>
struct Values {
  static constexpr int kFull = D / 64;
  uint32_t word[4][D / 16];

  __device__ __forceinline__ void load(const T* value, int64_t offset, unsigned mask, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int token = 2 * t + r % 2 + 8 * (r / 2);
      const T* row = value + __shfl_sync(kAllLanes, offset, token);
      const bool counts = mask >> token & 1;
#pragma unroll
      for (int c = 0; c < kFull; ++c) {
        uint4 x = load_stream16(row + 64 * c + 8 * g);
        x = counts ? x : make_uint4(0, 0, 0, 0);  // 0 * NaN is not 0
        word[r][4 * c] = x.x, word[r][4 * c + 1] = x.y, word[r][4 * c + 2] = x.z, word[r][4 * c + 3] = x.w;
      }
      if constexpr (D % 64 != 0) {
        uint2 x = load_stream8(row + 64 * kFull + 4 * g);
        x = counts ? x : make_uint2(0, 0);
        word[r][4 * kFull] = x.x, word[r][4 * kFull + 1] = x.y;
      }
    }
  }
};

// Takes the scores of a tile into maximum and sum; returns in `weights` P^T as an operand of O^T = V^T P^T.
template <class T, int D, int NT>
__device__ __forceinline__ void weigh(float (&s)[NT][4], unsigned mask, float scale, int g, Accumulator<D, NT>& sums,
                                      uint32_t (&weights)[NT][2]) {
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    float p[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) s[n][j] = mask >> (g + 8 * (j / 2)) & 1 ? s[n][j] * scale : kNothing;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float most = fmaxf(sums.most[n][j], max_of_rows(fmaxf(s[n][j], s[n][2 + j])));
      const float shrink = exp2_fast(sums.most[n][j] - most);
      sums.most[n][j] = most;
      sums.sum[n][j] *= shrink;
#pragma unroll
      for (auto& out : sums.out[n]) out[j] *= shrink, out[2 + j] *= shrink;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      p[j] = mask >> (g + 8 * (j / 2)) & 1 ? exp2_fast(s[n][j] - sums.most[n][j % 2]) : 0.f;
      sums.sum[n][j % 2] += p[j];
    }
    weights[n][0] = transpose8x8(Numbers<T>::pack(p[0], p[1]));
    weights[n][1] = transpose8x8(Numbers<T>::pack(p[2], p[3]));
  }
}

// Adds V^T P^T of the dims that `values` has, whose first word is `first`.
template <class T, int Part, int D, int NT>
__device__ __forceinline__ void accumulate(const Values<T, Part>& values, const uint32_t (&weights)[NT][2], int first,
                                           Accumulator<D, NT>& sums) {
#pragma unroll
  for (int w = 0; w < Part / 16; ++w) {
    const uint32_t a = values.word[0][w], b = values.word[1][w], c = values.word[2][w], d = values.word[3][w];
    const uint32_t tile[4] = {permute_bytes(a, b, 0x5410), permute_bytes(a, b, 0x7632), permute_bytes(c, d, 0x5410),
                              permute_bytes(c, d, 0x7632)};
#pragma unroll
    for (int n = 0; n < NT; ++n) mma<T>(sums.out[n][first + w], tile, weights[n]);
  }
}

// What a block leaves of one query head: output [D], maximum (base 2), sum.
struct Partial {
  float* data;
  int dims;

  __device__ __forceinline__ float& most() const { return data[dims]; }
  __device__ __forceinline__ float& sum() const { return data[dims + 1]; }
};

template <class T>
__device__ __forceinline__ void write_head(const AttendParams& p, int row, int head, int dim, float out, float most,
                                           float sum) {
  T* to = static_cast<T*>(p.out) + row * p.out_row_stride + head * p.out_head_stride;
  to[dim] = Numbers<T>::round(sum == 0.f ? 0.f : out / sum);
  if (dim == 0) p.lse[row * p.query.heads + head] = sum == 0.f ? -INFINITY : (most + log2f(sum)) / kLog2E;
}

template <class T, int D, int NT>
class AttendBlock {
 public:
  __device__ AttendBlock(const AttendParams& params, unsigned char* shared)
      : p_(params),
        row_(blockIdx.z),
        split_(blockIdx.x),
        group_(static_cast<int>(params.query.heads) / gridDim.y),
        head_(blockIdx.y * group_),
        shared_(reinterpret_cast<float*>(shared)) {}

  __device__ void run() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool shares = p_.selection.heads == 1;  // all KV heads have one selection
    const int selection_head = shares ? 0 : blockIdx.y;
    const Attended attended(p_, row_, selection_head, kv_head());
    const int each = max(1, (attended.tiles() + kWarps * static_cast<int>(kMaxSplits) - 1) /
                                (kWarps * static_cast<int>(kMaxSplits))) * kWarps;
    splits_ = max(1, (attended.tiles() + each - 1) / each);
    if (split_ >= splits_) return;
    if (split_ == 0 && warp == 0 && (!shares || blockIdx.y == 0)) {
      const int tokens = attended.tokens(lane);
      if (lane == 0) p_.attended[row_ * p_.selection.heads + selection_head] = tokens;
    }
    Accumulator<D, NT> sums;
    attend_tiles(attended, split_ * each + warp, min(attended.tiles(), (split_ + 1) * each), lane, sums);
    merge_warps(sums, lane, warp);
    if (splits_ == 1) return;
    int32_t* done = &counters_of(p_.scratch, p_.query, row_, head_)->done;
    if (is_last(done, splits_, reinterpret_cast<int*>(shared_))) merge_splits();
  }

 private:
  __device__ __forceinline__ void attend_tiles(const Attended& attended, int tile, int end, int lane,
                                               Accumulator<D, NT>& sums) {
    if (tile >= end) return;
    const int g = lane / 4, t = lane % 4;
    // Every lane has the same slot; nvcc, told so, keeps both pointers in uniform registers.
    const int64_t slot = __reduce_max_sync(kAllLanes, static_cast<unsigned>(p_.cache.slot(kv_head())));
    const T* key = static_cast<const T*>(p_.cache.key.data) + slot * p_.cache.key.head_stride;
    const T* value = static_cast<const T*>(p_.cache.value.data) + slot * p_.cache.value.head_stride;
    const float scale = p_.scale * kLog2E;
    Queries<T, kPart, NT> queries;
    queries.load(p_.query, row_, head_, group_, lane);
    for (TileRows rows = attended.locate(tile, lane), next; tile < end; tile += kWarps, rows = next) {
      next = attended.locate(min(tile + kWarps, end - 1), lane);
      const T* row = key + __shfl_sync(kAllLanes, rows.offset, g);
      const T* row8 = key + __shfl_sync(kAllLanes, rows.offset, g + 8);
      Values<T, kPart> values;
      float s[NT][4] = {};
#pragma unroll 1
      for (int dim = 0; dim < D; dim += kPart) {
        Keys<T, kPart> keys;
        keys.load(row + dim, row8 + dim, t);
        if constexpr (kLoadsAhead) values.load(value, rows.offset, rows.mask, lane);
        if constexpr (kPart < D) queries.load(p_.query, row_, head_, group_, lane, dim);
        dot(keys, queries, s);
      }
      uint32_t weights[NT][2];
      weigh<T>(s, rows.mask, scale, g, sums, weights);
#pragma unroll
      for (int dim = 0; dim < D; dim += kPart) {
        if constexpr (!kLoadsAhead) values.load(value + dim, rows.offset, rows.mask, lane);
        accumulate(values, weights, dim / 16, sums);
      }
    }
  }

  // The block's share of every head, into the scratch, or the result if the row has no other split.
  __device__ void merge_warps(Accumulator<D, NT>& sums, int lane, int warp) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int head = 8 * n + 2 * t + j;
        const float sum = sum_of_rows(sums.sum[n][j]);
        if (head >= group_) continue;
        const Partial to = of_warp(warp, head);
        if (g == 0) to.most() = sums.most[n][j], to.sum() = sum;
#pragma unroll
        for (int w = 0; w < D / 16; ++w) {
          to.data[Accumulator<D, NT>::dim(g, w, 0)] = sums.out[n][w][j];
          to.data[Accumulator<D, NT>::dim(g, w, 2)] = sums.out[n][w][2 + j];
        }
      }
    __syncthreads();
    for (int i = threadIdx.x; i < group_ * D; i += kThreads) {
      const int head = i / D, dim = i % D;
      float most = kNothing, sum = 0.f, out = 0.f;
      for (int w = 0; w < kWarps; ++w) most = fmaxf(most, of_warp(w, head).most());
      for (int w = 0; w < kWarps; ++w) {
        const Partial part = of_warp(w, head);
        const float weight = exp2_fast(part.most() - most);
        sum += weight * part.sum();
        out += weight * part.data[dim];
      }
      if (splits_ == 1) {
        write_head<T>(p_, row_, head_ + head, dim, out, most, sum);
      } else {
        const Partial to = of_split(split_, head);
        to.data[dim] = out;
        if (dim == 0) to.most() = most, to.sum() = sum;
      }
    }
  }

  __device__ void merge_splits() {
    static_assert(kMaxSplits == 32, "a lane for each split");
    const int lane = threadIdx.x % 32;
    float* weights = shared_;                          // [group, 32]
    float* most_and_sum = shared_ + group_ * kMaxSplits;  // [group, 2]
    for (int head = threadIdx.x / 32; head < group_; head += kWarps) {
      const Partial part = of_split(lane, head);
      const float own = lane < splits_ ? part.most() : kNothing;
      float most = own;
      for (int step = 1; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
      const float weight = lane < splits_ ? exp2_fast(own - most) : 0.f;
      float sum = lane < splits_ ? weight * part.sum() : 0.f;
      for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      weights[head * kMaxSplits + lane] = weight;
      if (lane == 0) most_and_sum[2 * head] = most, most_and_sum[2 * head + 1] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < group_ * D; i += kThreads) {
      const int head = i / D, dim = i % D;
      float out = 0.f;
      for (int s = 0; s < splits_; ++s) out += weights[head * kMaxSplits + s] * of_split(s, head).data[dim];
      write_head<T>(p_, row_, head_ + head, dim, out, most_and_sum[2 * head], most_and_sum[2 * head + 1]);
    }
  }

  __device__ __forceinline__ int kv_head() const { return blockIdx.y / (gridDim.y / static_cast<int>(p_.cache.heads)); }

  __device__ __forceinline__ Partial of_warp(int warp, int head) const {
    return {shared_ + (warp * group_ + head) * (D + 2), D};
  }

  __device__ __forceinline__ Partial of_split(int split, int head) const {
    float* words = reinterpret_cast<float*>(counters_of(p_.scratch, p_.query, row_, head_ + head));
    return {words + kCounterWords + split * (D + 2), D};
  }

  // As long as the registers last, values are asked for with the keys, and queries are kept.
  static constexpr bool kLoadsAhead = D * NT <= 128;
  static constexpr int kPart = D * NT <= 256 ? D : D / 4;

  const AttendParams& p_;
  const int64_t row_;
  const int split_, group_, head_;
  float* shared_;
  int splits_ = 1;
};

template <class T, int D, int NT>
__global__ void __launch_bounds__(kThreads, D * NT <= 64 ? 4 : D * NT <= 128 ? 3 : 2)
    attend_kernel(const __grid_constant__ AttendParams params) {
  SPARSESERVE_DYNAMIC_SHARED(shared);
  AttendBlock<T, D, NT>(params, shared).run();
}

}  // namespace

void attend(const AttendParams& params) {
  const Selection& selection = params.selection;
  const int64_t blocks = std::max(params.cache.heads, selection.heads), group = params.query.heads / blocks;
  if (selection.unit_tokens & (selection.unit_tokens - 1))
    throw std::invalid_argument("unit_tokens must be a power of two on CUDA, not " +
                                std::to_string(selection.unit_tokens));
  const int64_t row_tokens = params.cache.table.width * params.cache.page_size;
  const int64_t most_tiles = (row_tokens + selection.slots * selection.unit_tokens) / kTileTokens + 3;  // three ends
  const int64_t splits = std::min((most_tiles + kWarps - 1) / kWarps, kMaxSplits);
  const int64_t shared = std::max(kWarps * (params.query.head_dim + 2), kMaxSplits + 2) * group * 4;
  const dim3 grid(splits, blocks, params.query.rows);
  for_type(params.query.dtype, params.query.head_dim, [&]<class T, int D>() {
    if (group <= 8)
      launch(attend_kernel<T, D, 1>, grid, kThreads, shared, params);
    else
      launch(attend_kernel<T, D, 2>, grid, kThreads, shared, params);
  });
}

}  // namespace sparseserve::cuda
