// What the host passes to the kernels for many tokens (prompt.cuh), and how thread blocks are divided.
#pragma once
#include "args.h"

namespace lockkit_cuda {

constexpr int PROMPT_THREADS = 256, PROMPT_WARPS = PROMPT_THREADS / 32;
constexpr int PROMPT_SHARED_BYTES = 96 << 10;  // that a thread block may have: two fit on many GPUs, one on all

// What a kernel is told. Matrices in scratch memory are words: of a tile of 16 x 16, each lane has 16 bytes, the A operand
// of m16n8k16. Tiles of a row of tiles follow each other.
struct PromptArgs {
  const void* x;                 // [tokens, hidden], for prompt_pack
  void* y;                       // [tokens, hidden], for the last DLR block
  const unsigned char* weights;  // of the DLR block, see pack.h: of gate and up, or of down
  const float* bias;             // [columns] of the DLR block, or null
  const float* output_bias;      // [hidden], or null
  void* packed_x;                // [rows, hidden] as words
  void* t;                       // [rows, hidden] as words; prompt_units reads it, prompt_stream writes it
  void* units;                   // [rows, rank] as words
  float* s;                      // the stream times the gain: each thread's own numbers
  int tokens, hidden, rank, gated, scales;
  int first, last;  // whether the DLR block is the chain's first or last
  float inverse_gain;
  Activation activation;

  HOST_DEVICE int columns() const { return rank * (gated ? 2 : 1); }
  HOST_DEVICE int hidden_tiles() const { return (hidden + TILE - 1) / TILE; }
};

// How the warps of a thread block share its part of a product.
struct PromptTiles {
  int m, n;           // tiles of 16 x 16 of a warp
  int rows, columns;  // warps along these
  int groups;         // of warps, each of which multiplies its share of k

  HOST_DEVICE constexpr int tile_rows() const { return m * rows; }
  HOST_DEVICE constexpr int tile_columns() const { return n * columns; }
  // Tiles along k that are copied to shared memory at a time, if a word of weights has `word_tiles`.
  HOST_DEVICE constexpr int step(int word_tiles) const {
    const int least = groups * word_tiles;
    return least > 4 ? least : 4;
  }
  // Bytes between words of weights in shared memory. Behind a word is room for the most scales.
  static HOST_DEVICE constexpr int word_pitch(int word_tiles) { return 32 * 16 + (word_tiles > 1 ? TILE * 4 * 2 : 0); }
  HOST_DEVICE constexpr int stage_bytes(int word_tiles) const {
    return step(word_tiles) * (tile_rows() * 32 * 16 + tile_columns() * word_pitch(word_tiles) / word_tiles);
  }
  // Stages on their way at any time, and the one that is used.
  HOST_DEVICE constexpr int stages(int word_tiles) const {
    const int fit = PROMPT_SHARED_BYTES / stage_bytes(word_tiles);
    return fit > 6 ? 6 : fit;
  }
  HOST_DEVICE constexpr int shared_bytes(int word_tiles) const { return stages(word_tiles) * stage_bytes(word_tiles); }
};

// For prompt_units or prompt_stream, and for this many rows of a thread block.
HOST_DEVICE constexpr PromptTiles prompt_tiles(bool units, int rows) {
  if (rows == 128) return {4, 2, 2, 4, 1};               // 128 x 128
  if (!units) return {2, 1, 2, 4, 1};                    // 64 x 64
  return rows == 64 ? PromptTiles{4, 2, 1, 2, 4} : PromptTiles{2, 2, 1, 1, 8};  // 64 x 64, 32 x 32
}

// The kernels that exist: X(type, format, name, units, rows of a thread block).
#define LOCKKIT_PROMPT_ROWS(X, TYPE, FORMAT) \
  X(TYPE, FORMAT, units, true, 128)          \
  X(TYPE, FORMAT, units, true, 64)           \
  X(TYPE, FORMAT, units, true, 32)           \
  X(TYPE, FORMAT, stream, false, 128)        \
  X(TYPE, FORMAT, stream, false, 64)
#define LOCKKIT_PROMPT_VARIANTS(X)        \
  LOCKKIT_PROMPT_ROWS(X, Half, Plain)     \
  LOCKKIT_PROMPT_ROWS(X, BFloat16, Plain) \
  LOCKKIT_PROMPT_ROWS(X, Half, Int4)      \
  LOCKKIT_PROMPT_ROWS(X, Half, Int8)

}  // namespace lockkit_cuda
