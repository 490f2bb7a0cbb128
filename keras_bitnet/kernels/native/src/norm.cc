// Cuts a norm in rows and has a table of kernels run them.
#include "driver.h"
#include "pool.h"

namespace kbn {

void run(const kbn_norm& problem, const Kernels& kernels, const kbn_parallel* parallel) {
  constexpr int64_t kSmall = 1 << 16;  // numbers not worth waking a thread for
  struct Rows {
    const kbn_norm& p;
    const Kernels& kernels;

    static void normalize(void* self, int64_t row) {
      const auto& [p, kernels] = *static_cast<Rows*>(self);
      const int64_t at = row * p.features * size_of(p.dtype);
      kernels.normalize(static_cast<const char*>(p.x) + at, p.scale, p.dtype, p.features, p.epsilon,
                        static_cast<char*>(p.y) + at);
    }
  } rows{problem, kernels};
  const bool alone = problem.rows * problem.features < kSmall;
  run_tasks(parallel, alone, problem.rows, Rows::normalize, &rows);
}

}  // namespace kbn
