// The best units of every row and selection head within its budget.
#include "launch.h"
#include "select.h"

namespace sparseserve::cuda {

namespace {

constexpr int kSelectThreads = 512;

__global__ void __launch_bounds__(kSelectThreads, 2) select_kernel(const __grid_constant__ SelectParams p) {
  SPARSESERVE_DYNAMIC_SHARED(shared);
  select_row(p.scores, p.wanted, blockIdx.y, blockIdx.x, *reinterpret_cast<BestShared<kSelectThreads>*>(shared));
}

}  // namespace

void select_units(const SelectParams& params) {
  launch(select_kernel, dim3(params.wanted.selection.heads, params.rows), kSelectThreads,
         sizeof(BestShared<kSelectThreads>), params);
}

}  // namespace sparseserve::cuda
