// The kernels that exist. X(type, format, mode, BATCH, STAGES): the format of the weights, words in a batch, and batches
// on their way to a thread (weights.cuh). Their names are like chain_Half_Plain_GLOBAL. plan.h chooses the mode.
#pragma once

// A word of integers holds more weights, so batches are smaller. In mode GLOBAL there are many members, so that less on
// its way to each of them is enough, and GPUs with little shared memory use it.
#define LOCKKIT_VARIANTS(X)            \
  X(Half, Plain, GLOBAL, 4, 2)         \
  X(BFloat16, Plain, GLOBAL, 4, 2)     \
  X(Half, Int4, GLOBAL, 2, 2)          \
  X(Half, Int8, GLOBAL, 2, 2)
#define LOCKKIT_CLUSTER_VARIANTS(X)    \
  X(Half, Plain, CLUSTER, 4, 4)        \
  X(BFloat16, Plain, CLUSTER, 4, 4)    \
  X(Half, Int4, CLUSTER, 2, 4)         \
  X(Half, Int8, CLUSTER, 2, 4)

namespace lockkit_cuda {

// Words in the ring of such a kernel.
constexpr int ring_words(bool cluster, int bits) { return (cluster ? 16 : 8) / (bits == 16 ? 1 : 2); }

}  // namespace lockkit_cuda
