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

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int TILE = 16;        // weights are stored in tiles of 16 x 16
constexpr int MAX_ROWS = TILE;  // tokens that a team takes at a time

enum class Activation : int { silu, gelu, gelu_tanh, relu, relu_squared };

// Numbers on their way from one thread block to another through global memory (mode GLOBAL). A flag arrives with each
// number, since a GPU writes 8 bytes at once: who finds the flag that it waits for has the number, too.
struct alignas(16) Message {
  float first;
  unsigned first_flag;
  float second;
  unsigned second_flag;
};
struct alignas(8) ShortMessage {
  uint32_t content;
  unsigned flag;
};

struct Args {
  const void* x;                 // [tokens, hidden]
  void* y;                       // [tokens, hidden]
  const unsigned char* weights;  // see pack.h
  const float* bias;             // [depth, columns], or null
  const float* output_bias;      // [hidden], or null
  unsigned char* inboxes;        // GLOBAL only: of all members, zero before and after a launch
  int tokens, hidden, depth;
  int scales;     // of quantised weights, in a word for each of its columns: 1, 2 or 4; else 0
  int rank;       // of every block, filled up to a multiple of 16
  int gated;      // 1: columns are gate and up in turn; 0: up alone
  int team;       // thread blocks that share a group of tokens
  int tiles;      // tiles of channels that each of them owns; the last ones may own fewer
  int rows;       // tokens in a group, at most MAX_ROWS
  int parts;      // warps that share the products of one tile of channels with down: each takes a part of the units
  int own_pairs;  // units belong to members in pairs; the last members may own fewer
  float inverse_gain;
  Activation activation;

  HOST_DEVICE int columns() const { return rank * (gated ? 2 : 1); }
  HOST_DEVICE int hidden_tiles() const { return (hidden + TILE - 1) / TILE; }
  // Columns of gate and up, or of up alone, of a member's units.
  HOST_DEVICE int own_columns() const { return own_pairs * (gated ? 4 : 2); }
  // Bytes of a member's inbox in global memory: products for its own columns, then all units.
  HOST_DEVICE unsigned products_bytes() const { return unsigned(rows * team * own_columns() / 2) * sizeof(Message); }
  HOST_DEVICE unsigned inbox_bytes() const { return products_bytes() + unsigned(rows * rank / 2) * sizeof(ShortMessage); }
};

// Bytes of a warp's words of 16 bytes in global memory, with the scales of 16 columns behind them.
HOST_DEVICE inline int word_bytes(int scales) { return 32 * 16 + TILE * scales * 2; }

// Offsets in shared memory, in bytes. The ring of weights is at 0.
struct Layout {
  int t, x, units, parts, inbox, arrivals, bytes;

  // `ring_words`: words in the ring, for each thread.
  HOST_DEVICE Layout(const Args& p, bool cluster, int ring_words) {
    t = ring_words * THREADS * (16 + 4 * p.scales);
    x = t + p.rows * t_pitch(p.tiles) * 2;
    units = x + p.rows * t_pitch(p.tiles) * 2;
    parts = units + p.rows * unit_pitch(p.rank) * 2;
    inbox = parts + p.parts * p.rows * part_pitch(p.tiles) * 4;
    arrivals = inbox + (cluster ? p.rows * p.team * p.own_columns() * 4 : 0);
    bytes = arrivals + 16;
  }
  // Elements between rows. The extra ones keep the eight rows of a fragment on different banks.
  static HOST_DEVICE int t_pitch(int tiles) { return tiles * TILE + 8; }
  static HOST_DEVICE int unit_pitch(int rank) { return rank + 8; }
  static HOST_DEVICE int part_pitch(int tiles) { return tiles * TILE + 8; }
};

}  // namespace lockkit_cuda
