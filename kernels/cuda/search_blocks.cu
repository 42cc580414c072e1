// HiP's search: chunks are scored by a few of their keys, the best are kept, split and searched again. The row's last
// page remembers at which length it was searched, how many chunks each stage kept, and where they start.
//
// Several blocks share a row and selection head in each of the stages. Which part of which stage a block takes is told
// by the order in which blocks start: a stage waits for the one before, whose blocks have all started then, so the wait
// ends however few blocks the GPU runs at a time. The block that finishes a stage last keeps the best.
#include <algorithm>

#include "best.h"
#include "blocks.h"
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

constexpr int kSearchThreads = 256, kSearchWarps = kSearchThreads / 32;
constexpr int kPerWarp = 8;  // searches of a warp at a time
constexpr int kPerBlock = kSearchWarps * kPerWarp;

struct SearchShared {
  BestShared<kSearchThreads> best;
  int first, ticket;
};

template <class T, int D>
class BlockSearch {
 public:
  __device__ BlockSearch(const SearchBlocksParams& params, unsigned char* shared)
      : p_(params),
        row_(blockIdx.z),
        head_(blockIdx.y),
        parts_(gridDim.x / kSearchStages),
        length_(params.cache.table.seq_lens[row_]),
        shared_(*reinterpret_cast<SearchShared*>(shared)) {}

  __device__ void run() {
    if (p_.wanted.takes_all(row_, head_)) return write_whole();
    const int page_size = static_cast<int>(p_.cache.page_size), page = (length_ - 1) / page_size;
    state_ = p_.state + p_.cache.table.pages[row_ * p_.cache.table.stride + page] * p_.state_page_stride +
             head_ * p_.state_head_stride;
    limit_ = length_ - max(0, p_.wanted.recent[head_] - static_cast<int>(p_.chunk_tokens[0]));
    draw(length_ - 1 - page * page_size);
    const int first = shared_.first, stage = shared_.ticket / parts_;
    if (first == kSearchStages && blockIdx.x == 0) write_selection();
    if (stage < first) return;
    if (stage > first) wait_for(stage);
    search(stage, stage == 0 ? 1 : state_[stage]);
  }

 private:
  __device__ void write_whole() const {
    const Selection& selection = p_.wanted.selection;
    const int64_t at = row_ * selection.heads + head_;
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    selection.spans[2 * at] = selection.spans[2 * at + 1] = length_;
    selection.count[at] = 0;
  }

  // From what the last stage kept.
  __device__ void write_selection() const {
    const Selection& selection = p_.wanted.selection;
    const int64_t at = row_ * selection.heads + head_;
    const int32_t* starts = kept(kSearchStages - 1);
    const int unit = static_cast<int>(selection.unit_tokens), count = state_[kSearchStages];
    for (int i = threadIdx.x; i < count; i += kSearchThreads)
      selection.units[at * selection.slots + i] = starts[i] / unit;
    if (threadIdx.x != 0) return;
    const int first = min(p_.wanted.sink[head_], length_);
    selection.spans[2 * at] = first;
    selection.spans[2 * at + 1] = max(length_ - p_.wanted.recent[head_], first);
    selection.count[at] = count;
  }

  // Reads the first stage that is searched and, if there is one, draws this block's turn. The state is written by the
  // last block only, after all have read it here.
  __device__ void draw(int offset) {
    if (threadIdx.x == 0) {
      shared_.first = first_stage(offset);
      shared_.ticket = 0;
      __threadfence();
      if (shared_.first < kSearchStages) {
        shared_.ticket = atomicAdd(&counters()->drawn, 1);
        if (shared_.ticket == static_cast<int>(gridDim.x) - 1) counters()->drawn = 0;  // for the next launch
      }
    }
    __syncthreads();
  }

  // The first stage that is searched, by the offset of the current token in its page; kSearchStages when none is.
  __device__ int first_stage(int offset) const {
    const int searched_at = state_[0];
    if (searched_at < length_ - offset || searched_at >= length_) return 0;  // not on an earlier token of this page
    int stage = 0;
    while (stage < kSearchStages && offset % p_.refresh_steps[stage] != 0) ++stage;
    return stage;
  }

  // Until the stage before has kept its best.
  __device__ void wait_for(int stage) const {
    if (threadIdx.x == 0)
      while (atomicAdd(&counters()->stage, 0) != stage) __nanosleep(64);
    __syncthreads();
    __threadfence();
  }

  __device__ int most(int stage) const {
    if (stage + 1 < kSearchStages) return static_cast<int>(p_.stage_tokens[stage] / p_.chunk_tokens[stage]);
    const int tokens = max(0, p_.wanted.unit_budget(row_, head_));
    return min(tokens / static_cast<int>(p_.chunk_tokens[stage]), static_cast<int>(p_.wanted.selection.slots));
  }

  __device__ int32_t* kept(int stage) const {
    int32_t* at = state_ + 1 + kSearchStages;
    for (int i = 0; i < stage; ++i) at += most(i);
    return at;
  }

