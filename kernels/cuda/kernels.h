// The CUDA kernels: launched on the current stream, nothing is read back, nothing is allocated.
#pragma once

#include "sparseserve/params.h"

namespace sparseserve::cuda {

void attend(const AttendParams& params);
void score_tokens(const ScoreTokensParams& params);
void score_pages(const ScorePagesParams& params);
void summarize_pages(const SummarizeParams& params);
void select_units(const SelectParams& params);
void search_blocks(const SearchBlocksParams& params);
void summarize_gates(const SummarizeGatesParams& params);
void score_gates(const ScoreGatesParams& params);
void write_tokens(const WriteParams& params);
void compare_outputs(const CompareParams& params);

}  // namespace sparseserve::cuda
