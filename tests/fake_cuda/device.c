/* A GPU that computes nothing: its memory, its streams, and a journal of all calls. With the CUDA driver's interface to it
 * (`driver.c`), this is `libcuda.so.1`.
 *
 * 1. Device memory is a file in memory, mapped twice. Callers get addresses in the first mapping, which nobody may read
 *    or write: the host that touches device memory without a copy crashes, as with a real GPU. Copies use the second.
 * 2. Kernels are written to the journal, not run. If FAKE_CUDA_KERNELS names a library with
 *      int run_kernel(const char* name, const unsigned grid[3], const unsigned block[3], unsigned shared_bytes,
 *                     void** parameters)
 *    then kernels that the driver's interface launches are given to it, one at a time, and device memory can be read while
 *    it runs. It returns 0, a CUDA error, or -1 for a kernel that it does not know. Their stream: `fake_kernel_stream`.
 * 3. While a stream is captured, calls that CUDA forbids there fail as they do in CUDA.
 *
 * Environment variables: FAKE_CUDA_SM (90), FAKE_CUDA_DEVICES (1), FAKE_CUDA_BYTES of device memory (8 GiB),
 * FAKE_CUDA_ATTRIBUTES of the device by their numbers in cuda.h ("16=4,97=49152"), FAKE_CUDA_FAIL (see fake.h),
 * FAKE_CUDA_CAPTURE_MS by which a capture takes longer, so that other threads meet it. */
#define _GNU_SOURCE
#include "fake.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096 };

typedef struct Block {
  char* at;
  size_t bytes;
  struct Block* next;
} Block;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static char *device, *alias; /* the two mappings */
static size_t total;
static Block *blocks, *pinned; /* in use, by address */
static Stream captured;
static int capturing;
static char* journal;
static size_t journal_used, journal_size;

static long long number(const char* variable, long long otherwise) {
  const char* text = getenv(variable);
  return text ? atoll(text) : otherwise;
}

static void map_memory(void) {
  total = (size_t)number("FAKE_CUDA_BYTES", 8ll << 30) / PAGE * PAGE;
  int file = memfd_create("fake device", 0);
  if (file < 0 || ftruncate(file, (off_t)total)) abort();
  device = mmap(NULL, total, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file, 0);
  alias = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  if (device == MAP_FAILED || alias == MAP_FAILED) abort();
  close(file);
}

static void start(void) { pthread_once(&once, map_memory); }

/* ---- journal ---- */

EXPORT void fake_note(const char* kind, const char* name, Stream stream) {
  pthread_mutex_lock(&mutex);
  size_t needed = strlen(kind) + strlen(name) + 64;
  if (journal_used + needed > journal_size) {
    journal_size = 2 * (journal_used + needed);
    journal = realloc(journal, journal_size);
  }
  int in_capture = capturing && stream == captured;
  journal_used += (size_t)sprintf(journal + journal_used, "%s\t%s\t%zu\t%d\n", kind, name, (size_t)stream, in_capture);
  pthread_mutex_unlock(&mutex);
}

/* The journal since the last call, as lines of kind, name, stream and "is it captured", separated by tabs. The caller
 * frees it with `fake_cuda_release`. */
EXPORT char* fake_cuda_take_journal(void) {
  pthread_mutex_lock(&mutex);
  char* taken = strndup(journal ? journal : "", journal_used);
  journal_used = 0;
  pthread_mutex_unlock(&mutex);
  return taken;
}
EXPORT void fake_cuda_release(char* taken) { free(taken); }

/* The number after `key=` in a variable such as "a=1,b=2"; `otherwise` if it is not there. */
static int entry(const char* variable, const char* key, int otherwise) {
  const char* text = getenv(variable);
  size_t length = strlen(key);
  for (const char* at = text ? strstr(text, key) : NULL; at; at = strstr(at + 1, key))
    if ((at == text || at[-1] == ',') && at[length] == '=') return atoi(at + length + 1);
  return otherwise;
}

EXPORT int fake_failure(const char* function) { return entry("FAKE_CUDA_FAIL", function, OK); }

/* ---- memory ---- */

static Block* find(Block* first, const void* address) {
  for (; first; first = first->next)
    if ((const char*)address >= first->at && (const char*)address < first->at + first->bytes) return first;
  return NULL;
}

