// Launches the kernels of norm.cuh.
#include <string>

#include "launch.h"

namespace {

using namespace launcher;

constexpr unsigned kThreads = 512;  // as in norm.cuh

const char* check(const kbc_norm& p) {
  if (p.dtype < 0 || p.dtype > 2) return "dtype must be 0, 1 or 2";
  if (p.rows < 0 || p.features < 1) return "a size is out of range";
  if (p.rows > INT32_MAX || p.features > INT32_MAX / 8) return "a size is too large";
  return nullptr;
}

const char* run_here(Device& device, const kbc_norm& p, void* stream) {
  const int64_t four = p.dtype == 0 ? 16 : 8;  // bytes of four elements
  Norm n{};
  n.x = p.x;
  n.gain = static_cast<const float*>(p.gain);
  n.y = p.y;
  n.k = static_cast<int>(p.features);
  n.aligned = p.features % 4 == 0 && aligned(p.x, four) && aligned(p.gain, 16) && aligned(p.y, four);
  n.epsilon = p.epsilon;
  const std::string name = std::string("normalize_") + kDtypes[p.dtype];
  return launch(device, -2, Launch{name.c_str(), static_cast<unsigned>(p.rows), 1, kThreads, 0, true}, &n, stream);
}

}  // namespace

const char* kbc_run_norm(const kbc_norm* problem, int device, void* stream) {
  if (const char* wrong = check(*problem)) return wrong;
  if (problem->rows == 0) return nullptr;
  return on_device(device, [&](Device& d) { return run_here(d, *problem, stream); });
}
