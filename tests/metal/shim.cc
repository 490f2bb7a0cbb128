// Runs the kernels KERNELS of the file SHADER, compiled as C++ against the `metal_stdlib` here.
#include SHADER

// Runs a grid of `groups` threadgroups of `group_size` threads. Returns what went wrong, or null.
extern "C" const char* launch(const char* name, void** buffers, const uint* groups,
                              const uint* group_size, int backwards) {
  metal::body = nullptr;
#define KERNEL(kernel_name) \
  if (!std::strcmp(name, #kernel_name)) metal::body = metal::enter<kernel_name>;
  KERNELS
  if (!metal::body) return "there is no such kernel";
  for (uint y = 0; y < groups[1]; ++y) {
    for (uint x = 0; x < groups[0]; ++x) {
      metal::Launch one = {buffers, {x, y}, {group_size[0], group_size[1]}};
      metal::body_argument = &one;
      if (!metal::run_threadgroup(group_size[0] * group_size[1], backwards)) {
        return "some lanes of a threadgroup never reach a barrier";
      }
    }
  }
  return nullptr;
}
