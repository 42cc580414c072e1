// New keys and values into the pages of their heads.
#include <algorithm>
#include <cstring>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace sparseserve::cpu {

namespace {

constexpr int64_t kTokens = 64;  // of an item

// Tokens [begin, begin + count) of a head, whose slots follow each other in one page.
template <class Bits>
void write_run(const WriteParams& p, int64_t head, int64_t begin, int64_t count) {
  const int64_t slot = p.slot_of(begin, head), page = slot / p.page_size, offset = slot % p.page_size;
  const int64_t in_page = p.places[2 * head + 1];
  const Bits* key = static_cast<const Bits*>(p.from_key.data) + begin * p.from_key.token_stride + head * p.from_key.head_stride;
  const Bits* value =
      static_cast<const Bits*>(p.from_value.data) + begin * p.from_value.token_stride + head * p.from_value.head_stride;
  Bits* to_key = static_cast<Bits*>(const_cast<void*>(p.key.data)) + page * p.key.page_stride +
                 in_page * p.key.head_stride + offset;
  Bits* to_value = static_cast<Bits*>(const_cast<void*>(p.value.data)) + page * p.value.page_stride +
                   in_page * p.value.head_stride + offset * p.head_dim;
  for (int64_t d = 0; d < p.head_dim; ++d)
    for (int64_t i = 0; i < count; ++i) to_key[d * p.page_size + i] = key[i * p.from_key.token_stride + d];
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(to_value + i * p.head_dim, value + i * p.from_value.token_stride, p.head_dim * sizeof(Bits));
}

template <class Bits>
void write_head(const WriteParams& p, int64_t head, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t slot = p.slot_of(begin, head);
    int64_t count = 1;
    while (slot >= 0 && begin + count < end && (slot + count) % p.page_size &&
           p.slot_of(begin + count, head) == slot + count)
      ++count;
    if (slot >= 0) write_run<Bits>(p, head, begin, count);
    begin += count;
  }
}

}  // namespace

void write_tokens(const WriteParams& params) {
  const int64_t blocks = (params.tokens + kTokens - 1) / kTokens, size = size_of(params.dtype);
  const int64_t bytes = 4 * params.tokens * params.heads * params.head_dim * size;
  for_each_item(blocks * params.heads, bytes, [&](int64_t i, int64_t) {
    const int64_t head = i / blocks, begin = i % blocks * kTokens, end = std::min(begin + kTokens, params.tokens);
    size == 2 ? write_head<uint16_t>(params, head, begin, end) : write_head<uint32_t>(params, head, begin, end);
  });
}

}  // namespace sparseserve::cpu
