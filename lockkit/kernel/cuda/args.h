// What the host passes to a kernel, and how a kernel divides its shared memory. For nvcc and for any C++ compiler.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace lockkit_cuda {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int TILE = 16;            // weights are stored in tiles of 16 x 16
constexpr int BARRIER_BYTES = 128;  // barriers of two teams are not on one cache line

enum class Activation : int { silu, gelu, gelu_tanh, relu, relu_squared };

struct Args {
  const void* x;                 // [tokens, hidden]
  void* y;                       // [tokens, hidden]
  const unsigned char* weights;  // see pack.h
  const float* bias;             // [depth, columns], or null
  const float* output_bias;      // [hidden], or null
  const void* cross;             // GLOBAL only: cross products of the weights (cross.h), or null
  void* cross_to;                // GLOBAL only: not null: compute cross products only, see cross.h
  int cross_pitch;               // numbers between two columns there
  float* sums;                   // GLOBAL only: products [teams, team, rows of a team, columns of a span]
  void* units;                   // GLOBAL only: [teams, rows of a team, units of a span]
  unsigned* barriers;            // GLOBAL only: one in BARRIER_BYTES, zero before the first launch
  int tokens, hidden, depth;
  int scales;   // of quantised weights, in a word for each of its columns: 1, 2 or 4; else 0
  int rank;     // of every block, filled up to a multiple of 16
  int gated;    // 1: columns are gate and up in turn; 0: up alone
  int team;     // thread blocks that share a group of tokens
  int tiles;    // tiles of channels that each of them owns; the last ones may own fewer
  int chunk;    // units that are in shared memory at a time, a multiple of 16; CLUSTER: all; a span: all of the span
  int span;     // DLR blocks in a span; 1 without cross products
  float inverse_gain;
  Activation activation;

  HOST_DEVICE int columns() const { return rank * (gated ? 2 : 1); }
  HOST_DEVICE int hidden_tiles() const { return (hidden + TILE - 1) / TILE; }
  HOST_DEVICE int most_own_units() const { return (rank + team - 1) / team; }
};

// Bytes of a warp's words of 16 bytes in global memory, with the scales of 16 columns behind them.
HOST_DEVICE inline int word_bytes(int scales) { return 32 * 16 + TILE * scales * 2; }

// Pairs of two DLR blocks of a span, of which the later one is before block `j`.
HOST_DEVICE inline int pairs_before(int j) { return j * (j - 1) / 2; }

// Offsets in shared memory, in bytes.
struct Layout {
  // The ring of weights is at 0. `sums` are products: CLUSTER: this member's; a span: the sums for its own units.
  int t, units, sums, cross, bytes;

  HOST_DEVICE Layout(const Args& p, bool cluster, int rows, int stages) {
    t = stages * THREADS * (16 + 4 * p.scales);
    units = t + rows * t_pitch(p.tiles) * 2;
    sums = units + rows * unit_pitch(p.chunk) * 2;
    cross = sums + (cluster ? rows * sum_pitch(p.columns()) * 4 : p.span > 1 ? rows * p.most_own_units() * 8 : 0);
    bytes = cross + pairs_before(p.span) * p.most_own_units() * (p.gated ? 2 : 1) * p.rank * 2;
  }
  // Elements between rows. The extra ones keep the eight rows of a fragment on different banks.
  static HOST_DEVICE int t_pitch(int tiles) { return tiles * TILE + 8; }
  static HOST_DEVICE int unit_pitch(int chunk) { return chunk + 8; }
  static HOST_DEVICE int sum_pitch(int columns) { return columns + 8; }
};

}  // namespace lockkit_cuda
