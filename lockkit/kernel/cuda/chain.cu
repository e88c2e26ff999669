// All kernels of variants.h.
#include "chain.cuh"
#include "variants.h"

#define KERNEL(TYPE, FORMAT, MODE, MT, NT, STAGES)                                                         \
  extern "C" __global__ void __launch_bounds__(lockkit_cuda::THREADS, 1)                                   \
      chain_##TYPE##_##FORMAT##_##MODE##_##MT##_##NT(const __grid_constant__ lockkit_cuda::Args args) {    \
    using namespace lockkit_cuda;                                                                          \
    Chain<TYPE, FORMAT, MODE, MT, NT, STAGES>(args).run();                                                 \
  }

LOCKKIT_VARIANTS(KERNEL, GLOBAL)
#if __CUDA_ARCH__ >= 900
LOCKKIT_VARIANTS(KERNEL, CLUSTER)
#endif
