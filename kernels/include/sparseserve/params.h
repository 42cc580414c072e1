// What every kernel is told, in plain C++: pointers, shapes and strides. All strides count elements, never bytes.
//
// Shape alphabet: B decode rows, H KV heads, G query heads per KV head, Hq = H * G query heads, Hs selection heads
// (1, H or Hq), D head dim, N pages of a row, P page size in tokens, S unit slots, U units per page, M physical pages.
#pragma once

#include <cstdint>

namespace sparseserve {

enum class DType { kBFloat16, kHalf, kFloat };

// How the two rows of a unit's summary bound its keys; the numbers are those of sparseserve.types.Bound's order.
enum class Bound { kMinMax = 0, kMeanStd = 1 };

// Query heads of the decode rows, [B, Hq, D].
struct Query {
  const void* data;
  DType dtype;
  int64_t rows;        // B
  int64_t heads;       // Hq
  int64_t head_dim;    // D, a multiple of 16
  int64_t row_stride;
  int64_t head_stride;
};

// One half (K or V) of a page pool, [M, H, P, D]: a page has a slot for each KV head, or any number with `places`. On
// the CPU, within a page and slot, K is [D, P] and V [P, D], both dense; on CUDA the dims of a token are dense.
struct Pool {
  const void* data;
  int64_t page_stride;
  int64_t head_stride;
  int64_t token_stride;
};

// The rows of a step; a length of 0 marks a padding row.
struct PageTable {
  const int32_t* pages;     // [R, B, N], physical page of each logical page; R tables, one without `places`
  int64_t table_stride;
  int64_t stride;           // of a row, 0 if all share one
  int64_t width;            // N
  const int32_t* seq_lens;  // [B]
};

struct Cache {
  Pool key;
  Pool value;
  DType dtype;
  int64_t heads;          // H
  int64_t page_size;      // P, a multiple of 32 on the CPU, of 16 on CUDA
  PageTable table;
  const int32_t* places;  // [H, 2], table and slot of every KV head; null: head h is in slot h of the one table

  constexpr const int32_t* pages(int64_t row, int64_t kv_head) const {
    return table.pages + row * table.stride + (places ? places[2 * kv_head] * table.table_stride : 0);
  }
  constexpr int64_t slot(int64_t kv_head) const { return places ? places[2 * kv_head + 1] : kv_head; }
};

// [0, spans[0]), the units, and [spans[1], seq_len).
struct Selection {
  int64_t heads;         // Hs
  int64_t slots;         // S
  int64_t unit_tokens;
  int32_t* spans;        // [B, Hs, 2]
  int32_t* units;        // [B, Hs, S]
  int32_t* count;        // [B, Hs]
};

struct AttendParams {
  Query query;
  Cache cache;
  Selection selection;
  float scale;
  void* out;             // [B, Hq, D], dtype of the query
  int64_t out_row_stride;
  int64_t out_head_stride;
  float* lse;            // [B, Hq]
  int32_t* attended;     // [B, Hs]
  void* scratch;         // CUDA only: scratch_words, zero before the first step
};

// CUDA cuts a row into at most this many pieces, by its own length alone.
constexpr int64_t kMaxSplits = 32;

// Counters of the blocks that work on one row and head; zero between launches.
struct Counters {
  int32_t done, drawn, stage;
};
constexpr int64_t kCounterWords = sizeof(Counters) / 4;

// 32-bit words: for each row and query head its counters, then of each piece the output, maximum and sum.
constexpr int64_t scratch_words(int64_t rows, int64_t heads, int64_t head_dim) {
  return rows * heads * (kCounterWords + kMaxSplits * (head_dim + 2));
}

// [B, Hs, units of the longest row]
struct Scores {
  float* data;
  int64_t row_stride;
  int64_t head_stride;

