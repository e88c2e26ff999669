/* cuBLAS on the fake GPU: handles know their stream, products are written to the journal. `build.py` makes the rest. */
#include <stdlib.h>

#include "fake.h"

EXPORT int cublasCreate_v2(Stream** handle) { return *handle = calloc(1, sizeof **handle), OK; }
EXPORT int cublasDestroy_v2(Stream* handle) { return free(handle), OK; }
EXPORT int cublasSetStream_v2(Stream* handle, Stream stream) { return *handle = stream, OK; }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void* handle, void* operation, void* a, void* b, void* c, void* d,
                                          void* preference, int wanted, void* results, int* found) {
  (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference, (void)wanted, (void)results;
  return *found = 1, OK;
}
EXPORT int cublasLtMatmul(void* handle, void* operation, const void* alpha, const void* a, void* a_form, const void* b,
                          void* b_form, const void* beta, const void* c, void* c_form, void* d, void* d_form,
                          const void* algorithm, void* workspace, size_t workspace_bytes, Stream stream) {
  (void)handle, (void)operation, (void)alpha, (void)a, (void)a_form, (void)b, (void)b_form, (void)beta, (void)c;
  (void)c_form, (void)d, (void)d_form, (void)algorithm, (void)workspace, (void)workspace_bytes;
  return fake_launch("product", "cublasLtMatmul", stream);
}
