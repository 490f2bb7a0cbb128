// The ceilings of a machine that a low-bit matmul runs into: reads of memory that no cache holds,
// and the peak of `vpdpbusd`, register to register. `native_core.cc` and `cpu_matmul.py` use it.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <thread>
#include <vector>

namespace {

constexpr size_t kPiece = size_t(1) << 20;  // bytes that a thread takes at a time

// Seconds until `threads`, the calling one among them, have all run the function, from where all are there.
double seconds(int threads, const std::function<void()>& run) {
  std::atomic<int> there{0};
  const auto run_with_others = [&] {
    for (++there; there < threads;) std::this_thread::yield();
    run();
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(run_with_others);
  while (there < threads - 1) std::this_thread::yield();
  const auto begin = std::chrono::steady_clock::now();
  run_with_others();
  for (auto& thread : others) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

#if defined(__x86_64__)
// Reads a piece as some streams side by side: which number is fetched ahead best depends on the processor.
template <int Streams>
__attribute__((target("avx"), noinline)) void read_piece(const char* p) {
  constexpr size_t kStream = kPiece / Streams;
  for (size_t i = 0; i < kStream; i += 64) {
#pragma GCC unroll 8
    for (size_t s = 0; s < Streams; ++s) {
      __asm__ volatile("vmovdqu (%0), %%ymm0\n vmovdqu 32(%0), %%ymm1\n"
                       ::"r"(p + s * kStream + i) : "xmm0", "xmm1", "memory");
    }
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

// Bytes a second at which `threads` together read the `bytes` at `memory` once, in whole pieces, by the
// fastest of some loops; take several times the last cache. 0 where this is not built.
extern "C" double bench_read(const char* memory, size_t bytes, int threads) {
  double best = 0;
#if defined(__x86_64__)
  const size_t pieces = bytes / kPiece;
  for (const auto read : {read_piece<1>, read_piece<2>, read_piece<4>, read_piece<8>}) {
    std::atomic<size_t> next{0};
    const double time = seconds(threads, [&] {
      for (size_t i; (i = next++) < pieces;) read(memory + i * kPiece);
    });
    best = std::max(best, double(pieces * kPiece) / time);
  }
#endif
  return best;
}

// Multiply-adds a second of `vpdpbusd` on `threads`; 0 where the processor lacks AVX-512 VNNI.
extern "C" double bench_peak(int threads) {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx512vnni")) return 0;
  const int64_t iterations = 1000000;
  return double(iterations) * 16 * 64 * threads / seconds(threads, [&] { peak(iterations); });
#else
  return 0;
#endif
}
