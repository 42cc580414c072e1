// How far an output of attention is from the dense one.
#pragma once

#include "../isa.h"
#include "simd.h"

namespace sparseserve::cpu::SPARSESERVE_ISA {

template <class T>
void square_outputs_as(const CompareParams& params, int64_t row, int64_t head, float* squares) {
  const T* sparse = static_cast<const T*>(params.sparse.data) + params.sparse.offset(row, head);
  const T* dense = static_cast<const T*>(params.dense.data) + params.dense.offset(row, head);
  Float apart{}, size{};
  for (int64_t d = 0; d < params.head_dim; d += kLanes) {
    const Float exact = load(dense + d), error = load(sparse + d) - exact;
    apart = fma(error, error, apart);
    size = fma(exact, exact, size);
  }
  squares[0] = reduce_add(apart);
  squares[1] = reduce_add(size);
}

inline void square_outputs(const CompareParams& params, int64_t row, int64_t head, float* squares) {
  switch (params.dtype) {
    case DType::kBFloat16:
      return square_outputs_as<bf16>(params, row, head, squares);
    case DType::kHalf:
      return square_outputs_as<fp16>(params, row, head, squares);
    case DType::kFloat:
      return square_outputs_as<float>(params, row, head, squares);
  }
}

}  // namespace sparseserve::cpu::SPARSESERVE_ISA
