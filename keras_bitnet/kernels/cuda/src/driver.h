// The functions of the CUDA driver that are used, declared again and found in libcuda at run time.
#pragma once
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>

#include <string>

namespace cuda {

typedef struct Context_* Context;
typedef struct Library_* Library;
typedef struct Kernel_* Kernel;

struct LaunchAttribute {
  int id;
  char padding[4];
  union {
    char bytes[64];
    int number;
    unsigned sizes[3];
  } value;
};

struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

enum {
  kMultiprocessors = 16,
  kCapabilityMajor = 75,
  kCapabilityMinor = 76,
  kSharedMemoryOptin = 97,
};
enum { kClusterDimension = 4, kProgrammaticStreamSerialization = 6 };

// X(name, name in the library, arguments); all return 0 or a code.
#define KBC_CUDA_FUNCTIONS(X)                                                                    \
  X(cuInit, "cuInit", (unsigned))                                                                \
  X(cuGetErrorName, "cuGetErrorName", (int, const char**))                                       \
  X(cuDeviceGetCount, "cuDeviceGetCount", (int*))                                                \
  X(cuDeviceGet, "cuDeviceGet", (int*, int))                                                     \
  X(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int*, int, int))                              \
  X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (Context*, int))                       \
  X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (Context))                                          \
  X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (Context*))                                           \
  X(cuCtxGetDevice, "cuCtxGetDevice", (int*))                                                    \
  X(cuStreamGetCtx, "cuStreamGetCtx", (void*, Context*))                                         \
  X(cuMemsetD32Async, "cuMemsetD32Async", (uintptr_t, unsigned, size_t, void*))                  \
  X(cuLibraryLoadData, "cuLibraryLoadData",                                                      \
    (Library*, const void*, int*, void**, unsigned, int*, void**, unsigned))                     \
  X(cuLibraryGetKernel, "cuLibraryGetKernel", (Kernel*, Library, const char*))                   \
  X(cuKernelSetAttribute, "cuKernelSetAttribute", (int, int, Kernel, int))                       \
  X(cuLaunchKernelEx, "cuLaunchKernelEx", (const LaunchConfig*, Kernel, void**, void**))

#define X(name, symbol, arguments) inline int(*name) arguments = nullptr;
KBC_CUDA_FUNCTIONS(X)
#undef X

// Finds them all. Returns what is missing, or nothing.
inline std::string open() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) return "there is no CUDA driver (libcuda.so.1)";
#define X(name, symbol, arguments)                                  \
  name = reinterpret_cast<int(*) arguments>(dlsym(library, symbol)); \
  if (!name) return "the CUDA driver is older than 12.0: it has no " symbol;
  KBC_CUDA_FUNCTIONS(X)
#undef X
  return "";
}

}  // namespace cuda