EXPORT int fake_allocate(void** address, size_t bytes) {
  start();
  bytes = (bytes + PAGE - 1) / PAGE * PAGE + PAGE; /* an unused page behind each block */
  pthread_mutex_lock(&mutex);
  char* at = device;
  Block** link = &blocks;
  while (*link && (size_t)((*link)->at - at) < bytes) {
    at = (*link)->at + (*link)->bytes;
    link = &(*link)->next;
  }
  int fits = bytes <= total && at + bytes <= device + total;
  if (fits) {
    Block* block = malloc(sizeof *block);
    *block = (Block){at, bytes, *link};
    *link = block;
    *address = at;
  }
  pthread_mutex_unlock(&mutex);
  return fits ? OK : OUT_OF_MEMORY;
}

EXPORT int fake_free(void* address) {
  if (!address) return OK;
  pthread_mutex_lock(&mutex);
  Block** link = &blocks;
  while (*link && (*link)->at != address) link = &(*link)->next;
  Block* block = *link;
  if (block) {
    madvise(alias + (block->at - device), block->bytes, MADV_REMOVE);
    *link = block->next;
    free(block);
  }
  pthread_mutex_unlock(&mutex);
  return block ? OK : INVALID;
}

EXPORT int fake_is_device(const void* address) {
  return device && (const char*)address >= device && (const char*)address < device + total;
}
EXPORT size_t fake_total_bytes(void) {
  start();
  return total;
}
EXPORT size_t fake_free_bytes(void) {
  size_t used = 0;
  pthread_mutex_lock(&mutex);
  for (Block* block = blocks; block; block = block->next) used += block->bytes;
  pthread_mutex_unlock(&mutex);
  return fake_total_bytes() - used;
}

static int inside_a_block(const void* address, size_t bytes) {
  Block* block = find(blocks, address);
  return block && (const char*)address + bytes <= block->at + block->bytes;
}

static char* readable(const void* address) {
  return (char*)address + (fake_is_device(address) ? alias - device : 0);
}

static const char* place(const void* address) {
  return fake_is_device(address) ? "device" : fake_is_pinned(address) ? "pinned" : "pageable";
}

EXPORT int fake_copy(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows,
                     Stream stream) {
  char name[64];
  snprintf(name, sizeof name, "%s to %s", place(from), place(to));
  fake_note("copy", name, stream);
  if (!width || !rows) return OK;
  const void* ends[2] = {to, from};
  const size_t spans[2] = {(rows - 1) * to_pitch + width, (rows - 1) * from_pitch + width};
  for (int i = 0; i < 2; ++i)
    if (fake_is_device(ends[i]) && !inside_a_block(ends[i], spans[i])) return INVALID;
  for (size_t row = 0; row < rows; ++row)
    memmove(readable(to) + row * to_pitch, readable(from) + row * from_pitch, width);
  return OK;
}

EXPORT int fake_fill(void* to, int value, size_t bytes, Stream stream) {
  fake_note("fill", place(to), stream);
  if (!fake_is_device(to) || !inside_a_block(to, bytes)) return INVALID;
  memset(readable(to), value, bytes);
  return OK;
}

EXPORT int fake_allocate_host(void** address, size_t bytes) {
  bytes = (bytes + PAGE - 1) / PAGE * PAGE + PAGE;
  Block* block = malloc(sizeof *block);
  *block = (Block){aligned_alloc(PAGE, bytes), bytes, NULL};
  pthread_mutex_lock(&mutex);
  block->next = pinned;
  pinned = block;
  pthread_mutex_unlock(&mutex);
  *address = block->at;
  return OK;
}

EXPORT int fake_free_host(void* address) {
  pthread_mutex_lock(&mutex);
  Block** link = &pinned;
  while (*link && (*link)->at != address) link = &(*link)->next;
  Block* block = *link;
  if (block) *link = block->next;
  pthread_mutex_unlock(&mutex);
  if (block) free(block->at);
  free(block);
  return OK;
}

EXPORT int fake_is_pinned(const void* address) {
  pthread_mutex_lock(&mutex);
  int found = find(pinned, address) != NULL;
  pthread_mutex_unlock(&mutex);
  return found;
}

/* ---- streams, capture, kernels ---- */

