// Times the native matmul beside the ceilings of the machine, interleaved in one run: cold reads
// of memory and the peak of `vpdpbusd`. Every figure is the fast quartile of many short timings,
// since other programs can only add to a time.
//
//   native=keras_bitnet/kernels/native
//   g++ -O2 -std=c++17 -pthread benchmarks/native_core.cc benchmarks/ceilings.cc -I$native/src
//       -L$native -lbitnet -Wl,-rpath,$PWD/$native -o build/native_core
//   build/native_core [threads] [bits: 1, 1.6, 2, 4, 8] [k] [n] [group_size] [rounds]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "bitnet.h"

extern "C" double bench_read(const char* memory, size_t bytes, int threads);
extern "C" double bench_peak(int threads);

namespace {

constexpr size_t kColdBytes = size_t(1) << 30;  // far more than any last-level cache here

double seconds(const std::function<void()>& run) {
  const auto begin = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double fast(std::vector<double> rates) {
  std::sort(rates.begin(), rates.end());
  return rates[rates.size() * 3 / 4];
}

double quartile(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 4];
}

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
  auto* weights = static_cast<char*>(aligned_alloc(4096, (copies * bytes + 8192) & ~size_t(4095)));
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

  std::vector<double> reads, peaks;
  std::vector<Case> cases{{1, true, {}},  {1, false, {}},  {2, true, {}},   {4, true, {}},
                          {4, false, {}}, {8, false, {}},  {12, false, {}}, {16, false, {}},
                          {64, false, {}}, {256, false, {}}, {1024, false, {}}};
  for (int round = 0; round < rounds; ++round) {
    reads.push_back(bench_read(weights, copies * bytes, threads));
    peaks.push_back(bench_peak(threads));
    for (auto& c : cases) {
      run(c.m, c.cold);
      const int repeats = std::max(1, int(3e8 * threads / double(c.m * n * k) / (c.m < 4 ? 1 : 0.5)));
      for (int i = 0; i < repeats; ++i) c.times.push_back(seconds([&] { run(c.m, c.cold); }));
    }
  }
  const double bandwidth = 1e-9 * fast(reads), macs = 1e-9 * fast(peaks);
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
