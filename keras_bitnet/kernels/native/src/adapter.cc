#include "adapter.h"

#include <atomic>

#include "pool.h"

namespace {

// A loop that only so many threads work at: as many tasks for the pool, each of which takes
// indices until none is left.
struct LimitedLoop {
  std::atomic<int64_t> next{0};
  int64_t count;
  void (*task)(void*, int64_t);
  void* argument;

  static void work(void* loop, int64_t) {
    auto* self = static_cast<LimitedLoop*>(loop);
    for (int64_t i; (i = self->next.fetch_add(1, std::memory_order_relaxed)) < self->count;)
      self->task(self->argument, i);
  }
};

void run_limited(void* limit, int64_t count, void (*task)(void*, int64_t), void* argument) {
  const int64_t threads = *static_cast<int32_t*>(limit);
  LimitedLoop loop{{0}, count, task, argument};
  kbn::pool_run(threads < count ? threads : count, LimitedLoop::work, &loop);
}

template <typename Problem>
const char* run_on(const Problem& problem, int32_t threads) {
  if (threads < 1 || threads >= kbn::pool_threads()) return kbn_adapter::run(problem, nullptr);
  kbn_parallel parallel{run_limited, &threads, threads};
  return kbn_adapter::run(problem, &parallel);
}

}  // namespace

const char* kbn_run_limited(const kbn_matmul* problem, int32_t threads) {
  return run_on(*problem, threads);
}

const char* kbn_normalize_limited(const kbn_norm* problem, int32_t threads) {
  return run_on(*problem, threads);
}

const char* kbn_attend_limited(const kbn_attention* problem, int32_t threads) {
  return run_on(*problem, threads);
}
