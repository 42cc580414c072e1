// Operations of a warp.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../engine/engine.h"

namespace sparseserve::sim {

inline void __syncwarp(unsigned mask = kAllLanes, Location where = Location::current()) {
  const auto complete = [](void* const*) {};
  wait_for_lanes("__syncwarp", mask, &mask, complete, where);
}

template <class T>
T shuffle(const char* operation, unsigned mask, T value, unsigned source, const Location& where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  struct Operand {
    T value, result;
    unsigned source;
    bool found;
  } operand{value, value, source, false};
  const auto complete = [](Lanes<Operand> lanes) {
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (!lanes[i]) continue;
      const Operand* from = lanes[lanes[i]->source];
      lanes[i]->found = from;
      if (from) lanes[i]->result = from->value;
    }
  };
  together(operation, mask, operand, complete, where);
  if (!operand.found) fail(where, "%s: lane %u, which it reads, takes no part", operation, source);
  return operand.result;
}

// `width` cuts the warp into groups; this is the first lane of the one that `lane` is in.
inline unsigned group_of(unsigned lane, int width) { return lane & ~(width - 1u); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = kWarpSize, Location where = Location::current()) {
  const unsigned group = group_of(current_lane(), width);
  return shuffle("__shfl_sync", mask, value, group + (source & (width - 1u)), where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = kWarpSize, Location where = Location::current()) {
  const unsigned lane = current_lane(), group = group_of(lane, width);
  return shuffle("__shfl_up_sync", mask, value, lane - group >= delta ? lane - delta : lane, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = kWarpSize,
                   Location where = Location::current()) {
  const unsigned lane = current_lane(), group = group_of(lane, width);
  const bool inside = lane - group + delta < static_cast<unsigned>(width);
  return shuffle("__shfl_down_sync", mask, value, inside ? lane + delta : lane, where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = kWarpSize, Location where = Location::current()) {
  const unsigned lane = current_lane(), source = lane ^ bits;
  const bool visible = source < group_of(lane, width) + width;  // the groups before are, those behind are not
  return shuffle("__shfl_xor_sync", mask, value, visible ? source : lane, where);
}

// What all lanes of a mask give, combined.
template <class T, class Combine>
T reduce(const char* operation, unsigned mask, T value, Combine, const Location& where) {
  const auto complete = [](Lanes<T> lanes) {
    T* result = nullptr;
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (lanes[i] && result) *result = Combine()(*result, *lanes[i]);
      if (!result) result = lanes[i];
    }
    for (unsigned i = 0; i < kWarpSize; ++i)
      if (lanes[i]) *lanes[i] = *result;
  };
  together(operation, mask, value, complete, where);
  return value;
}

inline Votes vote(const char* operation, unsigned mask, int yes, const Location& where) {
  const unsigned lane = 1u << current_lane();
  const auto both = [](Votes a, Votes b) { return Votes{a.yes | b.yes, a.all | b.all}; };
  return reduce(operation, mask, Votes{yes ? lane : 0, lane}, both, where);
}

inline unsigned __ballot_sync(unsigned mask, int yes, Location where = Location::current()) {
  return vote("__ballot_sync", mask, yes, where).yes;
}

inline int __any_sync(unsigned mask, int yes, Location where = Location::current()) {
  return vote("__any_sync", mask, yes, where).yes != 0;
}

inline int __all_sync(unsigned mask, int yes, Location where = Location::current()) {
  const Votes votes = vote("__all_sync", mask, yes, where);
  return votes.yes == votes.all;
}

template <class T>
concept Word = std::is_same_v<T, int> || std::is_same_v<T, unsigned>;

template <Word T>
T __reduce_add_sync(unsigned mask, T value, Location where = Location::current()) {
  const auto add = [](T a, T b) { return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b)); };
  return reduce("__reduce_add_sync", mask, value, add, where);
}

template <Word T>
T __reduce_min_sync(unsigned mask, T value, Location where = Location::current()) {
  return reduce("__reduce_min_sync", mask, value, [](T a, T b) { return std::min(a, b); }, where);
}

template <Word T>
T __reduce_max_sync(unsigned mask, T value, Location where = Location::current()) {
  return reduce("__reduce_max_sync", mask, value, [](T a, T b) { return std::max(a, b); }, where);
}

}  // namespace sparseserve::sim

using sparseserve::sim::__all_sync, sparseserve::sim::__any_sync, sparseserve::sim::__ballot_sync;
using sparseserve::sim::__reduce_add_sync, sparseserve::sim::__reduce_max_sync, sparseserve::sim::__reduce_min_sync;
using sparseserve::sim::__shfl_down_sync, sparseserve::sim::__shfl_sync, sparseserve::sim::__shfl_up_sync,
    sparseserve::sim::__shfl_xor_sync;
using sparseserve::sim::__syncwarp;
