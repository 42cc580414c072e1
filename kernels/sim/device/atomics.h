// Atomics on global and shared memory, and fences: blocks of one grid run on several OS threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>

namespace sparseserve::sim {

// Stores update(old), returns old.
template <class T, class Update>
T atomic_update(T* address, Update update) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  std::atomic_ref<T> memory(*address);
  T old = memory.load();
  while (!memory.compare_exchange_weak(old, update(old))) {
  }
  return old;
}

}  // namespace sparseserve::sim

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return sparseserve::sim::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}

template <class T>
  requires std::is_integral_v<T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return sparseserve::sim::atomic_update(address, [=](T old) { return std::max(old, value); });
}

template <class T>
  requires std::is_integral_v<T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return sparseserve::sim::atomic_update(address, [=](T old) { return std::min(old, value); });
}

template <class T>
  requires std::is_integral_v<T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return sparseserve::sim::atomic_update(address, [=](T old) { return old | value; });
}

template <class T>
  requires std::is_integral_v<T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return sparseserve::sim::atomic_update(address, [=](T old) { return old & value; });
}

template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).exchange(value);
}

template <class T>
  requires std::is_integral_v<T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, value);
  return expected;
}

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() { std::atomic_signal_fence(std::memory_order_seq_cst); }
