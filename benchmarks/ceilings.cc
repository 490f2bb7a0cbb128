// The ceilings of a machine that a low-bit matmul runs into: reads of memory that no cache holds,
// and the peak of `vpdpbusd`, register to register. `native_core.cc` and `cpu_matmul.py` use it.
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace {

constexpr size_t kPiece = size_t(1) << 20;  // bytes that a thread takes at a time

// Seconds until `threads`, the calling one among them, have all run the function.
double seconds(int threads, const std::function<void()>& run) {
  std::vector<std::thread> others;
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 1; i < threads; ++i) others.emplace_back(run);
  run();
  for (auto& thread : others) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

#if defined(__x86_64__)
// Several streams side by side: processors fetch them ahead better than one, or than a prefetch does.
__attribute__((target("avx"), noinline)) void read_all(const char* p, size_t bytes) {
  constexpr size_t kStreams = 8, kStream = 16 << 10;
  for (const char* end = p + bytes; p < end; p += kStreams * kStream) {
    for (size_t i = 0; i < kStream; i += 64) {
      for (size_t s = 0; s < kStreams; ++s) {
        __asm__ volatile("vmovdqu (%0), %%ymm0\n vmovdqu 32(%0), %%ymm1\n"
                         ::"r"(p + s * kStream + i) : "xmm0", "xmm1", "memory");
      }
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

// Bytes a second at which `threads` together read the `bytes` at `memory` once, in whole pieces; take
// several times the last cache. 0 where this is not built.
extern "C" double bench_read(const char* memory, size_t bytes, int threads) {
#if defined(__x86_64__)
  const size_t pieces = bytes / kPiece;
  std::atomic<size_t> next{0};
  return double(pieces * kPiece) / seconds(threads, [&] {
    for (size_t i; (i = next++) < pieces;) read_all(memory + i * kPiece, kPiece);
  });
#else
  return 0;
#endif
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
