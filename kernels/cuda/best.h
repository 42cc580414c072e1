// The best of many scores: a block finds the key of the last one to take, digit by digit, then takes those above it and
// the first of its equals, in ascending order.
#pragma once

#include "fragments.h"

namespace sparseserve::cuda {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
constexpr int kBatch = 4;  // keys that a thread asks for at once

// Larger for a better score. NaN counts as -inf, and -0 ties with +0.
__device__ __forceinline__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score == score ? score + 0.f : -INFINITY);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000);
}

template <int Threads>
struct alignas(16) BestShared {
  static constexpr int kWarps = Threads / 32;
  int histogram[kDigits];
  uint32_t digit;
  int rank;
  int above[kWarps], equal[kWarps];
};

// The `rank`-th largest of the keys key(0) to key(count - 1), rank >= 1; leaves in `rank` its rank among equal keys.
template <int Threads, class Key>
__device__ uint32_t nth_largest(int count, int& rank, Key key, BestShared<Threads>& shared) {
  const int lane = threadIdx.x % 32;
  uint32_t prefix = 0;
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    const uint64_t higher = ~uint64_t{0} << (shift + kDigitBits);
    for (int i = threadIdx.x; i < kDigits; i += Threads) shared.histogram[i] = 0;
    __syncthreads();
    for (int begin = threadIdx.x; begin < count; begin += Threads * kBatch) {
      uint32_t x[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) x[i] = key(min(begin + i * Threads, count - 1));
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (begin + i * Threads < count && ((x[i] ^ prefix) & higher) == 0)
          atomicAdd(&shared.histogram[x[i] >> shift & (kDigits - 1)], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      constexpr int kEach = kDigits / 32;
      int own = 0;
      for (int i = 0; i < kEach; ++i) own += shared.histogram[lane * kEach + i];
      int from_here = own;  // keys in this lane's digits and higher ones
      for (int step = 1; step < 32; step *= 2) {
        const int more = __shfl_down_sync(kAllLanes, from_here, step);
        if (lane + step < 32) from_here += more;
      }
      int left = rank - (from_here - own);
      if (left > 0 && left <= own) {
        int digit = lane * kEach + kEach - 1;
        for (; left > shared.histogram[digit]; --digit) left -= shared.histogram[digit];
        shared.digit = digit;
        shared.rank = left;
      }
    }
    __syncthreads();
    prefix |= shared.digit << shift;
    rank = shared.rank;
    __syncthreads();
  }
  return prefix;
}

// kind(i) of i in [0, count) is 2 above the threshold, 1 for its equals, 0 for others. Calls write(at, i) for all above
// and the first `equals` of the equals, ascending, `at` counting from 0; returns how many.
template <int Threads, class Kind, class Write>
__device__ int write_taken(int count, int equals, Kind kind, Write write, BestShared<Threads>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned before = (1u << lane) - 1;
  int above = 0, equal = 0;  // in the rounds before
  for (int begin = 0; begin < count; begin += Threads * kBatch) {
    const int mine = begin + warp * 32 * kBatch + lane;
    unsigned greater[kBatch], same[kBatch];
    int own[kBatch], greaters = 0, sames = 0;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) own[b] = mine + 32 * b < count ? kind(mine + 32 * b) : 0;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      greater[b] = __ballot_sync(kAllLanes, own[b] == 2), same[b] = __ballot_sync(kAllLanes, own[b] == 1);
      greaters += __popc(greater[b]), sames += __popc(same[b]);
    }
    if (lane == 0) shared.above[warp] = greaters, shared.equal[warp] = sames;
    __syncthreads();
    int my_above = above, my_equal = equal;
    for (int w = 0; w < shared.kWarps; ++w) {
      if (w < warp) my_above += shared.above[w], my_equal += shared.equal[w];
      above += shared.above[w], equal += shared.equal[w];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int over = my_above + __popc(greater[b] & before), like = my_equal + __popc(same[b] & before);
      if (own[b] == 2 || (own[b] == 1 && like < equals)) write(over + min(like, equals), mine + 32 * b);
      my_above += __popc(greater[b]), my_equal += __popc(same[b]);
    }
    __syncthreads();
  }
  return above + min(equal, equals);
}

// Calls write(at, i) for those of the `most` largest keys, 1 <= most <= count, ascending; of equal keys the first.
template <int Threads, class Key, class Write>
__device__ void write_best(int count, int most, Key key, Write write, BestShared<Threads>& shared) {
  int equals = most;
  const uint32_t threshold = nth_largest(count, equals, key, shared);
  const auto kind = [&](int i) {
    const uint32_t x = key(i);
    return x > threshold ? 2 : x == threshold ? 1 : 0;
  };
  write_taken(count, equals, kind, write, shared);
}

}  // namespace sparseserve::cuda
