// The kernels for many tokens. prompt.h has the order of their launches:
//
//   prompt_pack     packed_x = x
//   prompt_units    units = activation(t * gate) * (t * up), with t = x in the first DLR block
//   prompt_stream   s += units * down, and t = x + s; in the last DLR block, y instead of t
//
// A thread block computes a rectangle of the product. Both operands come through a ring in shared memory, as words that
// are fragments of the tensor cores already: the weights as pack.h has them, the others as the kernel before has written
// them. For an accumulator of 16 x 16 and an operand A of 16 x 16 give each lane the same eight numbers.
//
// From sm_90 on, where the plan says so, the blocks of the next kernel start while the last ones of a kernel run, and fetch
// weights.
#pragma once
#include "prompt_args.h"
#include "weights.cuh"

namespace lockkit_cuda {

struct alignas(16) Sums {
  float v[4];
};

template <class T, class FORMAT, bool UNITS, int ROWS>
class Prompt {
  static constexpr PromptTiles W = prompt_tiles(UNITS, ROWS);
  static constexpr int TILES = FORMAT::TILES, STEP = W.step(TILES), STAGES = W.stages(TILES), WORDS = STEP / TILES;
  static constexpr int PITCH = W.word_pitch(TILES), STAGE_BYTES = W.stage_bytes(TILES);  // of weights; of a stage
  static constexpr int WORD = 32 * 16, A_BYTES = W.tile_rows() * STEP * WORD;
  static constexpr int PARTS = W.m * W.n * 2, PLACES = W.rows * W.columns;  // fragments of a warp; warps of a group
  static constexpr int OWN = PARTS / W.groups;                              // fragments of a warp at the end
  static_assert(PROMPT_WARPS % STEP == 0 || STEP % PROMPT_WARPS == 0);
  static_assert(PLACES * W.groups == PROMPT_WARPS && PARTS % W.groups == 0 && WORDS % W.groups == 0 && STAGES >= 2);
  static_assert(UNITS || W.groups == 1);
  using Tile = float[2][4];  // this thread's part of 16 rows and 16 columns of sums

 public:
  DEVICE explicit Prompt(const PromptArgs& p)
      : p_(p), lane_(thread() % 32), warp_(thread() / 32), group_(warp_ / PLACES),
        k_tiles_(UNITS ? p.hidden_tiles() : p.rank / TILE), k_words_((k_tiles_ + TILES - 1) / TILES),
        n_tiles_(UNITS ? p.columns() / TILE : p.hidden_tiles()), word_parts_(word_bytes(p.scales) / 16) {
    const int blocks = (n_tiles_ + W.tile_columns() - 1) / W.tile_columns();
    first_row_ = block() / blocks * W.tile_rows(), first_column_ = block() % blocks * W.tile_columns();
    rows_ = unsigned(first_row_) * k_tiles_ * 32 + lane_;
    weights_ = unsigned(first_column_) * k_words_ * word_parts_ + lane_;
  }

  DEVICE void run() {
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) fetch_weights(i, i);
    UNITS ? start_with_bias() : start_with_stream();
    wait_for_previous_kernel();
    let_next_kernel_start();  // not sooner: it may rely on the kernel before this one
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
      fetch_rows(i, i);
      copy_commit();
    }
    const int stages = (k_tiles_ + STEP - 1) / STEP;
    int slot = 0;
#pragma unroll 1
    for (int i = 0; i < stages; ++i) {
      copy_wait<STAGES - 2>();
      sync_block();  // all copies of this stage are there, and all have used the stage before it
      const int next = slot == 0 ? STAGES - 1 : slot - 1;
      fetch_rows(i + STAGES - 1, next);
      fetch_weights(i + STAGES - 1, next);
      copy_commit();
      multiply(shared_memory + slot * STAGE_BYTES);
      slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    if constexpr (UNITS) finish_units();
    else finish_stream();
  }

 private:
  // Tiles of this warp: of the thread block's, and of all.
  DEVICE int own_row(int m) const { return warp_ % PLACES / W.columns * W.m + m; }
  DEVICE int own_column(int n) const { return warp_ % W.columns * W.n + n; }
  DEVICE int row_tile(int m) const { return first_row_ + own_row(m); }
  DEVICE int column_tile(int n) const { return first_column_ + own_column(n); }

