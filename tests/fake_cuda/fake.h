/* What the parts of the fake share. `device.c` has it; the other libraries link to it. */
#pragma once
#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))
typedef void* Stream; /* NULL is the default stream */

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, CAPTURE_FORBIDS = 900, CAPTURE_IMPLICIT = 906 };

/* Append a line to the journal: what kind of call, its name, its stream. */
void fake_note(const char* kind, const char* name, Stream stream);
/* The error code that FAKE_CUDA_FAIL ("cudaMalloc=2,cuInit=100") asks for; 0 if it does not name this function. */
int fake_failure(const char* function);

/* Device memory. The addresses that callers get cannot be read by the host. */
int fake_allocate(void** address, size_t bytes);
int fake_free(void* address);
int fake_is_device(const void* address);
size_t fake_total_bytes(void);
size_t fake_free_bytes(void);
/* Copy between host and device in any direction; a row of `width` bytes, `rows` times. */
int fake_copy(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows, Stream stream);
int fake_fill(void* to, int value, size_t bytes, Stream stream);

/* Pinned host memory. */
int fake_allocate_host(void** address, size_t bytes);
int fake_free_host(void* address);
int fake_is_pinned(const void* address);

/* Streams, capture and graphs. */
int fake_new_stream(Stream* stream, int non_blocking);
int fake_synchronise(const char* name, Stream stream);
int fake_begin_capture(Stream stream);
int fake_end_capture(Stream stream, void** graph);
int fake_is_capturing(Stream stream);
int fake_while_capturing(void); /* CAPTURE_FORBIDS if any stream is being captured */
int fake_launch(const char* kind, const char* kernel, Stream stream);
/* A kernel that the driver's interface launches, which may be run (see device.c). */
int fake_kernel(const char* name, const unsigned* grid, const unsigned* block, unsigned shared, Stream stream,
                void** parameters);
void* fake_handle(void);
int fake_sm(void); /* compute capability, 90 for 9.0 */
int fake_device_attribute(int attribute);
int fake_device_count(void);
