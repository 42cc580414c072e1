// Scores of chunks of tokens by a few of their keys (HiP).
#pragma once

#include <cmath>

#include "dot.h"

namespace sparseserve::cpu::SPARSESERVE_ISA {

// q.k for the tokens of the tiles met last. A column of K costs the cache lines of its whole tile, so a tile is computed
// at once; tokens that nobody asks for stay in lanes of their own.
template <class Dot>
class TileDots {
 public:
  using T = typename Dot::Scalar;

  TileDots(const SearchBlocksParams& params, const HeadGroup& group, const Chunks& chunks, float* queries, float* dots)
      : cache_(params.cache), group_(group), pages_(chunks.pages), dims_(params.query.head_dim), queries_(queries),
        dots_(dots) {
    for (int64_t& tile : held_) tile = -1;
    Dot::pack(group, dims_, queries);
  }

  // The next tile to be computed fetches that of `token`.
  SPARSESERVE_INLINE void fetch_with_next(int64_t token) {
    const int64_t tile = token / kTileTokens;
    ahead_ = held_[tile % kDotTiles] == tile ? nullptr : key_of(tile);
  }

  SPARSESERVE_INLINE float at(int64_t head, int64_t token) {
    const int64_t tile = token / kTileTokens, slot = tile % kDotTiles;
    float* dots = dots_ + slot * group_.heads * kTileTokens;
    if (held_[slot] != tile) {
      held_[slot] = tile;
      compute(key_of(tile), dots);
    }
    return dots[head * kTileTokens + token % kTileTokens];
  }

 private:
  SPARSESERVE_INLINE const T* key_of(int64_t tile) const {
    const int64_t token = tile * kTileTokens;
    return reinterpret_cast<const T*>(group_.key) + pages_[token / cache_.page_size] * cache_.key.page_stride +
           token % cache_.page_size;
  }

  void compute(const T* key, float* dots) {
    const Fetch fetch{reinterpret_cast<const char*>(ahead_), cache_.page_size * static_cast<int64_t>(sizeof(T)),
                      nullptr};
    ahead_ = nullptr;
    for_each_block(group_.heads, [&]<int N>(int64_t g) {
      Float s[N][kVectors];
      Dot::template scores<N>(queries_ + g * dims_, dims_, key, cache_.page_size, g == 0 ? fetch : Fetch{}, s);
      for (int n = 0; n < N; ++n)
        for (int j = 0; j < kVectors; ++j) store(dots + (g + n) * kTileTokens + j * kLanes, s[n][j]);
    });
  }

  const Cache& cache_;
  const HeadGroup& group_;
  const int32_t* pages_;
  const int64_t dims_;
  float* queries_;
  float* dots_;
  int64_t held_[kDotTiles];
  const T* ahead_ = nullptr;
};

// The largest q.k met on the way into the better half, again and again; of equal halves the right one.
template <class Dot>
SPARSESERVE_INLINE float best_probe(TileDots<Dot>& dots, int64_t head, int64_t left, int64_t right) {
  float best = -INFINITY;
  do {
    const int64_t middle = (left + right) / 2;
    const float low = dots.at(head, (left + middle) / 2), high = dots.at(head, (middle + right) / 2);
    best = low > best ? low : best;
    best = high > best ? high : best;
    left = high >= low ? middle : left;
    right = high >= low ? right : middle;
  } while (right - left > 1);
  return best;
}

template <class Dot>
void chunk_scores_with(const SearchBlocksParams& params, const HeadGroup& group, const Chunks& chunks, float* queries,
                       float* dots, float* scores) {
  TileDots<Dot> tiles(params, group, chunks, queries, dots);
  const int64_t last = chunks.length - 1;
  for (int64_t i = 0; i < chunks.count; ++i) {
    const int64_t start = chunks.starts[i], end = start + chunks.tokens;
    if (i + 1 < chunks.count) {
      const int64_t probe = chunks.starts[i + 1] + chunks.tokens / 4;
      tiles.fetch_with_next(probe < last ? probe : last);
    }
    for (int64_t g = 0; g < group.heads; ++g) {
      const float score = best_probe(tiles, g, start, end < chunks.length ? end : chunks.length);
      scores[i] = score > scores[i] ? score : scores[i];
    }
  }
}

inline void chunk_scores(const SearchBlocksParams& params, const HeadGroup& group, const Chunks& chunks,
                         float* queries, float* dots, float* scores) {
  with_dot(params.cache.dtype, [&](auto dot) {
    chunk_scores_with<decltype(dot)>(params, group, chunks, queries, dots, scores);
  });
}

}  // namespace sparseserve::cpu::SPARSESERVE_ISA
