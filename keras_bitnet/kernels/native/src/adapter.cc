#include "adapter.h"

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
