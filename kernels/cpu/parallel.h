// Work items over the caller's thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace sparseserve::cpu {

// Provided by the bindings, so that the kernels run in torch's own threads.
int pool_threads();
void pool_run(int workers, void (*work)(void*), void* context);

// Less than this is done sooner by one thread than by waking a second.
constexpr int64_t kBytesPerWorker = 64 << 10;

// Calls item(i, next) for i in [0, count), in any order and thread; `next` is the item that the thread does after i, or
// -1. `bytes` is what all items together touch. Threads draw items one by one: on a shared machine a static split would
// wait for the slowest.
template <class Item>
void for_each_item(int64_t count, int64_t bytes, const Item& item) {
  struct Context {
    std::atomic<int64_t> drawn{0};
    int64_t count;
    const Item* item;
  } context;
  context.count = count;
  context.item = &item;
  const auto work = [](void* opaque) {
    auto& c = *static_cast<Context*>(opaque);
    int64_t i = c.drawn.fetch_add(1, std::memory_order_relaxed);
    while (i < c.count) {
      const int64_t next = c.drawn.fetch_add(1, std::memory_order_relaxed);
      (*c.item)(i, next < c.count ? next : -1);
      i = next;
    }
  };
  const int64_t useful = std::min(count, bytes / kBytesPerWorker);
  const int64_t workers = useful <= 1 ? 1 : std::min<int64_t>(useful, pool_threads());
  if (workers <= 1) {
    work(&context);
  } else {
    pool_run(static_cast<int>(workers), work, &context);
  }
}

// A buffer that only grows: fresh pages from the system would cost more than the kernels they serve.
template <class T>
class Scratch {
 public:
  T* get(int64_t size) {
    if (size > size_) {
      data_.reset(static_cast<T*>(::operator new[](size * sizeof(T), kAlign)));
      size_ = size;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Delete {
    void operator()(T* data) const { ::operator delete[](data, kAlign); }
  };
  std::unique_ptr<T[], Delete> data_;
  int64_t size_ = 0;
};

}  // namespace sparseserve::cpu
