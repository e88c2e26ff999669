/* The CUDA runtime's interface to the fake GPU of `device.c`, and that of cuBLAS, as far as onnxruntime uses them. The
 * structures are those of CUDA 12 and 13, by the offsets of the fields that are read. */
#include <string.h>

#include "fake.h"

typedef struct {
  unsigned x, y, z;
} Dim3;

/* ---- kernels: compiled code registers their names when a library is loaded ---- */

enum { NAMES = 1 << 16 };
static struct {
  const void* function;
  const char* name;
} names[NAMES];

static unsigned slot_of(const void* function) {
  unsigned slot = (unsigned)(((size_t)function >> 4) * 2654435761u) % NAMES;
  while (names[slot].function && names[slot].function != function) slot = (slot + 1) % NAMES;
  return slot;
}
EXPORT void** __cudaRegisterFatBinary(void* image) {
  static void* handle;
  return (void)image, &handle;
}
EXPORT void __cudaRegisterFunction(void** handle, const void* function, char* device_function, const char* name) {
  (void)handle, (void)device_function;
  unsigned slot = slot_of(function);
  names[slot].function = function;
  names[slot].name = name;
}
static int launch(const void* function, Stream stream) {
  const char* name = names[slot_of(function)].name;
  return fake_launch("kernel", name ? name : "unknown", stream);
}

static _Thread_local struct {
  Dim3 grid, block;
  size_t shared;
  Stream stream;
} configuration;
EXPORT unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, Stream stream) {
  configuration.grid = grid;
  configuration.block = block;
  configuration.shared = shared;
  configuration.stream = stream;
  return OK;
}
EXPORT int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, Stream* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *stream = configuration.stream;
  return OK;
}
EXPORT int __cudaGetKernel(const void** kernel, const void* function) { return *kernel = function, OK; }
EXPORT int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** parameters, size_t shared, Stream stream) {
  (void)grid, (void)block, (void)parameters, (void)shared;
  return launch(kernel, stream);
}
EXPORT int cudaLaunchKernel(const void* f, Dim3 grid, Dim3 block, void** parameters, size_t shared, Stream stream) {
  return __cudaLaunchKernel(f, grid, block, parameters, shared, stream);
}
EXPORT int cudaLaunchCooperativeKernel(const void* f, Dim3 grid, Dim3 block, void** parameters, size_t shared,
                                       Stream stream) {
  return __cudaLaunchKernel(f, grid, block, parameters, shared, stream);
}
typedef struct {
  Dim3 grid, block;
  size_t shared;
  Stream stream;
} LaunchConfig;
EXPORT int cudaLaunchKernelExC(const LaunchConfig* config, const void* f, void** parameters) {
  (void)parameters;
  return launch(f, config->stream);
}
EXPORT int cudaLaunchHostFunc(Stream stream, void (*f)(void*), void* data) {
  fake_note("host function", "cudaLaunchHostFunc", stream);
  if (!fake_is_capturing(stream)) f(data);
  return OK;
}

/* ---- the device ---- */