  constexpr float* of(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

// A selection to be filled: sink, recent tokens, and the best units that the budget still allows, or all above
// a threshold. A row within a budget of its own is taken whole under a threshold, too.
struct Wanted {
  Selection selection;        // its `count` is null when none is wanted
  const int32_t* seq_lens;    // [B]
  const int32_t* sink;        // [Hs] tokens
  const int32_t* recent;      // [Hs] tokens
  const int32_t* budget;      // [Hs] tokens
  const int32_t* row_budget;  // [B] tokens in place of `budget`, 0 for that; or null
  bool by_threshold;
  float threshold;

  constexpr bool any() const { return selection.count != nullptr; }
  constexpr int32_t budget_of(int64_t row, int32_t plan) const {
    const int32_t own = row_budget ? row_budget[row] : 0;
    return own > 0 ? own : plan;
  }
  constexpr bool takes_all(int64_t row, int64_t head) const {
    return seq_lens[row] <= budget_of(row, by_threshold ? -1 : budget[head]);
  }
  // What the budget leaves for units, less than 0 where sink and recent tokens exceed it.
  constexpr int32_t unit_budget(int64_t row, int64_t head) const {
    return budget_of(row, budget[head]) - sink[head] - recent[head];
  }
};

struct ScoreTokensParams {
  Query query;
  Cache cache;           // value is unused
  const float* lse;      // [B, Hq]
  float scale;
  int64_t unit_tokens;   // 1, 16, 32 or 64
  int64_t heads;         // Hs
  Scores scores;
  Wanted wanted;
  void* scratch;         // CUDA only, as of AttendParams
};

// Summaries of a page pool, [M, H, U, 2, D] of the cache's dtype or gate keys [M, H, U, E] fp32, dense from U on.
struct SummaryPool {
  void* data;
  int64_t page_stride;
  int64_t head_stride;
  int64_t units;         // U
};

struct ScorePagesParams {
  Query query;
  SummaryPool summary;
  int64_t kv_heads;      // H
  PageTable table;
  int64_t unit_tokens;
  Bound bound;
  Scores scores;         // Hs = H
  Wanted wanted;
  void* scratch;         // CUDA only, as of AttendParams
};

// Tokens just written to the keys of a pool.
struct Written {
  Pool key;
  DType dtype;
  int64_t kv_heads;      // H
  int64_t head_dim;      // D
  int64_t page_size;     // P
  int64_t unit_tokens;   // a multiple of 16
  int64_t tokens;        // T
  const int64_t* slots;  // [T], page * P + offset, or -1

  constexpr bool completes_unit(int64_t token) const { return slots[token] >= 0 && (slots[token] + 1) % unit_tokens == 0; }
};

struct SummarizeParams {
  Written written;
  Bound bound;
  SummaryPool summary;   // of the keys' dtype
};

struct SelectParams {
  Scores scores;
  int64_t rows;          // B
  Wanted wanted;
};

// One branch of a learned gate (SeerAttention-R): a projection, its norm and its rotation.
struct GateBranch {
  const float* weight;   // [H, G, D, E] for queries, [H, 3D, E] for pooled keys
  int64_t dim;           // E, a multiple of 16
  const float* norm;     // [E], or null
  const float* unrope;   // [positions, D] cos and sin that undo the model's rotation
  const float* rope;     // [positions, E] cos and sin, or null
};

struct SummarizeGatesParams {
  Written written;
  const int64_t* positions;  // [T], in their rows
  GateBranch gate;
  SummaryPool summary;
};

struct ScoreGatesParams {
  Query query;
  SummaryPool summary;
  int64_t kv_heads;      // H
  PageTable table;
  int64_t unit_tokens;
  GateBranch gate;
  Scores scores;         // Hs = H
  Wanted wanted;
};

// Numbers of tokens and heads, [T, H, D]; the dims are dense.
struct TokenRows {
  const void* data;
  int64_t token_stride;
  int64_t head_stride;
};

struct WriteParams {
  TokenRows from_key;
  TokenRows from_value;
  DType dtype;
  int64_t tokens;         // T
  int64_t heads;          // H
  int64_t head_dim;       // D
  Pool key;
  Pool value;
  int64_t page_size;      // P
  const int32_t* places;  // [H, 2], table and slot of every KV head
  const int64_t* slots;   // [R, T] of every table: page * P + offset, or -1
  int64_t slots_stride;

  constexpr int64_t slot_of(int64_t token, int64_t head) const { return slots[places[2 * head] * slots_stride + token]; }
};

// What attention gave, [B, Hq, D]; the dims are dense.
struct Outputs {
  const void* data;
  int64_t row_stride;
  int64_t head_stride;
  const float* lse;  // [B, Hq]

  constexpr int64_t offset(int64_t row, int64_t head) const { return row * row_stride + head * head_stride; }
};

struct CompareParams {
  Outputs sparse;
  Outputs dense;
  DType dtype;
  int64_t rows;      // B
  int64_t heads;     // Hq
  int64_t head_dim;  // D
  float* recall;     // [B]
  float* error;      // [B]
  void* to;          // the sparse output, where rows whose recall is less than `floor` take the dense one
  float floor;

  constexpr bool loses(int64_t row) const { return recall[row] < floor; }  // not NaN, of rows that are not measured
};

constexpr int kSearchStages = 3;

struct SearchBlocksParams {
  Query query;
  Cache cache;           // value is unused
  int64_t chunk_tokens[kSearchStages];
  int64_t stage_tokens[kSearchStages - 1];
  int64_t refresh_steps[kSearchStages];
  int32_t* state;        // [M, Hs, 4 + chunks that the stages keep]
  int64_t state_page_stride;
  int64_t state_head_stride;
  Wanted wanted;         // in units of the last chunk_tokens, within the budget
  Scores scores;         // CUDA only, of chunks: [B, Hs, >= most_chunks()]
  void* scratch;         // CUDA only, as of AttendParams

  // Of a stage, in a row that fills its pages.
  constexpr int64_t most_chunks() const {
    int64_t most = (cache.table.width * cache.page_size + chunk_tokens[0] - 1) / chunk_tokens[0];
    for (int i = 0; i + 1 < kSearchStages; ++i) {
      const int64_t chunks = stage_tokens[i] / chunk_tokens[i] * (chunk_tokens[i] / chunk_tokens[i + 1]);
      most = chunks > most ? chunks : most;
    }
    return most;
  }
};

}  // namespace sparseserve
