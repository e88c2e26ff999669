/* The CUDA driver's interface to the fake GPU of `device.c`.
 *
 * Of a file with the code for several GPUs, the part for this one is chosen as the driver does. A launch with more shared
 * memory than a thread block may have fails, and so does a cooperative one that is not resident as a whole. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "fake.h"

EXPORT int cuInit(unsigned flags) {
  (void)flags;
  return fake_device_count() ? fake_failure("cuInit") : NO_DEVICE;
}
EXPORT int cuDriverGetVersion(int* version) { return *version = 13000, OK; }
EXPORT int cuDeviceGetCount(int* count) { return *count = fake_device_count(), OK; }
EXPORT int cuDeviceGet(int* found, int ordinal) {
  return *found = ordinal, ordinal < fake_device_count() ? OK : NO_DEVICE;
}
EXPORT int cuDeviceGetName(char* name, int size, int which) {
  (void)which;
  return snprintf(name, (size_t)size, "Fake GPU"), OK;
}
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int which) {
  (void)which;
  return *value = fake_device_attribute(attribute), OK;
}
EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int which) {
  (void)which;
  return *bytes = fake_total_bytes(), OK;
}
EXPORT int cuDevicePrimaryCtxRetain(void** context, int which) {
  (void)which;
  return *context = (void*)0x1, fake_failure("cuDevicePrimaryCtxRetain");
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int which) { return (void)which, OK; }
EXPORT int cuCtxSetCurrent(void* context) { return (void)context, OK; }
EXPORT int cuCtxGetCurrent(void** context) { return *context = (void*)0x1, OK; }
EXPORT int cuCtxGetDevice(int* found) { return *found = 0, OK; }
EXPORT int cuCtxPushCurrent_v2(void* context) { return (void)context, OK; }
EXPORT int cuCtxPopCurrent_v2(void** context) { return *context = (void*)0x1, OK; }
EXPORT int cuCtxSynchronize(void) { return fake_synchronise("cuCtxSynchronize", NULL); }
EXPORT int cuGetErrorName(int code, const char** name) {
  static _Thread_local char text[32];
  snprintf(text, sizeof text, "CUDA_ERROR_%d", code);
  return *name = text, OK;
}
EXPORT int cuGetErrorString(int code, const char** text) { return cuGetErrorName(code, text); }

#define FROM_PTX ((void*)0x8) /* the handle of a module that the driver compiled */

/* A file with the code for several GPUs has a header of 16 bytes, then parts with headers of their own. A cubin runs on
 * GPUs of the same major version, from its minor version on; PTX on all from its version on. */
static int choose(void** module, const char* file) {
  uint64_t bytes;
  memcpy(&bytes, file + 8, 8);
  int cubin = 0, ptx = 0;
  for (const char *part = file + 16, *end = part + bytes; part < end;) {
    uint16_t kind;
    uint32_t header, version;
    uint64_t size;
    memcpy(&kind, part, 2), memcpy(&header, part + 4, 4), memcpy(&size, part + 8, 8), memcpy(&version, part + 28, 4);
    int fits = (int)version <= fake_sm(), best = kind == 2 ? cubin : ptx;
    if (fits && (int)version > best && kind == 2 && (int)version / 10 == fake_sm() / 10) cubin = (int)version;
    if (fits && (int)version > best && kind == 1) ptx = (int)version;
    part += header + size;
  }
  char name[32];
  snprintf(name, sizeof name, cubin ? "cubin %d" : "PTX %d", cubin ? cubin : ptx);
  fake_note("module", name, NULL);
  *module = cubin ? fake_handle() : FROM_PTX;
  return cubin || ptx ? OK : 209; /* CUDA_ERROR_NO_BINARY_FOR_GPU */
}
EXPORT int cuModuleLoadData(void** module, const void* image) {
  int code = fake_failure("cuModuleLoadData");
  if (code) return code;
  if (!memcmp(image, "\x50\xed\x55\xba", 4)) return choose(module, image);
  fake_note("module", "one", NULL);
  *module = fake_handle();
  return !memcmp(image, "\177ELF", 4) || strstr(image, ".version") ? OK : 200; /* CUDA_ERROR_INVALID_IMAGE */
}
EXPORT int cuModuleLoadDataEx(void** module, const void* image, unsigned count, void* options, void* values) {
  (void)count, (void)options, (void)values;
  return cuModuleLoadData(module, image);
}
EXPORT int cuModuleUnload(void* module) { return (void)module, OK; }
EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
  /* Kernels for clusters are for GPUs of a version above that of the PTX. */
  if (module == FROM_PTX && strstr(name, "_CLUSTER")) return 500; /* CUDA_ERROR_NOT_FOUND */
  return *function = strdup(name), fake_failure("cuModuleGetFunction");
}
EXPORT int cuFuncSetAttribute(void* f, int attribute, int value) {
  (void)f;
  return attribute == 8 && value > fake_device_attribute(97) ? INVALID : fake_failure("cuFuncSetAttribute");
}
EXPORT int cuFuncGetAttribute(int* value, int attribute, void* f) { return (void)attribute, (void)f, *value = 64, OK; }
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks_, void* f, int size, size_t shared) {
  (void)f, (void)size;
  *blocks_ = shared > 113 << 10 ? 1 : 2;
  return fake_failure("cuOccupancyMaxActiveBlocksPerMultiprocessor");
}
EXPORT int cuOccupancyMaxActiveClusters(int* clusters, void* f, const void* config) {
  (void)f, (void)config;
  return *clusters = fake_sm() >= 90 ? 8 : 0, OK;
}

