// Times the native matmul beside the ceilings of the machine, interleaved in one run: cold reads
// of memory and the peak of `vpdpbusd`. Every figure is the lower quartile of many short timings,
// since other programs can only add to a time.
//
//   g++ -O2 -std=c++17 benchmarks/native_core.cc -Ikeras_bitnet/kernels/native/src -Lbuild
//       -lbitnet -Wl,-rpath,$PWD/build -pthread -o build/native_core
//   build/native_core [threads] [bits: 1, 1.6, 2, 4, 8] [k] [n] [group_size] [rounds]
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "bitnet.h"

namespace {

constexpr size_t kColdBytes = size_t(384) << 20;  // far more than any last-level cache here
constexpr size_t kSlice = size_t(4) << 20;         // bytes of one timed read

double seconds(const std::function<void()>& run) {
  const auto begin = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double quartile(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 4];
}

// Seconds a slice takes while all threads run slices: run(thread, slice).
std::vector<double> time_slices(int threads, int slices, const std::function<void(int, int)>& run) {
  std::vector<std::thread> others;
  std::vector<double> times;
  std::atomic<bool> done{false};
  for (int i = 1; i < threads; ++i) {
    others.emplace_back([&, i] { for (int slice = 0; !done; ++slice) run(i, slice); });
  }
  for (int slice = 0; slice < slices; ++slice) times.push_back(seconds([&] { run(0, slice); }));
  done = true;
  for (auto& thread : others) thread.join();
  return times;
}

#if defined(__x86_64__)
__attribute__((target("avx512f"), noinline)) void read_all(const char* p, size_t bytes) {
  for (const char* end = p + bytes; p < end; p += 256) {
    __asm__ volatile(
        "prefetcht0 6144(%0)\n prefetcht0 6208(%0)\n prefetcht0 6272(%0)\n prefetcht0 6336(%0)\n"
        "vmovdqa64 (%0), %%zmm0\n vmovdqa64 64(%0), %%zmm1\n"
        "vmovdqa64 128(%0), %%zmm2\n vmovdqa64 192(%0), %%zmm3\n"
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

struct Case {
  int64_t m;
  bool cold;
  std::vector<double> times;
};

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, int64_t other) { return argc > i ? std::atoll(argv[i]) : other; };
  const int threads = int(argument(1, 1)), rounds = int(argument(6, 8));
  const bool trits = argc > 2 && !std::strcmp(argv[2], "1.6");
  const int bits = trits ? 2 : int(argument(2, 2));
  const int64_t k = argument(3, 4096), n = argument(4, 4096), group = argument(5, 0);
  kbn_set_threads(threads);

  const size_t bytes = size_t((n + 15) / 16) * (trits ? (k + 19) / 20 : (k * bits + 31) / 32) * 64;
  const size_t copies = kColdBytes / bytes;
  auto* weights = static_cast<char*>(aligned_alloc(4096, copies * bytes + 8192 & ~size_t(4095)));
  std::mt19937 random(1);
  for (size_t i = 0; i < copies * bytes / 4; ++i) reinterpret_cast<uint32_t*>(weights)[i] = random();
  const int64_t most = 1024;
  std::vector<float> x(most * k), y(most * n), scale((group ? (k + group - 1) / group : 1) * n, 1.0f);
  for (auto& value : x) value = float(int(random() % 2001) - 1000);

  kbn_matmul problem{};
  problem.in_features = k, problem.out_features = n, problem.group_size = group;
  problem.layout = trits ? KBN_TRITS : KBN_TILES;
  problem.bits = bits, problem.offset = -1, problem.activation_bits = 8, problem.epsilon = 1e-5f;
  problem.scale_columns = int32_t(n);
  problem.x = x.data(), problem.scale = scale.data(), problem.y = y.data();
  size_t copy = 0;
  const auto run = [&](int64_t m, bool cold) {
    problem.rows = m;
    problem.tiles = reinterpret_cast<uint8_t*>(weights) + (cold ? copy++ % copies : 0) * bytes;
    if (int code = kbn_run(&problem, nullptr)) std::puts(kbn_error(code)), std::exit(1);
  };

  std::vector<double> read_times, peak_times;
  const int64_t iterations = 50000;
  std::vector<Case> cases{{1, true, {}},  {1, false, {}},  {2, true, {}},   {4, true, {}},
                          {4, false, {}}, {8, false, {}},  {12, false, {}}, {16, false, {}},
                          {64, false, {}}, {256, false, {}}, {1024, false, {}}};
  for (int round = 0; round < rounds; ++round) {
#if defined(__x86_64__)
    const size_t slices = copies * bytes / kSlice / threads;
    for (double t : time_slices(threads, 60, [&](int thread, int slice) {
           const size_t at = thread * slices + (round * 60 + slice) % slices;
           read_all(weights + at * kSlice, kSlice);
         })) read_times.push_back(t / double(kSlice * threads));
    for (double t : time_slices(threads, 60, [&](int, int) { peak(iterations); })) {
      peak_times.push_back(t / (double(iterations) * 16 * 64 * threads));
    }
#endif
    for (auto& c : cases) {
      run(c.m, c.cold);
      const int repeats = std::max(1, int(3e8 * threads / double(c.m * n * k) / (c.m < 4 ? 1 : 0.5)));
      for (int i = 0; i < repeats; ++i) c.times.push_back(seconds([&] { run(c.m, c.cold); }));
    }
  }
  const double bandwidth = 1e-9 / quartile(read_times), macs = 1e-9 / quartile(peak_times);
  std::printf("isa %s  threads %d  bits %s  k %lld  n %lld  group %lld\n", kbn_isa(), threads,
              argc > 2 ? argv[2] : "2", (long long)k, (long long)n, (long long)group);
  std::printf("cold read %.1f GB/s   vpdpbusd %.0f GMAC/s\n", bandwidth, macs);
  for (auto& c : cases) {
    const double t = quartile(c.times);
    const double gb = double(bytes + (group ? scale.size() * 4 : 0)) / t * 1e-9, gmac = double(c.m * n * k) / t * 1e-9;
    std::printf("m %5lld %-6s %9.1f us  %6.1f GB/s (%3.0f %%)  %6.1f GMAC/s (%3.0f %%)\n",
                (long long)c.m, c.cold ? "cold" : "cached", t * 1e6, gb, 100 * gb / bandwidth, gmac,
                100 * gmac / macs);
  }
}
