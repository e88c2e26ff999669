// All kernels of variants.h.
#include "chain.cuh"
#include "variants.h"

#define KERNEL(TYPE, FORMAT, MODE, BATCH, STAGES)                                                    \
  extern "C" __global__ void __launch_bounds__(lockkit_cuda::THREADS, 1)                             \
      chain_##TYPE##_##FORMAT##_##MODE(const __grid_constant__ lockkit_cuda::Args args) {            \
    using namespace lockkit_cuda;                                                                    \
    Chain<TYPE, FORMAT, MODE, BATCH, STAGES>(args).run();                                            \
  }

LOCKKIT_VARIANTS(KERNEL)
#if __CUDA_ARCH__ >= 900
LOCKKIT_CLUSTER_VARIANTS(KERNEL)
#endif
