// What the parts of the launcher share: devices, errors, and the launch of a kernel by its name.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "driver.h"
#include "params.h"
#include "shim.h"

namespace launcher {

constexpr int kQuantizeThreads = 256;
constexpr const char* kDtypes[] = {"f32", "bf16", "f16"};

struct Device {
  int handle = 0, capability = 0, multiprocessors = 0;
  int shared_memory = 0;  // a block's, at most
  cuda::Context context = nullptr;
  std::vector<cuda::Library> libraries[7];
  std::map<std::string, cuda::Kernel> kernels[7];
};

// Which library holds the kernels of a width of weights, 0: of training, -1: of attention, -2: of norms; or -1: none.
int library_of(int64_t bits);

// Keep a text for the calling thread and return it.
const char* fail(const std::string& text);
const char* fail(const char* what, int code);

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

struct Launch {
  const char* name;
  unsigned grid_x, grid_y, threads, shared;
  bool overlap;  // may start while the kernel before ends (programmatic dependent launch)
  unsigned grid_z = 1;
  unsigned cluster = 1;  // blocks along x that share their memory, from compute capability 9.0 on
};

// Queues the kernel of that name from the library of a width. `params` points at what it takes.
const char* launch(Device& device, int bits, const Launch& l, const void* params, void* stream);

// kbc_run_norm; `overlap` as of a Launch.
const char* run_norm(const kbc_norm& problem, bool overlap, int device, void* stream);

// Queues a 32-bit zero.
const char* clear_word(void* word, void* stream);

// The context of a device while this lives; the default stream belongs to the one on top.
struct Pushed {
  const char* wrong = nullptr;
  bool pushed = false;

  explicit Pushed(Device& device);
  ~Pushed();
};

// The device of that number, or null.
Device* find_device(int number);

// Calls `run(device)` in the context of a device.
template <class Run> const char* on_device(int number, Run run) {
  Device* device = find_device(number);
  if (!device) return fail("no such device");
  Pushed current(*device);
  return current.wrong ? current.wrong : run(*device);
}

}  // namespace launcher
