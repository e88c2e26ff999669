// The kernels that exist. X(type, format, mode, MT, NT, STAGES): the format of the weights (weights.cuh); a group of
// 16 * MT tokens; up to 16 * WARPS * NT channels in a thread block; STAGES words of weights on their way to a thread.
// Their names are like chain_Half_Plain_GLOBAL_1_1. plan.h chooses one of them.
#pragma once

#define LOCKKIT_PLAIN_SHAPES(X, TYPE, MODE) \
  X(TYPE, Plain, MODE, 1, 1, 16)            \
  X(TYPE, Plain, MODE, 1, 2, 16)            \
  X(TYPE, Plain, MODE, 4, 1, 8)             \
  X(TYPE, Plain, MODE, 4, 2, 8)
// A word holds more weights, so fewer are on their way. Many channels for many tokens would need too many registers.
#define LOCKKIT_INTEGER_SHAPES(X, FORMAT, MODE) \
  X(Half, FORMAT, MODE, 1, 1, 8)                \
  X(Half, FORMAT, MODE, 1, 2, 8)                \
  X(Half, FORMAT, MODE, 4, 1, 8)
#define LOCKKIT_VARIANTS(X, MODE)          \
  LOCKKIT_PLAIN_SHAPES(X, Half, MODE)      \
  LOCKKIT_PLAIN_SHAPES(X, BFloat16, MODE)  \
  LOCKKIT_INTEGER_SHAPES(X, Int4, MODE)    \
  LOCKKIT_INTEGER_SHAPES(X, Int8, MODE)
