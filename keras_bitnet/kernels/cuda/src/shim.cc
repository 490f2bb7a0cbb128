// Devices and kernels through the CUDA driver, found at run time.
#include "shim.h"

#include <mutex>

#include "launch.h"

namespace launcher {

namespace {

thread_local std::string message;

constexpr int kMaxDevices = 64;

std::mutex mutex;  // guards what follows
int device_count = 0;
Device devices[kMaxDevices];

int attribute(int handle, int which) {
  int value = 0;
  cuda::cuDeviceGetAttribute(&value, which, handle);
  return value;
}

const char* open_once() {
  static const std::string wrong = [] {
    std::string reason = cuda::open();
    if (!reason.empty()) return reason;
    if (int code = cuda::cuInit(0)) {
      const char* name = nullptr;
      cuda::cuGetErrorName(code, &name);
      return std::string("the CUDA driver does not start: ") + (name ? name : "unknown error");
    }
    cuda::cuDeviceGetCount(&device_count);
    if (device_count > kMaxDevices) device_count = kMaxDevices;
    for (int i = 0; i < device_count; ++i) {
      Device& d = devices[i];
      cuda::cuDeviceGet(&d.handle, i);
      d.capability = 10 * attribute(d.handle, cuda::kCapabilityMajor) +
                     attribute(d.handle, cuda::kCapabilityMinor);
      d.multiprocessors = attribute(d.handle, cuda::kMultiprocessors);
      d.shared_memory = attribute(d.handle, cuda::kSharedMemoryOptin);
    }
    return std::string(device_count ? "" : "there is no CUDA device");
  }();
  return wrong.empty() ? nullptr : wrong.c_str();
}

// The kernel of that name, with leave to use `shared` bytes of shared memory.
const char* find(Device& device, int library, const std::string& name, unsigned shared,
                 cuda::Kernel* kernel) {
  std::lock_guard<std::mutex> lock(mutex);
  const std::string key = name + "/" + std::to_string(shared > 44 * 1024 ? shared : 0);
  auto found = device.kernels[library].find(key);
  if (found != device.kernels[library].end()) {
    *kernel = found->second;
    return nullptr;
  }
  if (device.libraries[library].empty()) return fail("the kernels of this width are not loaded on this device");
  int code = 0;
  for (cuda::Library one : device.libraries[library])
    if (!(code = cuda::cuLibraryGetKernel(kernel, one, name.c_str()))) break;
  if (code) return fail(name.c_str(), code);
  if (shared > 44 * 1024) {
    constexpr int kMaxDynamicSharedMemory = 8;
    const int most = device.shared_memory - 6144;  // what is static lies beside it
    if (static_cast<int>(shared) > most)
      return fail(name + " needs more shared memory than this GPU has");
    if (int code = cuda::cuKernelSetAttribute(kMaxDynamicSharedMemory, most, *kernel, device.handle))
      return fail(name.c_str(), code);
  }
  device.kernels[library][key] = *kernel;
  return nullptr;
}

}  // namespace

int library_of(int64_t bits) {
  constexpr int64_t kinds[] = {1, 2, 4, 8, 0, -1, -2};
  for (int i = 0; i < 7; ++i)
    if (kinds[i] == bits) return i;
  return -1;
}

const char* fail(const std::string& text) {
  message = text;
  return message.c_str();
}

const char* fail(const char* what, int code) {
  const char* name = nullptr;
  cuda::cuGetErrorName(code, &name);
  return fail(std::string(what) + ": " + (name ? name : "CUDA error ") + " (" + std::to_string(code) + ")");
}

const char* launch(Device& device, int bits, const Launch& l, const void* params, void* stream) {
  cuda::Kernel kernel = nullptr;
  if (const char* wrong = find(device, library_of(bits), l.name, l.shared, &kernel)) return wrong;
  cuda::LaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (device.capability >= 90 && l.overlap) {
    attributes[count].id = cuda::kProgrammaticStreamSerialization;
    attributes[count++].value.number = 1;
  }
  if (device.capability >= 90 && l.cluster > 1) {
    attributes[count].id = cuda::kClusterDimension;
    attributes[count].value.sizes[0] = l.cluster;
    attributes[count].value.sizes[1] = attributes[count].value.sizes[2] = 1;
    ++count;
  }
  cuda::LaunchConfig config{l.grid_x, l.grid_y, l.grid_z, l.threads, 1, 1, l.shared, stream, attributes, count};
  void* arguments[] = {const_cast<void*>(params)};
  const int code = cuda::cuLaunchKernelEx(&config, kernel, arguments, nullptr);
  return code ? fail(l.name, code) : nullptr;
}

const char* clear_word(void* word, void* stream) {
  const int code = cuda::cuMemsetD32Async(reinterpret_cast<uintptr_t>(word), 0, 1, stream);
  return code ? fail("cuMemsetD32Async", code) : nullptr;
}

Pushed::Pushed(Device& device) {
  std::unique_lock<std::mutex> lock(mutex);
  if (!device.context)
    if (int code = cuda::cuDevicePrimaryCtxRetain(&device.context, device.handle)) {
      wrong = fail("cuDevicePrimaryCtxRetain", code);
      return;
    }
  lock.unlock();
  if (int code = cuda::cuCtxPushCurrent(device.context))
    wrong = fail("cuCtxPushCurrent", code);
  else
    pushed = true;
}

Pushed::~Pushed() {
  cuda::Context popped;
  if (pushed) cuda::cuCtxPopCurrent(&popped);
}

Device* find_device(int number) {
  return number >= 0 && number < kbc_device_count() ? &devices[number] : nullptr;
}

}  // namespace launcher

using namespace launcher;

int kbc_abi_version(void) { return 9; }

const char* kbc_open(void) { return open_once(); }

int kbc_device_count(void) { return open_once() ? 0 : device_count; }

int kbc_capability(int device) {
  const Device* d = find_device(device);
  return d ? d->capability : 0;
}

int kbc_loaded(int device, int bits) {
  const Device* d = find_device(device);
  if (!d || library_of(bits) < 0) return 0;
  std::lock_guard<std::mutex> lock(mutex);
  return !d->libraries[library_of(bits)].empty();
}

const char* kbc_load(int device, int bits, const void* const* cubins, int count) {
  if (const char* wrong = open_once()) return wrong;
  if (library_of(bits) < 0) return fail("no such width");
  return on_device(device, [&](Device& d) -> const char* {
    std::lock_guard<std::mutex> lock(mutex);
    std::vector<cuda::Library>& libraries = d.libraries[library_of(bits)];
    if (!libraries.empty()) return nullptr;
    std::vector<cuda::Library> loaded(count);
    for (int i = 0; i < count; ++i)
      if (int code = cuda::cuLibraryLoadData(&loaded[i], cubins[i], nullptr, nullptr, 0, nullptr, nullptr, 0))
        return fail("cuLibraryLoadData", code);
    libraries = loaded;
    return nullptr;
  });
}
