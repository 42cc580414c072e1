// The table of one instruction set.
#include "attend.h"
#include "compare.h"
#include "gate.h"
#include "score.h"
#include "search.h"
#include "summarize.h"

#define SPARSESERVE_STRING_(x) #x
#define SPARSESERVE_STRING(x) SPARSESERVE_STRING_(x)

namespace sparseserve::cpu::SPARSESERVE_ISA {

extern const Isa kIsa;
const Isa kIsa = {SPARSESERVE_STRING(SPARSESERVE_ISA), attend_chunk, merge_chunks, token_mass, score_units,
                  load_queries, summarize_unit, chunk_scores, summarize_gate, score_gates,
                  square_outputs};

}  // namespace sparseserve::cpu::SPARSESERVE_ISA
