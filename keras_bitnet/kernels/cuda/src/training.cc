// Launches the kernels of training, those of fake_quantize.cuh.
#include <string>

#include "launch.h"

namespace {

using namespace launcher;

const char* check(const kbc_fake& p) {
  if (p.dtype < 0 || p.dtype > 2) return "dtype must be 0, 1 or 2";
  if (p.rows < 0 || p.columns < 1 || p.group_size < 0) return "a size is out of range";
  if (p.columns > INT32_MAX / 8 || (!p.weight && p.rows > INT32_MAX)) return "a size is too large";
  if (p.scale_columns != 1 && p.scale_columns != p.columns) return "scale_columns must be 1 or columns";
  if (p.per_tensor && !aligned(p.workspace, 4)) return "workspace must lie at a multiple of 4 bytes";
  return nullptr;
}

Fake parameters(const kbc_fake& p) {
  Fake f{};
  f.x = p.x;
  f.x_scale = static_cast<const float*>(p.x_scale);
  f.scale = static_cast<const float*>(p.scale);
  f.strength = static_cast<const float*>(p.strength);
  f.y = p.y;
  if (p.per_tensor) f.largest = static_cast<unsigned*>(p.workspace);
  f.rows = p.rows;
  f.k = static_cast<int>(p.columns);
  f.group_size = static_cast<int>(p.group_size ? p.group_size : p.rows);
  f.scale_columns = p.scale_columns;
  f.dtype = p.dtype;
  f.x_aligned = p.columns % 4 == 0 && aligned(p.x, p.weight || p.dtype == 0 ? 16 : 8);
  f.y_aligned = p.columns % 4 == 0 && aligned(p.y, p.dtype == 0 ? 16 : 8);
  f.epsilon = p.epsilon;
  f.lowest = p.lowest;
  f.highest = p.highest;
  f.inverse_highest = static_cast<float>(1.0 / p.highest);
  f.half = p.half;
  f.binary = p.binary;
  return f;
}

const char* run_here(Device& device, const kbc_fake& p, void* stream) {
  const Fake f = parameters(p);
  if (p.weight) {
    constexpr int64_t kColumns = 4 * kQuantizeThreads, kRows = 8, kMostBlocks = 65535;
    const int64_t blocks = (p.rows + kRows - 1) / kRows;
    const Launch l{"fake_weight", static_cast<unsigned>((p.columns + kColumns - 1) / kColumns),
                   static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), kQuantizeThreads, 0, false};
    return launch(device, 0, l, &f, stream);
  }
  const std::string dtype = kDtypes[p.dtype], largest = "fake_largest_" + dtype, name = "fake_quantize_" + dtype;
  const unsigned rows = static_cast<unsigned>(p.rows);
  if (f.largest) {
    if (const char* wrong = clear_word(f.largest, stream)) return wrong;
    const Launch l{largest.c_str(), rows, 1, kQuantizeThreads, 0, false};
    if (const char* wrong = launch(device, 0, l, &f, stream)) return wrong;
  }
  return launch(device, 0, Launch{name.c_str(), rows, 1, kQuantizeThreads, 0, false}, &f, stream);
}

}  // namespace

const char* kbc_run_fake(const kbc_fake* problem, int device, void* stream) {
  if (const char* wrong = check(*problem)) return wrong;
  if (problem->rows == 0) return nullptr;
  return on_device(device, [&](Device& d) { return run_here(d, *problem, stream); });
}
