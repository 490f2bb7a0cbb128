#include "adapter.h"

#include <atomic>
#include <vector>

#include "pool.h"

namespace {

// As many tasks for the pool as threads may work at a loop.
void run_limited(void* limit, int64_t count, void (*task)(void*, int64_t), void* argument) {
  const int64_t threads = *static_cast<int32_t*>(limit);
  kbn_adapter::Loop loop{{0}, count, task, argument};
  const auto work = [](void* loop, int64_t) { static_cast<kbn_adapter::Loop*>(loop)->work(); };
  kbn::pool_run(threads < count ? threads : count, work, &loop);
}

template <typename Problem>
const char* run_on(const Problem& problem, int32_t threads) {
  if (threads < 1 || threads >= kbn::pool_threads()) return kbn_adapter::run(problem, nullptr);
  kbn_parallel parallel{run_limited, &threads, threads};
  return kbn_adapter::run(problem, &parallel);
}

// Found without a lock, which a forked child might find taken.
struct Chain {
  int32_t number;
  std::vector<void*> operands;
};
constexpr int kChains = 256;
std::atomic<Chain*> chains[kChains];
std::atomic<uint32_t> chains_kept{0};

}  // namespace

const char* kbn_run_limited(const kbn_joint* problem, int32_t threads) {
  return run_on(*problem, threads);
}

const char* kbn_normalize_limited(const kbn_norm* problem, int32_t threads) {
  return run_on(*problem, threads);
}

const char* kbn_attend_limited(const kbn_attention* problem, int32_t threads) {
  return run_on(*problem, threads);
}

const char* kbn_decode_limited(const kbn_block* block, int32_t threads) {
  return run_on(*block, threads);
}

int32_t kbn_chain_keep(void* const* operands, int64_t blocks) {
  const auto serial = static_cast<int32_t>(chains_kept.fetch_add(1) % (INT32_MAX / kChains - 1)) + 1;
  auto* chain = new Chain{0, {operands, operands + blocks * kbn_adapter::kBlockOperands}};
  for (int place = 0; place < kChains; ++place) {
    Chain* none = nullptr;
    chain->number = serial * kChains + place;
    if (chains[place].compare_exchange_strong(none, chain)) return chain->number;
  }
  delete chain;
  return 0;
}

void kbn_chain_drop(int32_t number) {
  Chain* chain = chains[number % kChains].load();
  if (!chain || chain->number != number) return;
  chains[number % kChains].store(nullptr);
  delete chain;
}

void* const* kbn_chain_find(int32_t number, int64_t* blocks) {
  const Chain* chain = number > 0 ? chains[number % kChains].load() : nullptr;
  if (!chain || chain->number != number) return nullptr;
  *blocks = static_cast<int64_t>(chain->operands.size()) / kbn_adapter::kBlockOperands;
  return chain->operands.data();
}
