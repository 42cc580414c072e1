// What sparse attention loses against dense attention, row by row.
#include <cmath>
#include <cstring>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace sparseserve::cpu {

namespace {

void compare(const CompareParams& p, int64_t row) {
  float recall = 0, error = 0;
  for (int64_t head = 0; head < p.heads; ++head) {
    const float lse = p.sparse.lse[row * p.heads + head], dense = p.dense.lse[row * p.heads + head];
    if (dense == -INFINITY) {
      recall = error = NAN;
      break;
    }
    float squares[2];
    isa().square_outputs(p, row, head, squares);
    recall += std::exp(lse - dense);
    error += squares[0] == 0 ? 0 : std::sqrt(squares[0] / squares[1]);
  }
  p.recall[row] = recall / static_cast<float>(p.heads);
  p.error[row] = error / static_cast<float>(p.heads);
  const int64_t size = size_of(p.dtype);
  for (int64_t head = 0; head < p.heads && p.loses(row); ++head) {
    std::memcpy(static_cast<char*>(p.to) + p.sparse.offset(row, head) * size,
                static_cast<const char*>(p.dense.data) + p.dense.offset(row, head) * size, p.head_dim * size);
  }
}

}  // namespace

void compare_outputs(const CompareParams& params) {
  const int64_t bytes = 2 * params.rows * params.heads * params.head_dim * size_of(params.dtype);
  for_each_item(params.rows, bytes, [&](int64_t row, int64_t) { compare(params, row); });
}

}  // namespace sparseserve::cpu