EXPORT int cudaGetDeviceCount(int* count) {
  *count = fake_device_count();
  int code = fake_failure("cudaGetDeviceCount");
  return code ? code : *count ? OK : NO_DEVICE;
}
EXPORT int cudaGetDevice(int* found) { return *found = 0, fake_device_count() ? OK : NO_DEVICE; }
EXPORT int cudaSetDevice(int which) {
  int code = fake_failure("cudaSetDevice");
  return code ? code : which < fake_device_count() ? OK : NO_DEVICE;
}
EXPORT int cudaDeviceGetAttribute(int* value, int attribute, int which) {
  (void)which;
  return *value = fake_device_attribute(attribute), OK;
}
static void put(char* record, size_t offset, long long value, size_t bytes) { memcpy(record + offset, &value, bytes); }
EXPORT int cudaGetDeviceProperties(char* record, int which) {
  (void)which;
  memset(record, 0, 1008);
  strcpy(record, "Fake GPU");
  put(record, 288, (long long)fake_total_bytes(), 8);
  put(record, 296, fake_device_attribute(8), 8);  /* shared memory a block */
  put(record, 304, 65536, 4);                     /* registers a block */
  put(record, 308, 32, 4);                        /* threads a warp */
  put(record, 312, 1ll << 31, 8);                 /* largest pitch */
  put(record, 320, 1024, 4);                      /* threads a block */
  for (int i = 0; i < 3; ++i) {
    put(record, 324 + 4 * (size_t)i, i < 2 ? 1024 : 64, 4);
    put(record, 336 + 4 * (size_t)i, i ? 65535 : 2147483647, 4);
  }
  put(record, 352, 65536, 8); /* constant memory */
  put(record, 360, fake_sm() / 10, 4);
  put(record, 364, fake_sm() % 10, 4);
  put(record, 384, fake_device_attribute(16), 4); /* multiprocessors */
  put(record, 596, fake_device_attribute(38), 4); /* L2 */
  put(record, 604, 2048, 4);                      /* threads a multiprocessor */
  put(record, 624, fake_device_attribute(81), 8); /* shared memory a multiprocessor */
  put(record, 632, 65536, 4);                     /* registers a multiprocessor */
  put(record, 672, fake_device_attribute(97), 8); /* shared memory a block that opts in */
  put(record, 688, 32, 4);                        /* blocks a multiprocessor */
  const size_t yes[] = {392, 560, 588, 668, 720}; /* mapped host memory, concurrency, one address space, cooperation, pools */
  for (size_t i = 0; i < sizeof yes / sizeof *yes; ++i) put(record, yes[i], 1, 4);
  return OK;
}
EXPORT int cudaDriverGetVersion(int* version) { return *version = 13000, OK; }
EXPORT int cudaRuntimeGetVersion(int* version) { return *version = 13000, OK; }
EXPORT int cudaFuncGetAttributes(char* record, const void* f) {
  (void)f;
  memset(record, 0, 144);
  put(record, 24, 1024, 4);
  put(record, 28, 64, 4);
  put(record, 32, fake_sm(), 4);
  put(record, 36, fake_sm(), 4);
  put(record, 44, 227 << 10, 4);
  return OK;
}
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* f, int size, size_t shared) {
  (void)f, (void)size, (void)shared;
  return *blocks = 1, OK;
}
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* f, int size, size_t shared,
                                                                  unsigned flags) {
  (void)flags;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, f, size, shared);
}
static int nothing(void) { return OK; }
EXPORT int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long flags,
                                            int* result) {
  (void)name, (void)version, (void)flags;
  if (result) *result = 0;
  return *function = (void*)nothing, OK;
}
EXPORT int cudaLibraryLoadData(void** library) { return *library = fake_handle(), OK; }
EXPORT int cudaLibraryGetKernel(void** kernel) { return *kernel = fake_handle(), OK; }
static const char* error_text(int code) {
  return code == OUT_OF_MEMORY ? "out of memory" : code == NO_DEVICE ? "no CUDA-capable device is detected" : "an error";
}
EXPORT const char* cudaGetErrorString(int code) { return error_text(code); }
EXPORT const char* cudaGetErrorName(int code) { return error_text(code); }

/* ---- memory ---- */

