// The part of XLA's FFI (version 0.x of its plain-C API) that the JAX adapter touches, written
// down again so that it builds without jaxlib. Members keep their order and types;
// tests/test_native_adapters.py holds them against the header that jaxlib ships.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace xla_ffi {

enum { kMetadataExtension = 1 };
enum { kExecuteStage = 3 };
enum { kInvalidArgument = 3, kInternal = 13 };
enum { kPRED = 1, kS8 = 2, kS32 = 4, kS64 = 5, kU8 = 6, kF16 = 10, kF32 = 11, kF64 = 12, kBF16 = 16 };
enum { kArrayAttribute = 1, kScalarAttribute = 3 };

struct Extension {
  size_t struct_size;
  int32_t type;
  Extension* next;
};

struct ApiVersion {
  size_t struct_size;
  Extension* extension;
  int major_version;
  int minor_version;
};

struct ErrorCreate {
  size_t struct_size;
  Extension* extension;
  const char* message;
  int32_t code;
};

struct ErrorDestroy {
  size_t struct_size;
  Extension* extension;
  void* error;
};

struct Buffer {
  size_t struct_size;
  Extension* extension;
  int32_t dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};

// Operands; results have the same layout.
struct Buffers {
  size_t struct_size;
  Extension* extension;
  int64_t size;
  int32_t* types;
  Buffer** buffers;
};

struct ByteSpan {
  const char* data;
  size_t size;
};

struct Scalar {
  int32_t dtype;
  void* value;
};

struct Array {
  int32_t dtype;
  size_t size;
  void* data;
};

struct Attributes {
  size_t struct_size;
  Extension* extension;
  int64_t size;
  int32_t* types;
  ByteSpan** names;
  void** values;
};

struct NumThreads {
  size_t struct_size;
  Extension* extension;
  void* context;
  int64_t* count;
};

struct Api {
  size_t struct_size;
  Extension* extension;
  ApiVersion version;
  const void* internal;
  void* (*error_create)(ErrorCreate*);
  void* error_get_message;
  void (*error_destroy)(ErrorDestroy*);
  void* handler_register;
  void* stream_get;
  void* type_register;
  void* execution_context_get;
  void* state_set;
  void* state_get;
  void* device_memory_allocate;
  void* device_memory_free;
  void* schedule;
  void* (*num_threads)(NumThreads*);
};

struct CallFrame {
  size_t struct_size;
  Extension* extension;
  const Api* api;
  void* context;
  int32_t stage;
  Buffers arguments;
  Buffers results;
  Attributes attributes;
};

struct Metadata {
  size_t struct_size;
  ApiVersion version;
  uint32_t traits;
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

}  // namespace xla_ffi
