// Barriers of a block, and waiting for other blocks.
#pragma once

#include <thread>

#include "../engine/engine.h"

namespace sparseserve::sim {

inline void __syncthreads(Location where = Location::current()) { wait_for_block("__syncthreads", false, where); }

inline int __syncthreads_or(int vote, Location where = Location::current()) {
  return wait_for_block("__syncthreads_or", vote, where).yes > 0;
}

inline int __syncthreads_and(int vote, Location where = Location::current()) {
  const Votes votes = wait_for_block("__syncthreads_and", vote, where);
  return votes.yes == votes.all;
}

inline int __syncthreads_count(int vote, Location where = Location::current()) {
  return static_cast<int>(wait_for_block("__syncthreads_count", vote, where).yes);
}

}  // namespace sparseserve::sim

inline void __nanosleep(unsigned) { std::this_thread::yield(); }

using sparseserve::sim::__syncthreads, sparseserve::sim::__syncthreads_and, sparseserve::sim::__syncthreads_count,
    sparseserve::sim::__syncthreads_or;