static int allocate(const char* name, void** address, size_t bytes) {
  fake_note("allocate", name, NULL);
  int code = fake_failure(name);
  return code ? code : fake_while_capturing() ? CAPTURE_FORBIDS : fake_allocate(address, bytes);
}
EXPORT int cudaMalloc(void** address, size_t bytes) { return allocate("cudaMalloc", address, bytes); }
EXPORT int cudaMallocAsync(void** address, size_t bytes, Stream stream) {
  (void)stream;
  return allocate("cudaMallocAsync", address, bytes);
}
EXPORT int cudaMallocFromPoolAsync(void** address, size_t bytes, void* pool, Stream stream) {
  (void)pool, (void)stream;
  return allocate("cudaMallocFromPoolAsync", address, bytes);
}
EXPORT int cudaFree(void* address) { return fake_while_capturing() ? CAPTURE_FORBIDS : fake_free(address); }
EXPORT int cudaFreeAsync(void* address, Stream stream) { return (void)stream, fake_free(address); }
EXPORT int cudaMallocHost(void** address, size_t bytes) { return fake_allocate_host(address, bytes); }
EXPORT int cudaHostAlloc(void** address, size_t bytes, unsigned flags) {
  (void)flags;
  return fake_allocate_host(address, bytes);
}
EXPORT int cudaFreeHost(void* address) { return fake_free_host(address); }
EXPORT int cudaMemGetInfo(size_t* available, size_t* all) {
  return *available = fake_free_bytes(), *all = fake_total_bytes(), OK;
}
EXPORT int cudaMemcpy(void* to, const void* from, size_t bytes, int kind) {
  (void)kind;
  return fake_while_capturing() ? CAPTURE_IMPLICIT : fake_copy(to, 0, from, 0, bytes, 1, NULL);
}
EXPORT int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, Stream stream) {
  (void)kind;
  return fake_copy(to, 0, from, 0, bytes, 1, stream);
}
EXPORT int cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows,
                             int kind, Stream stream) {
  (void)kind;
  return fake_copy(to, to_pitch, from, from_pitch, width, rows, stream);
}
EXPORT int cudaMemset(void* to, int value, size_t bytes) { return fake_fill(to, value, bytes, NULL); }
EXPORT int cudaMemsetAsync(void* to, int value, size_t bytes, Stream stream) {
  return fake_fill(to, value, bytes, stream);
}
EXPORT int cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes) {
  (void)symbol;
  return memset(to, 0, bytes), OK;
}
EXPORT int cudaPointerGetAttributes(char* record, const void* address) {
  memset(record, 0, 88);
  put(record, 0, fake_is_device(address) ? 2 : fake_is_pinned(address) ? 1 : 0, 4);
  put(record, 8, (long long)(size_t)address, 8);
  return OK;
}
EXPORT int cudaMemPoolCreate(void** pool) { return *pool = fake_handle(), OK; }
EXPORT int cudaMemPoolGetAttribute(void* pool, int attribute, size_t* value) {
  (void)pool, (void)attribute;
  return *value = 0, OK;
}

/* ---- streams ---- */

EXPORT int cudaStreamCreate(Stream* stream) { return fake_new_stream(stream, 0); }
EXPORT int cudaStreamCreateWithFlags(Stream* stream, unsigned flags) { return fake_new_stream(stream, flags & 1); }
EXPORT int cudaStreamCreateWithPriority(Stream* stream, unsigned flags, int priority) {
  (void)priority;
  return fake_new_stream(stream, flags & 1);
}
EXPORT int cudaStreamSynchronize(Stream stream) { return fake_synchronise("cudaStreamSynchronize", stream); }
EXPORT int cudaDeviceSynchronize(void) { return fake_synchronise("cudaDeviceSynchronize", NULL); }
EXPORT int cudaEventSynchronize(void* event) { return (void)event, fake_synchronise("cudaEventSynchronize", NULL); }
EXPORT int cudaStreamIsCapturing(Stream stream, int* status) { return *status = fake_is_capturing(stream), OK; }
EXPORT int cudaStreamBeginCapture(Stream stream, int mode) {
  const char* const modes[] = {"global", "thread", "relaxed"};
  fake_note("capture mode", modes[mode], stream);
  return fake_begin_capture(stream);
}
EXPORT int cudaStreamEndCapture(Stream stream, void** graph) { return fake_end_capture(stream, graph); }
EXPORT int cudaGraphInstantiate(void** executable) { return *executable = fake_handle(), OK; }
EXPORT int cudaGraphLaunch(void* executable, Stream stream) {
  return (void)executable, fake_launch("graph", "cudaGraphLaunch", stream);
}
EXPORT int cudaEventCreate(void** event) { return *event = fake_handle(), OK; }
EXPORT int cudaEventCreateWithFlags(void** event, unsigned flags) { return (void)flags, *event = fake_handle(), OK; }
EXPORT int cudaEventRecord(void* event, Stream stream) { return (void)event, fake_note("event", "record", stream), OK; }
EXPORT int cudaEventRecordWithFlags(void* event, Stream stream, unsigned flags) {
  (void)flags;
  return cudaEventRecord(event, stream);
}
EXPORT int cudaStreamWaitEvent(Stream stream, void* event, unsigned flags) {
  (void)event, (void)flags;
  return fake_note("event", "wait", stream), OK;
}
EXPORT int cudaEventElapsedTime(float* milliseconds, void* from, void* to) {
  return (void)from, (void)to, *milliseconds = 1, OK;
}