  // Call body(m, n, half, c) for each fragment of 16 x 8 of this warp.
  template <class F>
  DEVICE void for_fragments(F body) {
#pragma unroll
    for (int m = 0; m < W.m; ++m)
#pragma unroll
      for (int n = 0; n < W.n; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) body(m, n, half, c_[m][n][half]);
  }

  // ---- copies to shared memory ----
  //
  // Each lane copies its part of a word. Behind the end of a matrix are zeros, which add nothing to a product.

  DEVICE void fetch_rows(int stage, int slot) const {
    const auto* rows = static_cast<const Word*>(UNITS ? p_.t : p_.units);
    unsigned char* to = shared_memory + slot * STAGE_BYTES + (warp_ * 32 + lane_) * 16;
#pragma unroll
    for (int i = 0; i < W.tile_rows() * STEP; i += PROMPT_WARPS) {
      const int row = STEP < PROMPT_WARPS ? i / STEP + warp_ / STEP : i / STEP;
      const int k = stage * STEP + (STEP < PROMPT_WARPS ? warp_ % STEP : i % STEP + warp_);
      copy_async_or_zeros(to + i * WORD, rows + (rows_ + unsigned(row * k_tiles_ + k) * 32), k < k_tiles_);
    }
  }

  DEVICE void fetch_weights(int stage, int slot) const {
    const auto* weights = reinterpret_cast<const Word*>(p_.weights);
    unsigned char* to = shared_memory + slot * STAGE_BYTES + A_BYTES + lane_ * 16;
#pragma unroll
    for (int i = 0; i < W.tile_columns() * WORDS; i += PROMPT_WARPS) {
      const int word = i + warp_, column = word / WORDS, k = stage * WORDS + word % WORDS;
      if (W.tile_columns() * WORDS % PROMPT_WARPS && word >= W.tile_columns() * WORDS) break;
      const Word* from = weights + (weights_ + unsigned(column * k_words_ + k) * word_parts_);
      const bool real = k < k_words_ && first_column_ + column < n_tiles_;
      copy_async_or_zeros(to + word * PITCH, from, real);
      if (TILES > 1 && lane_ < 2 * p_.scales) copy_async_or_zeros(to + word * PITCH + WORD, from + 32, real);
    }
  }

  // ---- products ----

  DEVICE void multiply(const unsigned char* stage) {
    const unsigned char* rows = stage + own_row(0) * STEP * WORD + lane_ * 16;
    const unsigned char* columns = stage + A_BYTES + own_column(0) * WORDS * PITCH;
#pragma unroll
    for (int i = 0; i < WORDS / W.groups; ++i) {
      const int word = i * W.groups + group_;
      Word b[W.n];
#pragma unroll
      for (int n = 0; n < W.n; ++n)
        b[n] = *reinterpret_cast<const Word*>(columns + (n * WORDS + word) * PITCH + lane_ * 16);
#pragma unroll
      for (int j = 0; j < TILES; ++j) {
        Word w[W.n];
#pragma unroll
        for (int n = 0; n < W.n; ++n) w[n] = tile(b[n], j, columns + (n * WORDS + word) * PITCH + WORD);
#pragma unroll
        for (int m = 0; m < W.m; ++m) {
          const Word a = *reinterpret_cast<const Word*>(rows + (m * STEP + word * TILES + j) * WORD);
#pragma unroll
          for (int n = 0; n < W.n; ++n) {
            mma(c_[m][n][0], a.v, w[n].v[0], w[n].v[1], T());
            mma(c_[m][n][1], a.v, w[n].v[2], w[n].v[3], T());
          }
        }
      }
    }
  }

  DEVICE Word tile(const Word& word, int j, const unsigned char* scales) const {
    if constexpr (TILES == 1) return word;
    else
      return FORMAT::tile(
          word, j, reinterpret_cast<const uint32_t*>(scales)[lane_ / 4 * p_.scales + j * p_.scales / TILES]);
  }

  // ---- units ----

  DEVICE void start_with_bias() {
#pragma unroll
    for (int n = 0; n < W.n; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Pair bias{};
        if (p_.bias && group_ == 0 && column_tile(n) < n_tiles_)
          bias = *reinterpret_cast<const Pair*>(p_.bias + column_tile(n) * TILE + half * 8 + lane_ % 4 * 2);
#pragma unroll
        for (int i = 0; i < W.m * 4; ++i) c_[i / 4][n][half][i % 4] = bias.v[i % 2];
      }
  }

