// Cuts a norm in rows and has a table of kernels run them.
#include "driver.h"
#include "pool.h"

namespace kbn {

void run(const kbn_norm& problem, const Kernels& kernels, const kbn_parallel* parallel) {
  constexpr int64_t kSmall = 1 << 16;  // numbers not worth waking a thread for
  const kbn_norm& p = problem;
  run_tasks(parallel, p.rows * p.features < kSmall, p.rows, [&](int64_t row) {
    const int64_t at = row * p.features * size_of(p.dtype);
    kernels.normalize(static_cast<const char*>(p.x) + at, p.scale, p.dtype, p.features, p.epsilon,
                      static_cast<char*>(p.y) + at);
  });
}

}  // namespace kbn
