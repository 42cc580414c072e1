// What the threads of a stuck block wait in.
#include <cstdio>
#include <cstring>

#include "block.h"

namespace sparseserve::sim {

namespace {

// Threads that wait in the same operation at the same place.
struct Group {
  const Thread* sample;
  std::vector<unsigned> threads;

  bool fits(const Thread& thread) const {
    return sample->mask == thread.mask && sample->where.line() == thread.where.line() &&
           std::strcmp(sample->operation, thread.operation) == 0;
  }
};

// "3", "0-31" or "0-31, 40, 42-43".
std::string ranges(const std::vector<unsigned>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t end = i + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    if (!text.empty()) text += ", ";
    text += std::to_string(numbers[i]);
    if (end > i + 1) text += "-" + std::to_string(numbers[end - 1]);
    i = end;
  }
  return text;
}

std::string describe(const Group& group) {
  const Thread& thread = *group.sample;
  std::string text = "\n  threads " + ranges(group.threads) + " in " + thread.operation;
  if (thread.mask) {
    char mask[32];
    std::snprintf(mask, sizeof mask, " of mask 0x%08x", thread.mask);
    text += mask;
  }
  return text + " at " + thread.where.file_name() + ":" + std::to_string(thread.where.line());
}

}  // namespace

std::string describe_waits(const std::vector<Thread>& threads, const std::vector<Warp>& warps) {
  std::vector<Group> groups;
  unsigned exited = 0;
  for (unsigned i = 0; i < threads.size(); ++i) {
    const Warp& warp = warps[i / kWarpSize];
    const uint32_t bit = 1u << i % kWarpSize;
    exited += !(warp.live & bit);
    if (!(warp.live & ~warp.runnable & bit)) continue;
    size_t g = 0;
    while (g < groups.size() && !groups[g].fits(threads[i])) ++g;
    if (g == groups.size()) groups.push_back({&threads[i], {}});
    groups[g].threads.push_back(i);
  }
  std::string text = " is stuck: its threads wait for each other in different operations";
  for (const Group& group : groups) text += describe(group);
  if (exited) text += "\n  " + std::to_string(exited) + " threads have exited";
  return text;
}

}  // namespace sparseserve::sim
