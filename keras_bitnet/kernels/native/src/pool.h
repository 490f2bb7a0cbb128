// The library's own threads: callers bring tasks, and take part in running them.
#pragma once
#include <stdint.h>

namespace kbn {

using Task = void (*)(void* arg, int64_t index);

// Runs task(arg, i) for every i in [0, count) on the pool and the calling thread; returns when all
// are done. Any number of threads may call it at once.
void pool_run(int64_t count, Task task, void* arg);

int pool_threads();
void pool_set_threads(int count);

}  // namespace kbn
