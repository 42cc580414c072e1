// The part of the kernels that is compiled once per instruction set (isa/*.cpp), and how the rest calls it.
// Code under isa/ must not instantiate std templates: the linker keeps one copy, perhaps the one with AVX-512.
#pragma once

#include <cstdint>

#include "sparseserve/params.h"

namespace sparseserve::cpu {

constexpr int kTileTokens = 32;
constexpr int64_t kMaxHeadDim = 256;

// Up to 32 consecutive tokens of one page, those whose bit is set.
struct Tile {
  int32_t page;    // physical
  int32_t column;  // first token, in the page
  uint32_t mask;
};

// Query heads that share one KV head and one tile list.
struct HeadGroup {
  const char* query;  // [heads, D]
  int64_t query_stride;
  int64_t heads;
  const char* key;    // this KV head in page 0
  const char* value;
};

// The first tile that a thread reads in its next item, to fetch ahead.
struct Ahead {
  const char* key = nullptr;
  const char* value = nullptr;
  uint32_t mask = 0;
};

// Chunks of one row.
struct Chunks {
  const int32_t* pages;   // of the row
  const int32_t* starts;  // [count] tokens
  int64_t count;
  int64_t tokens;         // of a chunk; the row's end cuts it short
  int64_t length;         // of the row
};

constexpr int64_t kDotTiles = 16;  // tiles whose q.k are remembered

struct Isa {
  const char* name;

  // queries: [heads, D] scratch. partial: [heads] maximum (base 2), [heads] sum, [heads, D] unnormalised output.
  void (*attend_chunk)(const AttendParams&, const HeadGroup&, const Tile*, int64_t tiles, const Ahead&, float* queries,
                       float* partial);
  // partials: [chunks] of the above, `stride` apart. Writes rows `heads` of out and lse.
  void (*merge_chunks)(const AttendParams&, const float* partials, int64_t chunks, int64_t stride, int64_t heads,
                       char* out, float* lse);
  // Adds the attention mass of every token to mass, [heads, tiles * 32], or [tiles * 32] summed over the heads.
  void (*token_mass)(const ScoreTokensParams&, const HeadGroup&, const float* lse, const Tile*, int64_t tiles,
                     const Ahead&, bool per_head, float* queries, float* mass);
  // Scores of the `units` consecutive units at `summary`; queries is [G, D].
  void (*score_units)(const ScorePagesParams&, const float* queries, int64_t group, const char* summary,
                      int64_t units, const char* ahead, float* scores);
  // Query heads [head, head + heads) of a row as fp32 [heads, D].
  void (*load_queries)(const Query&, int64_t row, int64_t head, int64_t heads, float* queries);
  // The summaries, of all KV heads, of the unit that ends at `last_slot`.
  void (*summarize_unit)(const SummarizeParams&, int64_t last_slot);
  // Raises the scores of chunks to the best of the group's heads. queries: [heads, D] scratch; dots: [kDotTiles, heads,
  // 32] scratch.
  void (*chunk_scores)(const SearchBlocksParams&, const HeadGroup&, const Chunks&, float* queries, float* dots,
                       float* scores);
  // Gate keys, of all KV heads, of the block that `token` completes; angles is [D, unit_tokens] scratch.
  void (*summarize_gate)(const SummarizeGatesParams&, int64_t token, float* angles);
  // Scores of all units of one row and KV head.
  void (*score_gates)(const ScoreGatesParams&, int64_t row, int64_t head);
  // |sparse - dense|^2 and |dense|^2 of one head's output.
  void (*square_outputs)(const CompareParams&, int64_t row, int64_t head, float* squares);
};

const Isa& isa();

[[gnu::always_inline]] constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }

}  // namespace sparseserve::cpu
