// What device code asks of the engine that runs it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace sparseserve::sim {

constexpr unsigned kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffff;

using Location = std::source_location;

// Who said yes, and who was asked: counts in a block, bits of lanes in a warp.
struct Votes {
  unsigned yes;
  unsigned all;
};

// Does a warp operation for all lanes at once. operands[lane] is null for a lane that takes no part.
using Complete = void (*)(void* const* operands);

unsigned current_lane();
// Waits for all running threads of the block.
Votes wait_for_block(const char* operation, bool vote, const Location& where);
// Waits for all running lanes of the mask; the last one to come completes the operation.
void wait_for_lanes(const char* operation, uint32_t mask, void* operand, Complete complete, const Location& where);

// The variable's place in this block's shared memory, full of NaN when the block first asks. No better aligned than it
// has to be, or a wider access would go unnoticed.
void* shared_memory(const void* variable, size_t bytes, size_t align, const Location& where);
// What the launch asked for, aligned to 16.
void* dynamic_shared_memory(const Location& where = Location::current());

// An asynchronous copy of 16 bytes, of zeros without a source: the target is NaN until the thread has waited for it.
void start_copy(void* target, const void* source, const Location& where);
void commit_copies();
void finish_copies(int groups_left);

// Ends the launch with an error. Does not return, but is not declared so: AddressSanitizer would clean up a stack that
// it does not know.
[[gnu::format(printf, 2, 3)]] void fail(const Location& where, const char* format, ...);

// The operands of a warp operation.
template <class Operand>
class Lanes {
 public:
  explicit Lanes(void* const* operands) : operands_(operands) {}

  Operand* operator[](unsigned lane) const { return static_cast<Operand*>(operands_[lane]); }
  bool all() const {
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
      if (!operands_[lane]) return false;
    return true;
  }

 private:
  void* const* operands_;
};

// Waits for the lanes of the mask; complete(lanes) is to fill in the results in the operands.
template <class Operand, class Function>
void together(const char* operation, uint32_t mask, Operand& operand, Function, const Location& where) {
  const auto complete = [](void* const* operands) { Function()(Lanes<Operand>(operands)); };
  wait_for_lanes(operation, mask, &operand, complete, where);
}

// One variable per place in the source: every `place` has a type of its own.
template <class T, class Place>
T& shared_variable(Place, const Location& where = Location::current()) {
  static char variable;
  return *static_cast<T*>(shared_memory(&variable, sizeof(T), alignof(T), where));
}

}  // namespace sparseserve::sim
