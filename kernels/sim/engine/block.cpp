#include "block.h"

#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "../device/index.h"

constinit thread_local uint3 threadIdx{}, blockIdx{};
constinit thread_local dim3 blockDim, gridDim;

namespace sparseserve::sim {

namespace {

constexpr int kPoison = 0xff;  // NaN in every floating-point format
constexpr size_t kCopyBytes = 16;

[[gnu::tls_model("initial-exec")]] constinit thread_local Block* running = nullptr;

bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool same_place(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() && same_text(a.file_name(), b.file_name());
}

uint64_t mix(uint64_t x) {  // splitmix64
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kCopyBytes == 0; }

uint3 place_of(uint64_t number, const dim3& shape) {
  return {static_cast<unsigned>(number % shape.x), static_cast<unsigned>(number / shape.x % shape.y),
          static_cast<unsigned>(number / shape.x / shape.y)};
}

}  // namespace

Block::Block() : shared_(std::make_unique_for_overwrite<SharedMemory>()) {
  ASAN_POISON_MEMORY_REGION(shared_->bytes, sizeof shared_->bytes);
}

void Block::load(const Grid& grid) {
  grid_ = &grid;
  const unsigned count = grid.threads.x * grid.threads.y * grid.threads.z;
  threads_.resize(count);
  warps_.resize((count + kWarpSize - 1) / kWarpSize);
  for (unsigned i = 0; i < count; ++i) threads_[i].index = place_of(i, grid.threads);
}

std::string Block::run(uint64_t number) {
  const auto count = static_cast<unsigned>(threads_.size());
  for (unsigned w = 0; w < warps_.size(); ++w) {
    const unsigned left = count - w * kWarpSize;
    const uint32_t lanes = left < kWarpSize ? (1u << left) - 1 : kAllLanes;
    warps_[w] = {.live = lanes, .runnable = lanes, .waiting = 0};
  }
  live_ = count;
  arrived_ = yes_ = 0;
  ASAN_POISON_MEMORY_REGION(shared_->bytes, shared_used_);
  shared_used_ = 0;
  variables_.clear();
  random_ = mix(grid_->seed) + number;
  blockIdx = place_of(number, grid_->blocks);
  blockDim = grid_->threads;
  gridDim = grid_->blocks;
  thread_index_ = &threadIdx;
  running = this;
  go_on(main_);
  return live_ ? recover() : std::string();
}

// Back here with threads left: they wait for each other, or one has failed. Nothing on their stacks is needed any more.
std::string Block::recover() {
  std::string report = failure_.empty() ? describe_waits(threads_, warps_) : failure_;
  failure_.clear();
  char place[64];
  std::snprintf(place, sizeof place, "block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
  report.insert(0, place);
  for (Thread& thread : threads_) {
    thread.context = nullptr;
    thread.copies.clear();
    thread.groups = 0;
  }
  idle_.clear();
  for (auto& context : contexts_) {
    context->restart(enter);
    idle_.push_back(context.get());
  }
  return report;
}

void Block::enter() { running->work(); }

void Block::work() {
  Context& self = *threads_[current_].context;
  for (;;) {
    grid_->run(grid_->call);
    exit_thread();
    idle_.push_back(&self);  // may be taken at once, by a thread that has not started
    go_on(self);
  }
}

void Block::exit_thread() {
  Thread& self = threads_[current_];
  self.context = nullptr;
  self.copies.clear();
  self.groups = 0;
  const unsigned w = current_ / kWarpSize;
  Warp& warp = warps_[w];
  warp.live &= ~(1u << lane());
  warp.runnable &= warp.live;
  --live_;
  if (live_ && arrived_ == live_) release_block();
  for (uint32_t lanes = warp.waiting; lanes; lanes &= lanes - 1)
    complete_if_all(w, threads_[w * kWarpSize + std::countr_zero(lanes)].mask);
}

Context* Block::idle_context() {
  if (idle_.empty()) {
    contexts_.push_back(std::make_unique<Context>(static_cast<unsigned>(contexts_.size())));
    contexts_.back()->restart(enter);
    return contexts_.back().get();
  }
  Context* context = idle_.back();
  idle_.pop_back();
  return context;
}

uint64_t Block::random() { return mix(random_ += 0x9e3779b97f4a7c15); }

// Chooses the current thread; false when none can go on. Always the lowest (or highest) one: a warp runs on until it
// has to wait for another one, which keeps its stacks in the cache.
bool Block::pick() {
  const Order order = grid_->order;
  const auto count = static_cast<unsigned>(warps_.size());
  const uint64_t chance = order == Order::kRandom ? random() : 0;
  for (unsigned i = 0; i < count; ++i) {
    const unsigned w = order == Order::kForward    ? i
                       : order == Order::kBackward ? count - 1 - i
                                                   : (i + (chance >> 32)) % count;
    const uint32_t lanes = warps_[w].runnable;
    if (!lanes) continue;
    const int shift = static_cast<int>(chance % kWarpSize);
    const unsigned lane = order == Order::kBackward ? kWarpSize - 1 - std::countl_zero(lanes)
                                                    : (std::countr_zero(std::rotr(lanes, shift)) + shift) % kWarpSize;
    current_ = w * kWarpSize + lane;
    return true;
  }
  return false;
}

// Leaves `self` for the next thread, or for whoever runs the block when there is none.
void Block::go_on(Context& self) {
  Context* next = &main_;
  if (pick()) {
    Thread& thread = threads_[current_];
    if (!thread.context) thread.context = idle_context();
    *thread_index_ = thread.index;
    next = thread.context;
  }
  if (next != &self) self.switch_to(*next);
}

Thread& Block::begin_wait(const char* operation, uint32_t mask, const Location& where) {
  Thread& self = threads_[current_];
  self.operation = operation;
  self.where = where;
  self.mask = mask;
  warps_[current_ / kWarpSize].runnable &= ~(1u << lane());
  return self;
}

Votes Block::wait_for_block(const char* operation, bool vote, const Location& where) {
  Thread& self = begin_wait(operation, 0, where);
  if (arrived_ == 0) first_ = &self;
  // The barrier of another branch: a GPU may or may not get away with it.
  if (!same_text(operation, first_->operation) || !same_place(where, first_->where)) stop();
  yes_ += vote;
  if (++arrived_ == live_) release_block();
  go_on(*self.context);
  return votes_;
}

void Block::release_block() {
  votes_ = {yes_, arrived_};
  arrived_ = yes_ = 0;
  for (Warp& warp : warps_) warp.runnable = warp.live;
}

void Block::wait_for_lanes(const char* operation, uint32_t mask, void* operand, Complete complete,
                           const Location& where) {
  if (!(mask >> lane() & 1)) return sim::fail(where, "%s: mask 0x%08x is without its lane %u", operation, mask, lane());
  Thread& self = begin_wait(operation, mask, where);
  self.operand = operand;
  self.complete = complete;
  const unsigned w = current_ / kWarpSize;
  warps_[w].waiting |= 1u << lane();
  complete_if_all(w, mask);
  go_on(*self.context);
}

// Does the operation of the mask's lanes once all of them wait in it. Lanes that disagree are left to wait for ever.
void Block::complete_if_all(unsigned w, uint32_t mask) {
  Warp& warp = warps_[w];
  const uint32_t lanes = mask & warp.live;
  if ((warp.waiting & lanes) != lanes) return;
  const Thread* threads = &threads_[w * kWarpSize];
  const Thread& first = threads[std::countr_zero(lanes)];
  void* operands[kWarpSize] = {};
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    const Thread& thread = threads[lane];
    const bool agrees = thread.complete == first.complete && same_text(thread.operation, first.operation);
    if (thread.mask != mask || !agrees) return;
    operands[lane] = thread.operand;
  }
  warp.waiting &= ~lanes;
  warp.runnable |= lanes;
  first.complete(operands);
}

void* Block::shared(const void* variable, size_t bytes, size_t align, const Location& where) {
  for (const Variable& known : variables_)
    if (known.key == variable) return known.data;
  // A gap before and after every variable, of which AddressSanitizer knows.
  const size_t room = (bytes / kSharedAlign + 3) * kSharedAlign;
  if (shared_used_ + room > sizeof shared_->bytes) fail(where, "no shared memory left");
  void* data = shared_->bytes + shared_used_ + align;
  ASAN_UNPOISON_MEMORY_REGION(data, bytes);
  std::memset(data, kPoison, bytes);
  shared_used_ += room;
  variables_.push_back({variable, data});
  return data;
}

void Block::start_copy(void* target, const void* source, const Location& where) {
  if (!aligned(target) || !aligned(source)) fail(where, "copy_async16: an address is not a multiple of 16");
  const std::byte* byte = static_cast<std::byte*>(target);
  if (byte < shared_->bytes || byte >= shared_->bytes + shared_used_)
    fail(where, "copy_async16: the target is not in shared memory");
  Thread& self = threads_[current_];
  Copy copy{target, {}, self.groups};
  if (source) std::memcpy(&copy.data, source, kCopyBytes);
  std::memset(target, kPoison, kCopyBytes);
  self.copies.push_back(copy);
}

void Block::finish_copies(int groups_left) {
  Thread& self = threads_[current_];
  auto copy = self.copies.begin();
  for (; copy != self.copies.end() && copy->group < self.groups - groups_left; ++copy)
    std::memcpy(copy->target, &copy->data, kCopyBytes);
  self.copies.erase(self.copies.begin(), copy);
}

void Block::fail(const Location& where, const char* what) {
  const uint3& thread = threads_[current_].index;
  char place[64];
  std::snprintf(place, sizeof place, ", thread (%u, %u, %u) at ", thread.x, thread.y, thread.z);
  failure_.append(place).append(where.file_name()).append(":").append(std::to_string(where.line()));
  failure_.append(": ").append(what);
  stop();
}

unsigned current_lane() { return running->lane(); }

Votes wait_for_block(const char* operation, bool vote, const Location& where) {
  return running->wait_for_block(operation, vote, where);
}

void wait_for_lanes(const char* operation, uint32_t mask, void* operand, Complete complete, const Location& where) {
  running->wait_for_lanes(operation, mask, operand, complete, where);
}

void* shared_memory(const void* variable, size_t bytes, size_t align, const Location& where) {
  return running->shared(variable, bytes, align, where);
}

void* dynamic_shared_memory(const Location& where) { return running->dynamic_shared(where); }

void start_copy(void* target, const void* source, const Location& where) {
  running->start_copy(target, source, where);
}

void commit_copies() { running->commit_copies(); }

void finish_copies(int groups_left) { running->finish_copies(groups_left); }

void fail(const Location& where, const char* format, ...) {
  char what[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  running->fail(where, what);
}

}  // namespace sparseserve::sim