EXPORT int cuMemAlloc_v2(void** address, size_t bytes) {
  fake_note("allocate", "cuMemAlloc", NULL);
  int code = fake_failure("cuMemAlloc");
  return code ? code : fake_while_capturing() ? CAPTURE_FORBIDS : fake_allocate(address, bytes);
}
EXPORT int cuMemFree_v2(void* address) { return fake_free(address); }
EXPORT int cuMemGetInfo_v2(size_t* available, size_t* all) {
  return *available = fake_free_bytes(), *all = fake_total_bytes(), OK;
}
EXPORT int cuMemHostAlloc(void** address, size_t bytes, unsigned flags) {
  (void)flags;
  int code = fake_failure("cuMemHostAlloc");
  return code ? code : fake_allocate_host(address, bytes);
}
EXPORT int cuMemFreeHost(void* address) { return fake_free_host(address); }
EXPORT int cuMemcpyHtoD_v2(void* to, const void* from, size_t bytes) {
  return fake_while_capturing() ? CAPTURE_IMPLICIT : fake_copy(to, 0, from, 0, bytes, 1, NULL);
}
EXPORT int cuMemcpyDtoH_v2(void* to, const void* from, size_t bytes) { return cuMemcpyHtoD_v2(to, from, bytes); }
EXPORT int cuMemcpyDtoD_v2(void* to, const void* from, size_t bytes) { return cuMemcpyHtoD_v2(to, from, bytes); }
EXPORT int cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t bytes, Stream stream) {
  return fake_copy(to, 0, from, 0, bytes, 1, stream);
}
EXPORT int cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t bytes, Stream stream) {
  return fake_copy(to, 0, from, 0, bytes, 1, stream);
}
EXPORT int cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t bytes, Stream stream) {
  return fake_copy(to, 0, from, 0, bytes, 1, stream);
}
typedef struct {
  size_t x, y;
  int kind;
  void *host, *device, *array;
  size_t pitch;
} Side;
typedef struct {
  Side from, to;
  size_t width, rows;
} Copy2D;
static char* start_of(const Side* side) {
  return (char*)(side->kind == 1 ? side->host : side->device) + side->y * side->pitch + side->x;
}
EXPORT int cuMemcpy2DAsync_v2(const Copy2D* copy, Stream stream) {
  if (copy->from.pitch < copy->width || copy->to.pitch < copy->width) return INVALID;
  return fake_copy(start_of(&copy->to), copy->to.pitch, start_of(&copy->from), copy->from.pitch, copy->width, copy->rows,
                   stream);
}
EXPORT int cuMemsetD8Async(void* to, unsigned char value, size_t bytes, Stream stream) {
  return fake_fill(to, value, bytes, stream);
}
EXPORT int cuMemsetD8_v2(void* to, unsigned char value, size_t bytes) { return fake_fill(to, value, bytes, NULL); }
EXPORT int cuMemsetD32Async(void* to, unsigned value, size_t count, Stream stream) {
  return value ? INVALID : fake_fill(to, 0, 4 * count, stream);
}

EXPORT int cuStreamCreate(Stream* stream, unsigned flags) {
  int code = fake_failure("cuStreamCreate");
  return code ? code : fake_new_stream(stream, flags & 1);
}
EXPORT int cuStreamDestroy_v2(Stream stream) { return (void)stream, OK; }
EXPORT int cuStreamSynchronize(Stream stream) { return fake_synchronise("cuStreamSynchronize", stream); }
EXPORT int cuStreamIsCapturing(Stream stream, int* status) { return *status = fake_is_capturing(stream), OK; }
EXPORT int cuStreamWaitEvent(Stream stream, void* event, unsigned flags) {
  (void)event, (void)flags;
  return fake_note("event", "wait", stream), OK;
}
EXPORT int cuEventCreate(void** event, unsigned flags) { return (void)flags, *event = fake_handle(), OK; }
EXPORT int cuEventDestroy_v2(void* event) { return (void)event, OK; }
EXPORT int cuEventRecord(void* event, Stream stream) { return (void)event, fake_note("event", "record", stream), OK; }
EXPORT int cuEventSynchronize(void* event) { return (void)event, fake_synchronise("cuEventSynchronize", NULL); }
EXPORT int cuEventElapsedTime(float* milliseconds, void* from, void* to) {
  return (void)from, (void)to, *milliseconds = 1, OK;
}

EXPORT int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, Stream stream, void** parameters, void** extra) {
  (void)extra;
  return fake_kernel(f, (unsigned[]){gx, gy, gz}, (unsigned[]){bx, by, bz}, shared, stream, parameters);
}
EXPORT int cuLaunchCooperativeKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                     unsigned bz, unsigned shared, Stream stream, void** parameters) {
  return fake_kernel(f, (unsigned[]){gx, gy, gz}, (unsigned[]){bx, by, bz}, shared, stream, parameters);
}
typedef struct {
  unsigned grid[3], block[3], shared;
  Stream stream;
  struct {
    int id, unused, value[16];
  }* attributes;
  unsigned count;
} LaunchConfig;
EXPORT int cuLaunchKernelEx(const LaunchConfig* config, void* f, void** parameters, void** extra) {
  (void)extra;
  int code = fake_failure("cuLaunchKernelEx"), resident = fake_device_attribute(16), cooperative = 0;
  if (config->shared <= 113 << 10) resident *= 2;
  for (unsigned i = 0; i < config->count; ++i) cooperative |= config->attributes[i].id == 2;
  if (cooperative && config->grid[0] > (unsigned)resident) return 720; /* CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE */
  return code ? code : fake_kernel(f, config->grid, config->block, config->shared, config->stream, parameters);
}
