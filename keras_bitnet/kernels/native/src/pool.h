// The library's own threads: callers bring tasks, and take part in running them.
#pragma once
#include <stdint.h>

#include "bitnet.h"

namespace kbn {

using Task = void (*)(void* arg, int64_t index);

// What a thread that waits for the next job fetches meanwhile: the i-th one the i-th `bytes` before
// `end`. Nothing is read, so the memory may be gone.
struct Ahead {
  uintptr_t end = 0;
  int64_t bytes = 0;
};

// Runs task(arg, i) for every i in [0, count) on the pool and the calling thread; returns when all
// are done. Any number of threads may call it at once. The i-th helper begins with the i-th task from
// the end, and when all are done fetches `ahead`.
void pool_run(int64_t count, Task task, void* arg, const Ahead& ahead = {});

// Runs with(i) for every i in [0, count) on the threads of `parallel`, or where it is null on the pool;
// in this thread alone where it is all too little to wake another.
template <typename Do>
void run_tasks(const kbn_parallel* parallel, bool alone, int64_t count, const Do& with,
               const Ahead& ahead = {}) {
  const Task task = [](void* arg, int64_t i) { (*static_cast<const Do*>(arg))(i); };
  void* arg = const_cast<Do*>(&with);
  if (alone || count < 2) {
    for (int64_t i = 0; i < count; ++i) with(i);
  } else if (parallel) {
    parallel->run(parallel->context, count, task, arg);
  } else {
    pool_run(count, task, arg, ahead);
  }
}

int pool_threads();
void pool_set_threads(int count);

}  // namespace kbn
