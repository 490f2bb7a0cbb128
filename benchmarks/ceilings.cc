// The ceilings of a machine that a low-bit matmul runs into: reads of memory that no cache holds,
// and the peak of `vpdpbusd`, register to register. `native_core.cc` and `cpu_matmul.py` use it.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace {

constexpr size_t kSlice = size_t(4) << 20;  // bytes of one timed read
constexpr int kSamples = 60;

double quartile(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 4];
}

// Seconds of each slice of the calling thread while all threads run slices: run(thread, slice).
std::vector<double> time_slices(int threads, const std::function<void(int, int)>& run) {
  std::vector<std::thread> others;
  std::vector<double> times;
  std::atomic<bool> done{false};
  for (int i = 1; i < threads; ++i) {
    others.emplace_back([&, i] { for (int slice = 0; !done; ++slice) run(i, slice); });
  }
  for (int slice = 0; slice < kSamples; ++slice) {
    const auto begin = std::chrono::steady_clock::now();
    run(0, slice);
    times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  done = true;
  for (auto& thread : others) thread.join();
  return times;
}

#if defined(__x86_64__)
__attribute__((target("avx512f"), noinline)) void read_all(const char* p, size_t bytes) {
  for (const char* end = p + bytes; p < end; p += 256) {
    __asm__ volatile(
        "prefetcht0 6144(%0)\n prefetcht0 6208(%0)\n prefetcht0 6272(%0)\n prefetcht0 6336(%0)\n"
        "vmovdqu64 (%0), %%zmm0\n vmovdqu64 64(%0), %%zmm1\n"
        "vmovdqu64 128(%0), %%zmm2\n vmovdqu64 192(%0), %%zmm3\n"
        :: "r"(p) : "xmm0", "xmm1", "xmm2", "xmm3", "memory");
  }
}

#define DOT(i) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #i "\n"
__attribute__((target("avx512f"), noinline)) void peak(int64_t iterations) {
  for (int64_t i = 0; i < iterations; ++i) {
    __asm__ volatile(DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7) DOT(8) DOT(9)
                     DOT(10) DOT(11) DOT(12) DOT(13) DOT(14) DOT(15)
                     ::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
                         "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
  }
}
#endif

}  // namespace

// Bytes a second that `threads` read together, a quartile of short timings of the `bytes` at
// `memory`; several times the last cache. `round` moves the place. 0 where this is not built.
extern "C" double bench_read(const char* memory, size_t bytes, int threads, int round) {
#if defined(__x86_64__)
  const size_t slices = bytes / kSlice / threads;
  return double(kSlice * threads) / quartile(time_slices(threads, [&](int thread, int slice) {
    read_all(memory + (thread * slices + (round * kSamples + slice) % slices) * kSlice, kSlice);
  }));
#else
  return 0;
#endif
}

// Multiply-adds a second of `vpdpbusd` on `threads`. The processor must have AVX-512 VNNI.
extern "C" double bench_peak(int threads) {
#if defined(__x86_64__)
  const int64_t iterations = 50000;
  return double(iterations) * 16 * 64 * threads /
         quartile(time_slices(threads, [&](int, int) { peak(iterations); }));
#else
  return 0;
#endif
}