  // Searches this block's part of the chunks of `parents` chunks of the stage before; the last block ends the stage.
  __device__ void search(int stage, int parents) {
    const int tokens = static_cast<int>(p_.chunk_tokens[stage]);
    const int each = stage == 0 ? INT32_MAX : static_cast<int>(p_.chunk_tokens[stage - 1]) / tokens;
    const Chunks chunks(stage == 0 ? p_.wanted.sink + head_ : kept(stage - 1), parents, each, tokens, limit_);
    const int count = min(chunks.count, most(stage));
    if (0 < count && count < chunks.count) {
      const int part = (chunks.count + parts_ - 1) / parts_, begin = shared_.ticket % parts_ * part;
      score(chunks, begin, min(begin + part, chunks.count));
    }
    if (!is_last(&counters()->done, parts_, &shared_.best.rank)) return;
    keep(stage, chunks, count);
    const bool ends = stage + 1 == kSearchStages;
    if (threadIdx.x == 0) state_[1 + stage] = count;
    __threadfence();
    __syncthreads();
    if (ends) write_selection();
    if (threadIdx.x != 0) return;
    if (ends) state_[0] = length_;
    atomicExch(&counters()->stage, ends ? 0 : stage + 1);
  }

  __device__ void keep(int stage, const Chunks& chunks, int count) {
    int32_t* to = kept(stage);
    if (count == chunks.count) {
      for (int i = threadIdx.x; i < count; i += kSearchThreads) to[i] = chunks.start(i);
    } else if (count > 0) {
      const uint32_t* keys = this->keys();
      const auto key = [&](int i) { return keys[i]; };
      write_best(chunks.count, count, key, [&](int at, int i) { to[at] = chunks.start(i); }, shared_.best);
    }
  }

  // The best score of the chunks in [begin, end) over the query heads, as a key.
  __device__ void score(const Chunks& chunks, int begin, int end) {
    for (int i = begin + threadIdx.x; i < end; i += kSearchThreads) keys()[i] = 0;
    __syncthreads();
    const int lane = threadIdx.x % 32, heads = static_cast<int>(p_.query.heads / p_.wanted.selection.heads);
    const int group = static_cast<int>(p_.query.heads / p_.cache.heads), searches = (end - begin) * heads;
    for (int from = threadIdx.x / 32 * kPerWarp; from < searches; from += kPerBlock) {
      const int i = min(from + lane / 4, searches - 1), chunk = begin + i / heads, head = head_ * heads + i % heads;
      const T* query =
          static_cast<const T*>(p_.query.data) + row_ * p_.query.row_stride + head * p_.query.head_stride;
      Queries<T, D, 1> queries;
#pragma unroll
      for (int c = 0; c < D / 32; ++c)
        queries.part[0][c] = *reinterpret_cast<const uint4*>(query + 32 * c + 8 * (lane % 4));
      const int start = chunks.start(chunk), end_token = min(start + chunks.tokens, length_);
      const float best = best_probe(queries, Tokens<T>(p_.cache, row_, head / group), start, end_token, lane);
      if (lane % 4 == 0) atomicMax(&keys()[chunk], key_of(best));
    }
  }

  // Made anew where they are needed: a search leaves few registers.
  __device__ __forceinline__ Counters* counters() const {
    const int query_head = head_ * static_cast<int>(p_.query.heads / p_.wanted.selection.heads);
    return counters_of(p_.scratch, p_.query, row_, query_head);
  }

  // Of the scores of a stage's chunks.
  __device__ __forceinline__ uint32_t* keys() const { return reinterpret_cast<uint32_t*>(p_.scores.of(row_, head_)); }

  const SearchBlocksParams& p_;
  const int row_, head_, parts_, length_;
  SearchShared& shared_;
  int32_t* state_ = nullptr;
  int limit_ = 0;
};

template <class T, int D>
__global__ void __launch_bounds__(kSearchThreads, D <= 128 ? 2 : 1)
    search_kernel(const __grid_constant__ SearchBlocksParams params) {
  SPARSESERVE_DYNAMIC_SHARED(shared);
  BlockSearch<T, D>(params, shared).run();
}

}  // namespace

void search_blocks(const SearchBlocksParams& params) {
  // Enough for a large GPU; blocks that have nothing to search, as in most steps, cost time as well.
  constexpr int64_t kBlocks = 256, kMostParts = 128;
  const int64_t heads = params.wanted.selection.heads, rows = params.query.rows;
  const int64_t searches = params.most_chunks() * (params.query.heads / heads);
  const int64_t parts = std::min({kBlocks / std::max<int64_t>(rows * heads, 1), (searches + kPerBlock - 1) / kPerBlock,
                                  kMostParts});
  const dim3 grid(std::max<int64_t>(parts, 1) * kSearchStages, heads, rows);
  for_type(params.query.dtype, params.query.head_dim, [&]<class T, int D>() {
    launch(search_kernel<T, D>, grid, kSearchThreads, sizeof(SearchShared), params);
  });
}

}  // namespace sparseserve::cuda
