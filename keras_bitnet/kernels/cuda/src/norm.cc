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
  if (p.combine < 0 || p.combine > 2 || p.activation < 0 || p.activation > 2) return "combine or activation is unknown";
  if (p.combine == KBC_COMBINE_ADD && !p.other) return "there is nothing to add";
  if (!p.gain && !(p.combine && p.combined)) return "there is nothing to compute";
  if (p.combined && (p.combined == p.x || p.combined == p.other)) return "what is combined needs a place of its own";
  return nullptr;
}

const char* run_here(Device& device, const kbc_norm& p, bool overlap, void* stream) {
  const int64_t four = p.dtype == 0 ? 16 : 8;  // bytes of four elements
  Norm n{};
  n.x = p.x;
  n.gain = static_cast<const float*>(p.gain);
  n.y = p.y;
  n.other = p.other;
  n.combined = p.combined;
  n.k = static_cast<int>(p.features);
  n.activation = p.activation;
  n.aligned = p.features % 4 == 0 && aligned(p.x, four) && aligned(p.gain, 16) && aligned(p.y, four) &&
              aligned(p.other, four) && aligned(p.combined, four);
  n.epsilon = p.epsilon;
  constexpr const char* kNames[] = {"normalize_", "add_normalize_", "gate_normalize_"};
  const std::string name = std::string(kNames[p.combine]) + kDtypes[p.dtype];
  return launch(device, -2, Launch{name.c_str(), static_cast<unsigned>(p.rows), 1, kThreads, 0, overlap}, &n, stream);
}

}  // namespace

const char* launcher::run_norm(const kbc_norm& p, bool overlap, int device, void* stream) {
  if (const char* wrong = check(p)) return wrong;
  if (p.rows == 0) return nullptr;
  return on_device(device, [&](Device& d) { return run_here(d, p, overlap, stream); });
}

const char* kbc_run_norm(const kbc_norm* problem, int device, void* stream) {
  return run_norm(*problem, true, device, stream);
}
