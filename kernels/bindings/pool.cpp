// torch's intra-op threads for the kernels' work items.
#include <torch/csrc/stable/ops.h>

#include "../cpu/parallel.h"

namespace sparseserve::cpu {

int pool_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void pool_run(int workers, void (*work)(void*), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(context);
  });
}

}  // namespace sparseserve::cpu
