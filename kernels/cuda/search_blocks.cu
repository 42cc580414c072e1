// HiP's search: a block for each row and selection head scores chunks by a few of their keys, keeps the best, splits
// them and searches again. The row's last page remembers at which length it was searched, how many chunks each stage
// kept, and where they start.
#include <algorithm>

#include "best.h"
#include "launch.h"

namespace sparseserve::cuda {

namespace {

// Tokens of a row as one of its KV heads has them.
template <class T>
struct Tokens {
  const T* key;
  const int32_t* pages;
  int64_t page_stride;
  int stride, page_size;

  __device__ __forceinline__ Tokens(const Cache& cache, int64_t row, int64_t head)
      : key(static_cast<const T*>(cache.key.data) + head * cache.key.head_stride),
        pages(cache.table.pages + row * cache.table.stride),
        page_stride(cache.key.page_stride),
        stride(static_cast<int>(cache.key.token_stride)),
        page_size(static_cast<int>(cache.page_size)) {}

  __device__ __forceinline__ const T* at(int token) const {
    const int page = token / page_size;
    return key + pages[page] * page_stride + (token - page * page_size) * stride;
  }
};

// The largest q.k met on the way into the better half, again and again; of equal halves the right one. Four lanes
// search one chunk by one query; all of a warp go on until the last are done, on a single token to no effect.
template <class T, int D>
__device__ __forceinline__ float best_probe(const Queries<T, D, 1>& queries, const Tokens<T>& tokens, int left,
                                            int right, int lane) {
  const int g = lane / 4, own = 4 * g + g / 2;  // who gets the products of keys g and g + 8 with query g
  const bool odd = g % 2;
  float best = -INFINITY;
  do {
    const int middle = (left + right) / 2;
    Keys<T, D> keys;
    keys.load(tokens.at((left + middle) / 2), tokens.at((middle + right) / 2), lane % 4);
    float s[1][4] = {};
    dot(keys, queries, s);
    const float low = __shfl_sync(kAllLanes, odd ? s[0][1] : s[0][0], own);
    const float high = __shfl_sync(kAllLanes, odd ? s[0][3] : s[0][2], own);
    best = fmaxf(best, fmaxf(low, high));
    const bool goes_right = high >= low;
    left = goes_right ? middle : left;
    right = goes_right ? right : middle;
  } while (__any_sync(kAllLanes, right - left > 1));
  return best;
}

// The chunks of a stage: those that the stage before kept, split. At first the row is split, from the sink on.
struct Chunks {
  const int32_t* parents;
  int each;    // of a parent
  int tokens;  // of a chunk
  int count;

  // Chunks start before `limit`; parents ascend, so only the last one can reach beyond it.
  __device__ Chunks(const int32_t* parents, int parent_count, int each, int tokens, int limit)
      : parents(parents), each(each), tokens(tokens), count(0) {
    if (parent_count == 0) return;
    const int inside = max(0, limit - parents[parent_count - 1]);
    count = (parent_count - 1) * each + min(each, (inside + tokens - 1) / tokens);
  }

  __device__ __forceinline__ int start(int i) const { return parents[i / each] + i % each * tokens; }
};

template <class T, int D>
class BlockSearch {
 public:
  __device__ BlockSearch(const SearchBlocksParams& params, unsigned char* shared)
      : p_(params),
        row_(blockIdx.y),
        head_(blockIdx.x),
        length_(params.cache.table.seq_lens[row_]),
        shared_(*reinterpret_cast<BestShared*>(shared)),
        keys_(reinterpret_cast<uint32_t*>(shared + sizeof(BestShared))) {}

  __device__ void run() {
    const Selection& selection = p_.selection;
    const int64_t at = row_ * selection.heads + head_;
    int32_t *spans = selection.spans + 2 * at, *units = selection.units + at * selection.slots;
    const int recent = p_.recent[head_];
    if (length_ <= p_.budget[head_]) {
      if (threadIdx.x == 0) spans[0] = spans[1] = length_, selection.count[at] = 0;
      return;
    }
    const int page_size = static_cast<int>(p_.cache.page_size), page = (length_ - 1) / page_size;
    state_ = p_.state + p_.cache.table.pages[row_ * p_.cache.table.stride + page] * p_.state_page_stride +
             head_ * p_.state_head_stride;
    limit_ = length_ - max(0, recent - static_cast<int>(p_.chunk_tokens[0]));

    const int first = first_stage(length_ - 1 - page * page_size);
    int count = first == 0 ? 1 : state_[first];
    for (int stage = first; stage < kSearchStages; ++stage) count = search(stage, count);

    const int32_t* starts = kept(kSearchStages - 1);
    const int unit = static_cast<int>(selection.unit_tokens);
    for (int i = threadIdx.x; i < count; i += kBestThreads) units[i] = starts[i] / unit;
    if (threadIdx.x != 0) return;
    if (first < kSearchStages) state_[0] = length_;
    spans[0] = p_.sink[head_];
    spans[1] = length_ - recent;
    selection.count[at] = count;
  }