  DEVICE void finish_units() {
    Sums own[OWN];
    if constexpr (W.groups > 1) share_sums();
#pragma unroll
    for (int i = 0; i < OWN; ++i) own[i] = W.groups > 1 ? sum_of_groups(i * W.groups + group_) : sums_of(i);
    switch (p_.activation) {
      case Activation::silu: activate_sums<Activation::silu>(own); break;
      case Activation::gelu: activate_sums<Activation::gelu>(own); break;
      case Activation::gelu_tanh: activate_sums<Activation::gelu_tanh>(own); break;
      case Activation::relu: activate_sums<Activation::relu>(own); break;
      default: activate_sums<Activation::relu_squared>(own);
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i) write_units(W.groups > 1 ? i * W.groups + group_ : i, own[i].v);
  }

  // Part (m * W.n + n) * 2 + half of this warp's sums.
  DEVICE Sums sums_of(int part) const {
    const float* c = c_[part / 2 / W.n][part / 2 % W.n][part % 2];
    return Sums{{c[0], c[1], c[2], c[3]}};
  }

  DEVICE Sums* shared_sums(int group, int part) const {
    const int warp = group * PLACES + warp_ % PLACES;
    return reinterpret_cast<Sums*>(shared_memory) + (warp * PARTS + part) * 32 + lane_;
  }
  // Each group writes its sums to shared memory, in place of the ring.
  DEVICE void share_sums() const {
    copy_wait<0>();  // the last copies are zeros, and may still be on their way
    sync_block();    // all have used the last stage
#pragma unroll
    for (int part = 0; part < PARTS; ++part) *shared_sums(group_, part) = sums_of(part);
    sync_block();
  }
  DEVICE Sums sum_of_groups(int part) const {
    Sums all{};
#pragma unroll
    for (int group = 0; group < W.groups; ++group) {
      const Sums one = *shared_sums(group, part);
#pragma unroll
      for (int j = 0; j < 4; ++j) all.v[j] += one.v[j];
    }
    return all;
  }

  // With a gate, even columns are gates.
  template <Activation WHICH>
  DEVICE void activate_sums(Sums (&own)[OWN]) const {
#pragma unroll
    for (int i = 0; i < OWN * 4; i += 2) own[i / 4].v[i % 4] = activate(WHICH, own[i / 4].v[i % 4]);
    if (p_.gated) return;
#pragma unroll
    for (int i = 1; i < OWN * 4; i += 2) own[i / 4].v[i % 4] = activate(WHICH, own[i / 4].v[i % 4]);
  }

  // Write the units of a part: two rows. With a gate, two neighbouring columns are one unit.
  DEVICE void write_units(int part, const float (&c)[4]) const {
    const int m = part / 2 / W.n, n = part / 2 % W.n, half = part % 2;
    if (column_tile(n) >= n_tiles_) return;
    if (p_.gated) {
      const int unit = column_tile(n) * TILE / 2 + half * 4 + lane_ % 4;
      T* to = static_cast<T*>(p_.units) + size_t(row_tile(m)) * p_.rank * TILE;
      to += (unit / TILE * 32 + lane_ / 4 * 4 + unit % 8 / 2) * 8 + unit % TILE / 8 * 4 + unit % 2;
      to[0] = from_float<T>(c[0] * c[1]), to[2] = from_float<T>(c[2] * c[3]);
    } else {
      uint32_t* to = static_cast<uint32_t*>(p_.units) + size_t(row_tile(m)) * p_.rank * TILE / 2;
      to += (column_tile(n) * 32 + lane_) * 4 + half * 2;
      to[0] = pack_pair<T>(c[0], c[1]), to[1] = pack_pair<T>(c[2], c[3]);
    }
  }

  // ---- the stream ----

  DEVICE Sums* own_stream() const {
    return reinterpret_cast<Sums*>(p_.s) + size_t(block()) * PARTS * PROMPT_THREADS + thread();
  }

  DEVICE void start_with_stream() {
    for_fragments([&](int m, int n, int half, float (&c)[4]) {
      Sums sums{};
      if (!p_.first) sums = load_from_l2(own_stream() + ((m * W.n + n) * 2 + half) * PROMPT_THREADS);
      for (int i = 0; i < 4; ++i) c[i] = sums.v[i];
    });
  }

