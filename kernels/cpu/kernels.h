// The CPU kernels and the instruction sets they are compiled for.
#pragma once

#include <cstdint>

#include "sparseserve/params.h"

namespace sparseserve::cpu {

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

// The instruction set in use: the best one of this machine until another one is chosen.
const char* isa_name();
// False when the machine lacks it or the name is unknown.
bool use_isa(const char* name);

}  // namespace sparseserve::cpu
