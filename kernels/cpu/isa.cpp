// Which instruction set runs.
#include "isa.h"

#include <atomic>
#include <cstring>

#include "kernels.h"

namespace sparseserve::cpu {

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const Isa kIsa;
}
namespace avx512 {
extern const Isa kIsa;
}
namespace avx2 {
extern const Isa kIsa;
}
#endif
namespace portable {
extern const Isa kIsa;
}

namespace {

struct Candidate {
  const Isa* isa;
  bool supported;
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Best first.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&avx512_bf16::kIsa, has_avx512_bf16()},
    {&avx512::kIsa, has_avx512()},
    {&avx2::kIsa, has_avx2()},
#endif
    {&portable::kIsa, true},
};

const Isa* best() {
  const Candidate* candidate = kCandidates;
  while (!candidate->supported) ++candidate;
  return candidate->isa;
}

std::atomic<const Isa*> current{best()};

}  // namespace

const Isa& isa() { return *current.load(std::memory_order_relaxed); }

const char* isa_name() { return isa().name; }

bool use_isa(const char* name) {
  for (const Candidate& candidate : kCandidates)
    if (candidate.supported && std::strcmp(candidate.isa->name, name) == 0) {
      current = candidate.isa;
      return true;
    }
  return false;
}

}  // namespace sparseserve::cpu