EXPORT void* fake_handle(void) {
  static size_t last = 0x1000;
  return (void*)(__atomic_add_fetch(&last, 16, __ATOMIC_RELAXED));
}
EXPORT int fake_new_stream(Stream* stream, int non_blocking) {
  *stream = fake_handle();
  fake_note("stream", non_blocking ? "non-blocking" : "blocking", *stream);
  return OK;
}
EXPORT int fake_while_capturing(void) { return capturing ? CAPTURE_FORBIDS : OK; }
EXPORT int fake_is_capturing(Stream stream) { return capturing && stream == captured; }
EXPORT int fake_synchronise(const char* name, Stream stream) {
  fake_note("wait", name, stream);
  return fake_is_capturing(stream) || (capturing && !stream) ? CAPTURE_FORBIDS : fake_failure(name);
}
EXPORT int fake_begin_capture(Stream stream) {
  if (capturing || !stream) return CAPTURE_FORBIDS;
  fake_note("capture", "begin", stream);
  captured = stream;
  capturing = 1;
  usleep((useconds_t)number("FAKE_CUDA_CAPTURE_MS", 0) * 1000);
  return OK;
}
EXPORT int fake_end_capture(Stream stream, void** graph) {
  if (!fake_is_capturing(stream)) return CAPTURE_FORBIDS;
  capturing = 0;
  fake_note("capture", "end", stream);
  *graph = fake_handle();
  return OK;
}
EXPORT int fake_launch(const char* kind, const char* kernel, Stream stream) {
  fake_note(kind, kernel, stream);
  return capturing && !stream ? CAPTURE_IMPLICIT : fake_failure("launch");
}

EXPORT int fake_sm(void) { return (int)number("FAKE_CUDA_SM", 90); }
EXPORT int fake_device_count(void) { return (int)number("FAKE_CUDA_DEVICES", 1); }
static int usual_attribute(int attribute) {
  switch (attribute) {
    case 1: return 1024;        /* threads a block */
    case 8: return 49152;       /* shared memory a block, in bytes */
    case 10: return 32;         /* threads a warp */
    case 12: return 65536;      /* registers a block */
    case 16: return 132;        /* multiprocessors */
    case 38: return 50 << 20;   /* L2, in bytes */
    case 39: return 2048;       /* threads a multiprocessor */
    case 75: return fake_sm() / 10;
    case 76: return fake_sm() % 10;
    case 81: return 228 << 10;  /* shared memory a multiprocessor */
    case 82: return 65536;      /* registers a multiprocessor */
    case 97: return 227 << 10;  /* shared memory a block that opts in */
    case 120: return fake_sm() >= 90; /* launches of clusters */
    default: return 1;
  }
}
EXPORT int fake_device_attribute(int attribute) {
  char key[16];
  snprintf(key, sizeof key, "%d", attribute);
  return entry("FAKE_CUDA_ATTRIBUTES", key, usual_attribute(attribute));
}

static int run(const char* kernel, const unsigned* grid, const unsigned* block, unsigned shared, void** parameters) {
  typedef int Runner(const char*, const unsigned*, const unsigned*, unsigned, void**);
  static void* library;
  const char* path = getenv("FAKE_CUDA_KERNELS");
  if (!path) return OK;
  if (!library) library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  Runner* runner = library ? (Runner*)dlsym(library, "run_kernel") : NULL;
  if (!runner) {
    fprintf(stderr, "FAKE_CUDA_KERNELS: %s\n", dlerror());
    return INVALID;
  }
  static pthread_mutex_t running = PTHREAD_MUTEX_INITIALIZER;
  start();
  pthread_mutex_lock(&running);
  mprotect(device, total, PROT_READ | PROT_WRITE);
  int result = runner(kernel, grid, block, shared, parameters);
  mprotect(device, total, PROT_NONE);
  pthread_mutex_unlock(&running);
  return result < 0 ? OK : result;
}

static _Thread_local Stream kernel_stream;
EXPORT Stream fake_kernel_stream(void) { return kernel_stream; }
EXPORT int fake_kernel(const char* name, const unsigned* grid, const unsigned* block, unsigned shared, Stream stream,
                       void** parameters) {
  if (shared > (unsigned)fake_device_attribute(97)) return INVALID;
  int code = fake_launch("kernel", name, stream);
  kernel_stream = stream;
  return code ? code : run(name, grid, block, shared, parameters);
}