  // Two rows of tiles at a time: loads come before stores, since a load after a store waits for the load before it.
  DEVICE void finish_stream() {
    if (p_.last) return finish_chain();
#pragma unroll
    for (int first = 0; first < W.m; first += 2) {
      Word t[2][W.n] = {};
      for_tiles(first, [&](int m, int n, size_t at) {
        t[m - first][n] = load_from_l2(static_cast<const Word*>(p_.packed_x) + at);
      });
      for_tiles(first, [&](int m, int n, size_t at) {
        Word& word = t[m - first][n];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* c = c_[m][n][half];
          own_stream()[((m * W.n + n) * 2 + half) * PROMPT_THREADS] = Sums{{c[0], c[1], c[2], c[3]}};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const Pair x = unpack_pair<T, Pair>(word.v[half * 2 + i]);
            word.v[half * 2 + i] = pack_pair<T>(x.v[0] + c[2 * i], x.v[1] + c[2 * i + 1]);
          }
        }
        static_cast<Word*>(p_.t)[at] = word;
      });
    }
  }

  // Call body(m, n, at) for the tiles of two rows of tiles that the stream has, with the place of this lane's words.
  template <class F>
  DEVICE void for_tiles(int first, F body) const {
#pragma unroll
    for (int m = first; m < first + 2; ++m)
#pragma unroll
      for (int n = 0; n < W.n; ++n)
        if (column_tile(n) < n_tiles_) body(m, n, (size_t(row_tile(m)) * n_tiles_ + column_tile(n)) * 32 + lane_);
  }

  DEVICE void finish_chain() const {
    Pair bias[W.n][2] = {};
    const auto column = [&](int n, int half) { return column_tile(n) * TILE + half * 8 + lane_ % 4 * 2; };
    if (p_.output_bias)
#pragma unroll
      for (int i = 0; i < W.n * 4; ++i) {
        const int at = column(i / 4, i / 2 % 2) + i % 2;
        if (at < p_.hidden) bias[i / 4][i / 2 % 2].v[i % 2] = p_.output_bias[at];
      }
#pragma unroll
    for (int i = 0; i < W.m * W.n * 4; ++i) {
      const int m = i / 4 / W.n, n = i / 4 % W.n, half = i / 2 % 2, row = row_tile(m) * TILE + lane_ / 4 + i % 2 * 8;
      const float* s = &c_[m][n][half][i % 2 * 2];
      const Pair& b = bias[n][half];
      write_y(row, column(n, half), Pair{{s[0] * p_.inverse_gain + b.v[0], s[1] * p_.inverse_gain + b.v[1]}});
    }
  }

  DEVICE void write_y(int row, int column, Pair value) const {
    if (row >= p_.tokens || column >= p_.hidden) return;
    T* to = static_cast<T*>(p_.y) + size_t(row) * p_.hidden + column;
    if (p_.hidden % 2 == 0) {
      *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(value.v[0], value.v[1]);
    } else {
      to[0] = from_float<T>(value.v[0]);
      if (column + 1 < p_.hidden) to[1] = from_float<T>(value.v[1]);
    }
  }

  const PromptArgs& p_;
  const int lane_, warp_, group_;
  const int k_tiles_, k_words_, n_tiles_;  // of the product
  const int word_parts_;                   // 16 bytes each, of a word of weights with its scales
  int first_row_, first_column_;  // tiles of this thread block
  unsigned rows_, weights_;       // where this lane's part of this thread block's first words is, in 16 bytes
  Tile c_[W.m][W.n];
};

// A warp packs one tile of x. Rows behind the last token are zeros.
DEVICE void prompt_pack(const PromptArgs& p) {
  const int lane = thread() % 32, tile = block() * PROMPT_WARPS + thread() / 32;
  const int first_row = tile / p.hidden_tiles() * TILE, first_column = tile % p.hidden_tiles() * TILE;
  Word word;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first_row + lane / 4 + i % 2 * 8, column = first_column + lane % 4 * 2 + i / 2 * 8;
    const uint16_t* from = static_cast<const uint16_t*>(p.x) + size_t(row) * p.hidden + column;
    const uint32_t low = row < p.tokens && column < p.hidden ? from[0] : 0;
    const uint32_t high = row < p.tokens && column + 1 < p.hidden ? from[1] : 0;
    word.v[i] = low | high << 16;
  }
  static_cast<Word*>(p.packed_x)[size_t(tile) * 32 + lane] = word;
}

}  // namespace lockkit_cuda
