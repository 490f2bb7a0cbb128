#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace kbn {
namespace {

// After its last task a worker looks out this long for another before it sleeps: the layers of a
// network follow one another within that time, and waking a thread costs tens of microseconds.
constexpr std::chrono::microseconds kPatience{100};

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// `idle` passes a little time each time that the condition does not hold.
template <typename Condition, typename Idle>
bool spin_until(Condition condition, Idle idle) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  do {
    for (int i = 0; i < 32; ++i) {
      if (condition()) return true;
      idle();
    }
    std::this_thread::yield();  // on a busy machine the other thread may need this very core
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// One call of `run`, on the stack of its caller. A helper begins with a task that is kept for it, as
// long as nobody else took it; then everybody grabs the next index until none is left.
struct Job {
  static constexpr int kMostKept = 64;

  Job* next_job = nullptr;  // guarded by the mutex of the pool
  Task task;
  void* arg;
  int64_t count;
  int kept;     // of the last tasks, one for each helper
  Ahead ahead;  // what helpers fetch when they are done
  std::atomic<int64_t> next{0};
  std::atomic<int> helpers{0};  // workers inside; they come and go under the mutex
  std::atomic<bool> taken[kMostKept] = {};  // of those that are kept, from the end

  Job(Task task, void* arg, int64_t count, int helpers, const Ahead& ahead)
      : task(task), arg(arg), count(count), ahead(ahead) {
    kept = helpers < kMostKept ? helpers : kMostKept;
  }
  bool exhausted() const { return next.load(std::memory_order_relaxed) >= count; }
  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      i < count - kept ? task(arg, i) : take_kept(count - 1 - i);
    }
  }
  void take_kept(int64_t i) {
    if (i < kept && !taken[i].exchange(true, std::memory_order_relaxed)) task(arg, count - 1 - i);
  }
};

// Fetches what is ahead of a worker into the cache of its core, some lines at a time.
class Fetcher {
 public:
  Fetcher(const Ahead& ahead, int worker)
      : at_(ahead.end - (worker + 1) * ahead.bytes),
        end_(at_ + (ahead.bytes < kMost ? ahead.bytes : kMost)) {}

  void step() {
    if (at_ >= end_) return relax();
    for (int line = 0; line < 16; ++line, at_ += 64) {
#if defined(__GNUC__)
      __builtin_prefetch(reinterpret_cast<const void*>(at_), 0, 2);
#endif
    }
  }

 private:
  static constexpr int64_t kMost = 512 << 10;  // leaves room in a second-level cache

  uintptr_t at_, end_;
};

class Pool {
 public:
  // Never destroyed: workers may still sleep in it while the process exits. A forked child has
  // none of the workers and maybe a locked mutex, so it starts over with a new pool.
  static Pool& get() {
    Pool* pool = instance_.load(std::memory_order_acquire);
    if (pool != nullptr) return *pool;
#if !defined(_WIN32)
    static const int registered = pthread_atfork(nullptr, nullptr, &forget);
    (void)registered;
#endif
    auto* created = new Pool;
    if (instance_.compare_exchange_strong(pool, created)) return *created;
    delete created;  // another thread was faster
    return *pool;
  }

  int threads() const { return threads_.load(std::memory_order_relaxed); }

  void set_threads(int count) {
    requested_threads_.store(count, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      threads_.store(count, std::memory_order_relaxed);
    }
    wake_.notify_all();  // those too many leave
  }

  void run(int64_t count, Task task, void* arg, const Ahead& ahead) {
    const int helpers = static_cast<int>(count < threads() ? count : threads()) - 1;
    Job job(task, arg, count, helpers, ahead);
    if (helpers < 1) return job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start_workers();
      Job** last = &jobs_;
      while (*last != nullptr) last = &(*last)->next_job;
      *last = &job;
      posted_.fetch_add(1, std::memory_order_relaxed);
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      remove(&job);  // from here on no worker joins
    }
    const auto done = [&job] { return job.helpers.load(std::memory_order_acquire) == 0; };
    if (!spin_until(done, relax)) {
      std::unique_lock<std::mutex> lock(mutex_);
      finished_.wait(lock, done);
    }
  }

 private:
  Pool() {
    int count = requested_threads_.load(std::memory_order_relaxed);
    threads_.store(count > 0 ? count : default_threads(), std::memory_order_relaxed);
  }

  static void forget() { instance_.store(nullptr, std::memory_order_release); }

  static int default_threads() {
    const char* text = std::getenv("KERAS_BITNET_NUM_THREADS");
    int count = text != nullptr ? std::atoi(text) : 0;
#if defined(__linux__)
    cpu_set_t allowed;
    if (count < 1 && sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
      count = CPU_COUNT(&allowed);
    }
#endif
    if (count < 1) count = static_cast<int>(std::thread::hardware_concurrency());
    return count < 1 ? 1 : count;
  }

  void start_workers() {
    while (workers_ < threads() - 1) {
      try {
        std::thread([this, worker = workers_] { work(worker); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: fewer helpers, the same result
      }
      ++workers_;
    }
  }

  void remove(Job* job) {
    for (Job** link = &jobs_; *link != nullptr; link = &(*link)->next_job) {
      if (*link == job) {
        *link = job->next_job;
        return;
      }
    }
  }

  Job* first_with_work() {
    Job* job = jobs_;
    while (job != nullptr && job->exhausted()) job = job->next_job;
    return job;
  }

  void work(int worker) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (Ahead ahead;;) {
      if (workers_ > threads() - 1) break;
      Job* job = first_with_work();
      if (job == nullptr) {
        const uint32_t seen = posted_.load(std::memory_order_relaxed);
        lock.unlock();
        Fetcher fetcher(ahead, worker);
        spin_until([&] { return posted_.load(std::memory_order_relaxed) != seen; },
                   [&] { fetcher.step(); });
        ahead = {};
        lock.lock();
        wake_.wait(lock, [this] { return first_with_work() || workers_ > threads() - 1; });
        continue;
      }
      job->helpers.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job->take_kept(worker);
      job->work();
      ahead = job->ahead;
      lock.lock();
      // The job may be gone right after this.
      if (job->helpers.fetch_sub(1, std::memory_order_release) == 1) finished_.notify_all();
    }
    --workers_;
  }

  static std::atomic<Pool*> instance_;
  static std::atomic<int> requested_threads_;  // outlives a fork; 0: not set

  std::mutex mutex_;
  std::condition_variable wake_;      // for workers
  std::condition_variable finished_;  // for callers
  Job* jobs_ = nullptr;
  int workers_ = 0;
  std::atomic<uint32_t> posted_{0};  // jobs so far
  std::atomic<int> threads_;
};

std::atomic<Pool*> Pool::instance_{nullptr};
std::atomic<int> Pool::requested_threads_{0};

}  // namespace

void pool_run(int64_t count, Task task, void* arg, const Ahead& ahead) {
  Pool::get().run(count, task, arg, ahead);
}
int pool_threads() { return Pool::get().threads(); }
void pool_set_threads(int count) { Pool::get().set_threads(count < 1 ? 1 : count); }

}  // namespace kbn