 private:
  // The first stage that is searched, by the offset of the current token in its page; kSearchStages when none is.
  __device__ int first_stage(int offset) const {
    const int searched_at = state_[0];
    if (searched_at < length_ - offset || searched_at >= length_) return 0;  // not on an earlier token of this page
    int stage = 0;
    while (stage < kSearchStages && offset % p_.refresh_steps[stage] != 0) ++stage;
    return stage;
  }

  __device__ int most(int stage) const {
    if (stage + 1 < kSearchStages) return static_cast<int>(p_.stage_tokens[stage] / p_.chunk_tokens[stage]);
    const int tokens = p_.budget[head_] - p_.sink[head_] - p_.recent[head_];
    return min(tokens / static_cast<int>(p_.chunk_tokens[stage]), static_cast<int>(p_.selection.slots));
  }

  __device__ int32_t* kept(int stage) const {
    int32_t* at = state_ + 1 + kSearchStages;
    for (int i = 0; i < stage; ++i) at += most(i);
    return at;
  }

  // Searches the chunks of `parents` chunks of the stage before; returns how many it keeps.
  __device__ int search(int stage, int parents) {
    const int tokens = static_cast<int>(p_.chunk_tokens[stage]);
    const int each = stage == 0 ? INT32_MAX : static_cast<int>(p_.chunk_tokens[stage - 1]) / tokens;
    const Chunks chunks(stage == 0 ? p_.sink + head_ : kept(stage - 1), parents, each, tokens, limit_);
    const int count = min(chunks.count, most(stage));
    int32_t* to = kept(stage);
    if (count == chunks.count) {
      for (int i = threadIdx.x; i < count; i += kBestThreads) to[i] = chunks.start(i);
    } else if (count > 0) {
      score(chunks);
      write_best(chunks.count, count, [&](int i) { return keys_[i]; }, [&](int at, int i) { to[at] = chunks.start(i); },
                 shared_);
    }
    if (threadIdx.x == 0) state_[1 + stage] = count;
    __syncthreads();
    return count;
  }

  // The best score of every chunk over the query heads, as a key.
  __device__ void score(const Chunks& chunks) {
    for (int i = threadIdx.x; i < chunks.count; i += kBestThreads) keys_[i] = 0;
    __syncthreads();
    constexpr int kPerWarp = 8;  // searches
    const int lane = threadIdx.x % 32, heads = static_cast<int>(p_.query.heads / p_.selection.heads);
    const int group = static_cast<int>(p_.query.heads / p_.cache.heads), searches = chunks.count * heads;
    for (int begin = threadIdx.x / 32 * kPerWarp; begin < searches; begin += kBestWarps * kPerWarp) {
      const int i = min(begin + lane / 4, searches - 1), chunk = i / heads, head = head_ * heads + i % heads;
      const T* query =
          static_cast<const T*>(p_.query.data) + row_ * p_.query.row_stride + head * p_.query.head_stride;
      Queries<T, D, 1> queries;
#pragma unroll
      for (int c = 0; c < D / 32; ++c)
        queries.part[0][c] = *reinterpret_cast<const uint4*>(query + 32 * c + 8 * (lane % 4));
      const int start = chunks.start(chunk), end = min(start + chunks.tokens, length_);
      const float best = best_probe(queries, Tokens<T>(p_.cache, row_, head / group), start, end, lane);
      if (lane % 4 == 0) atomicMax(&keys_[chunk], key_of(best));
    }
    __syncthreads();
  }

  const SearchBlocksParams& p_;
  const int row_, head_, length_;
  BestShared& shared_;
  uint32_t* keys_;
  int32_t* state_ = nullptr;
  int limit_ = 0;
};

template <class T, int D>
__global__ void __launch_bounds__(kBestThreads, 1) search_kernel(const __grid_constant__ SearchBlocksParams params) {
  SPARSESERVE_DYNAMIC_SHARED(shared);
  BlockSearch<T, D>(params, shared).run();
}

}  // namespace

void search_blocks(const SearchBlocksParams& params) {
  const Cache& cache = params.cache;
  int64_t chunks = (cache.table.width * cache.page_size + params.chunk_tokens[0] - 1) / params.chunk_tokens[0];
  for (int i = 0; i + 1 < kSearchStages; ++i)
    chunks = std::max(chunks, params.stage_tokens[i] / params.chunk_tokens[i] *
                                  (params.chunk_tokens[i] / params.chunk_tokens[i + 1]));
  const int64_t shared = sizeof(BestShared) + chunks * sizeof(uint32_t);
  const dim3 grid(params.selection.heads, params.query.rows);
  for_type(params.query.dtype, params.query.head_dim, [&]<class T, int D>() {
    launch(search_kernel<T, D>, grid, kBestThreads, shared, params);
  });
}

}  // namespace sparseserve::cuda
