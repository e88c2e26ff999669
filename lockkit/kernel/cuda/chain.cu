// All kernels: of variants.h, and for many tokens.
#include "chain.cuh"
#include "prompt.cuh"
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

// Names are like prompt_units_Half_Plain_128.
#define PROMPT_KERNEL(TYPE, FORMAT, NAME, UNITS, ROWS)                                                     \
  extern "C" __global__ void __launch_bounds__(lockkit_cuda::PROMPT_THREADS, 2)                            \
      prompt_##NAME##_##TYPE##_##FORMAT##_##ROWS(const __grid_constant__ lockkit_cuda::PromptArgs args) {  \
    using namespace lockkit_cuda;                                                                          \
    Prompt<TYPE, FORMAT, UNITS, ROWS>(args).run();                                                         \
  }

LOCKKIT_PROMPT_VARIANTS(PROMPT_KERNEL)
extern "C" __global__ void prompt_pack(const __grid_constant__ lockkit_cuda::PromptArgs args) {
  lockkit_cuda::prompt_pack(args);
}
