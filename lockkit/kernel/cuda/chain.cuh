// A whole DLR chain in one kernel, for a few tokens (decode) and for many (prefill).
//
// A team of thread blocks ("members") takes a group of 16 * MT tokens through the chain. Every member owns some of the
// hidden channels. For each DLR block:
//
// 1. A member writes its channels of t = x + s to shared memory, and multiplies them by its rows of gate and up. The
//    tensor cores compute tiles of 16 x 8.
// 2. The team meets. Each unit has one member that adds up the products of all members, in a fixed order, and applies
//    the bias and the activation: results do not depend on timing.
// 3. The team meets. Every member multiplies all units by its columns of down, and adds the result to its channels of s,
//    which stay in registers, in fp32, for the whole chain.
//
// With cross products (cross.h), several DLR blocks are a span, and meet less often. Since the products of t with a block
// are those of the span's first t, plus the cross products times the units of the span's blocks before it, step 1 is done
// once for all blocks of the span. Then step 2 and its meeting follow for one block after the other: between them, all
// members read the new units. Step 3 adds all units of the span. A span of B blocks meets B + 1 times, and not 2 B.
//
// The two modes differ in where the products and units of other members are, and in how the team meets:
//   GLOBAL   in global memory (in fact in the L2 cache), and a counter there. All members must be resident.
//   CLUSTER  in the members' shared memory, and the cluster's barrier. sm_90 and up, at most 16 members.
// With the same team, both give the same bits.
//
// weights.cuh brings the weights to the tensor cores. Integers become 16-bit floats on the way.
#pragma once
#include "parts.cuh"
#include "weights.cuh"

namespace lockkit_cuda {

enum Mode { GLOBAL, CLUSTER };

template <class T, class FORMAT, Mode MODE, int MT, int NT, int STAGES>
class Chain {
  static constexpr int ROWS = TILE * MT;
  static constexpr bool SPANS = MODE == GLOBAL && MT == 1;  // whether a span can have several DLR blocks
  using Tile = float[2][4];  // this thread's part of 16 rows and 16 columns of sums

 public:
  DEVICE explicit Chain(const Args& p)
      : p_(p), lane_(thread() % 32), warp_(thread() / 32), member_(block() % p.team), group_(block() / p.team),
        rows_(smaller(ROWS, p.tokens - group_ * ROWS)), first_(member_ * p.tiles), tiles_(own_tiles(p, first_)),
        first_unit_(p.rank * member_ / p.team), own_units_(p.rank * (member_ + 1) / p.team - first_unit_),
        layout_(p, MODE == CLUSTER, ROWS, STAGES),
        t_(reinterpret_cast<T*>(shared_memory + layout_.t)), units_(reinterpret_cast<T*>(shared_memory + layout_.units)),
        sums_(reinterpret_cast<float*>(shared_memory + layout_.sums)),
        all_sums_(p.sums + size_t(group_) * p.team * ROWS * p.columns() * p.span),
        all_units_(static_cast<T*>(p.units) + size_t(group_) * ROWS * p.rank * p.span),
        barrier_(p.barriers + group_ * (BARRIER_BYTES / 4)),
        weights_(p, shared_memory, first_, tiles_, warp_, lane_, (tiles_ - (WARPS - 1 - warp_) + WARPS - 1) / WARPS) {}

  DEVICE void run() {
    read();
#pragma unroll 1
    for (int l = 0; l < p_.depth; l += SPANS ? p_.span : 1) {
      const int blocks = SPANS ? smaller(p_.span, p_.depth - l) : 1;
      if (SPANS && blocks > 1) fetch_cross(l, blocks);
      write_t();
      sync_block();
#pragma unroll 1
      for (int j = 0; j < blocks; ++j) products(j);
      meet();
      if (SPANS && p_.cross_to) return write_cross();
#pragma unroll 1
      for (int j = 0; j < blocks; ++j) {
        activate_own_units(l, j);
        meet([&] { if (SPANS && j + 1 < blocks) sum_own_units(j + 1); });
        if (SPANS && p_.span > 1) stage_block(j);
      }
#pragma unroll 1
      for (int j = 0; j < blocks; ++j) update(j);
    }
    write();
  }

 private:
  static DEVICE int own_tiles(const Args& p, int first) {
    const int left = p.hidden_tiles() - first;
    return left < 0 ? 0 : smaller(p.tiles, left);
  }

  // The warp's n-th tile of the member's channels. Warps with few columns in `products` have more channels.
  DEVICE int own_tile(int n) const { return WARPS - 1 - warp_ + n * WARPS; }

  // Call body(m, n, half, i, row, channel) for each pair of channels of the stream in this thread's registers: entries
  // 2 i and 2 i + 1 of the fragments of two tiles of 16 x 8.
  template <class F>
  DEVICE void for_pairs(F body) const {
#pragma unroll
    for (int n = 0; n < NT; ++n)
      if (own_tile(n) < tiles_)
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              body(m, n, half, i, m * TILE + lane_ / 4 + 8 * i, own_tile(n) * TILE + half * 8 + lane_ % 4 * 2);
  }

  DEVICE void read() {
    for_pairs([&](int m, int n, int half, int i, int row, int channel) {
      const int column = first_ * TILE + channel;
      const T* from = static_cast<const T*>(p_.x) + size_t(group_ * ROWS + row) * p_.hidden + column;
      const float a = row < rows_ && column < p_.hidden ? to_float(from[0]) : 0.f;
      const float b = row < rows_ && column + 1 < p_.hidden ? to_float(from[1]) : 0.f;
      x_[m][n][half][i] = pack_pair<T>(a, b);
    });
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 8; ++i) s_[m][n][i / 4][i % 4] = 0.f;
  }

  DEVICE void write_t() {
    for_pairs([&](int m, int n, int half, int i, int row, int channel) {
      const float* s = &s_[m][n][half][2 * i];
      const Pair x = unpack_pair<T, Pair>(x_[m][n][half][i]);
      *reinterpret_cast<uint32_t*>(t_ + row * Layout::t_pitch(p_.tiles) + channel) =
          pack_pair<T>(x.v[0] + s[0], x.v[1] + s[1]);
    });
  }

  // Own channels of t times gate and up of block j of the span.
  DEVICE void products(int j) {
    const int columns = p_.columns();
    float* to = MODE == CLUSTER ? sums_ : all_sums_ + size_t(member_) * ROWS * columns * p_.span + j * columns;
    const int pitch = MODE == CLUSTER ? Layout::sum_pitch(columns) : columns * p_.span;
#pragma unroll 1
    for (int n = warp_; n < columns / TILE; n += WARPS) {
      Tile c[MT] = {};
#pragma unroll 1
      for (int k = 0; k < tiles_; k += FORMAT::TILES)
        multiply_word([&](int m) -> Tile& { return c[m]; }, t_ + k * TILE, Layout::t_pitch(p_.tiles), tiles_ - k);
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int row = m * TILE + lane_ / 4 + 8 * i;
            if (row >= rows_) continue;
            auto* at = reinterpret_cast<Pair*>(to + row * pitch + n * TILE + half * 8 + lane_ % 4 * 2);
            const Pair both{{c[m][half][2 * i], c[m][half][2 * i + 1]}};
            if (MODE == CLUSTER) *at = both;
            else store_for_all(at, both);
          }
    }
  }

  // Multiply columns of all rows at `from` by the next word of weights. Of its tiles, the first `left` are real.
  template <class F>
  DEVICE void multiply_word(F sums, const T* from, int pitch, int left) {
    const Word word = weights_.peek();
#pragma unroll
    for (int j = 0; j < FORMAT::TILES; ++j)
      if (j == 0 || j < left) multiply(sums, from + j * TILE, pitch, weights_.tile(word, j));
    weights_.advance();
  }

  // Multiply 16 columns of all rows at `from` by a tile of weights. Add the product of tile m of rows to sums(m).
  template <class F>
  DEVICE void multiply(F sums, const T* from, int pitch, const Word& b) const {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      uint32_t a[4];
      load_fragment(a, from + m * TILE * pitch, pitch, lane_);
      mma(sums(m)[0], a, b.v[0], b.v[1], T());
      mma(sums(m)[1], a, b.v[2], b.v[3], T());
    }
  }

  DEVICE void meet() { meet([] {}); }
  template <class F>
  DEVICE void meet(F meanwhile) {
    if (MODE == CLUSTER) sync_cluster();
    else meet_in_global_memory(barrier_, p_.team, member_ == 0, meanwhile);
  }

  // Call body(real, item, row, unit) for each row and each own unit, counted by `item`. Eight lanes share an item. If it
  // is not real, they only take part in sums over lanes.
  template <class F>
  DEVICE void for_own_units(F body) const {
    const int items = rows_ * own_units_;
#pragma unroll 1
    for (int base = warp_ * 4; base < items; base += WARPS * 4) {
      const bool real = base + lane_ / 8 < items;
      const int item = real ? base + lane_ / 8 : 0;
      body(real, item, item / own_units_, first_unit_ + item % own_units_);
    }
  }

  // Compute own units of block l, which is block j of the span.
  DEVICE void activate_own_units(int l, int j) {
    const int part = lane_ % 8, width = p_.gated ? 2 : 1;
    for_own_units([&](bool real, int item, int row, int unit) {
      Pair sum = SPANS && j ? own_sums()[item] : product(real, row, unit, j);
      if (SPANS && j) add_cross_product(sum, row, unit, j);
      if (!real) return;
      if (p_.bias) {
        const float* bias = p_.bias + size_t(l + j) * p_.columns() + unit * width;
        sum.v[0] += bias[0];
        if (p_.gated) sum.v[1] += bias[1];
      }
      const float value = activate(p_.activation, sum.v[0]) * (p_.gated ? sum.v[1] : 1.f);
      if (MODE == CLUSTER)
#pragma unroll 1
        for (int peer = part; peer < p_.team; peer += 8)
          *of_peer(units_ + row * Layout::unit_pitch(p_.chunk) + unit, peer) = from_float<T>(value);
      else if (part == 0)
        store_for_all(all_units_ + (row * p_.span + j) * p_.rank + unit, from_float<T>(value));
    });
  }

  // The product of a row of t with a unit of block j: of up, or of gate and up.
  DEVICE Pair product(bool real, int row, int unit, int j) const {
    const int columns = p_.columns();
    const Pair sum = real ? sum_of_members(row, j * columns + unit * (p_.gated ? 2 : 1), lane_ % 8) : Pair{};
    return Pair{{sum_of_eight(sum.v[0]), sum_of_eight(sum.v[1])}};
  }

  // The sum over members part, part + 8, ... of one column of a span, or of two if the chain is gated.
  DEVICE Pair sum_of_members(int row, int column, int part) const {
    Pair sum{};
#pragma unroll 4
    for (int peer = part; peer < p_.team; peer += 8) {
      const float* at = MODE == CLUSTER
                            ? of_peer(sums_, peer) + row * Layout::sum_pitch(p_.columns()) + column
                            : all_sums_ + (size_t(peer) * ROWS + row) * p_.columns() * p_.span + column;
      if (p_.gated) {
        const auto* pair = reinterpret_cast<const Pair*>(at);
        const Pair two = MODE == CLUSTER ? *pair : load_for_all(pair);
        sum.v[0] += two.v[0], sum.v[1] += two.v[1];
      } else {
        sum.v[0] += MODE == CLUSTER ? *at : load_for_all(at);
      }
    }
    return sum;
  }

  // ---- a span of several blocks ----

  DEVICE Pair* own_sums() const { return reinterpret_cast<Pair*>(sums_); }

  // Write the products of own units of block j to shared memory: they are there before the units of block j - 1.
  DEVICE void sum_own_units(int j) const {
    for_own_units([&](bool real, int item, int row, int unit) {
      const Pair sum = product(real, row, unit, j);
      if (real && lane_ % 8 == 0) own_sums()[item] = sum;
    });
  }

  // The cross products of own units of block j, in shared memory: [own columns][units of the blocks before it].
  DEVICE Word* own_cross(int j) const {
    const int own_columns = own_units_ * (p_.gated ? 2 : 1);
    return reinterpret_cast<Word*>(shared_memory + layout_.cross) + own_columns * pairs_before(j) * p_.rank / 8;
  }

  // Copy them, for all blocks of the span that begins with block l.
  DEVICE void fetch_cross(int l, int blocks) const {
    const int width = p_.gated ? 2 : 1, row_words = p_.rank / 8;
    const auto* span = static_cast<const Word*>(p_.cross) +
                       size_t(l / p_.span) * pairs_before(p_.span) * p_.columns() * row_words;
#pragma unroll 1
    for (int j = 1; j < blocks; ++j) {
      const Word* from = span + size_t(p_.columns() * pairs_before(j) + first_unit_ * width * j) * row_words;
#pragma unroll 1
      for (int i = thread(); i < own_units_ * width * j * row_words; i += THREADS)
        copy_async<16>(own_cross(j) + i, from + i);
    }
    copy_commit();
  }

  // Add the product of a row of all units of the span's blocks before block j with the cross products of a unit.
  DEVICE void add_cross_product(Pair& sum, int row, int unit, int j) const {
    const int words = j * p_.rank / 8;
    const auto* units = reinterpret_cast<const Word*>(units_ + row * Layout::unit_pitch(p_.chunk));
    const Word* first = own_cross(j) + (unit - first_unit_) * (p_.gated ? 2 : 1) * words;
    const Word* second = first + (p_.gated ? words : 0);
    Pair more{};
#pragma unroll 1
    for (int k = lane_ % 8; k < words; k += 8) {
      const Word a = units[k], b = first[k], c = second[k];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Pair x = unpack_pair<T, Pair>(a.v[i]), y = unpack_pair<T, Pair>(b.v[i]), z = unpack_pair<T, Pair>(c.v[i]);
        more.v[0] += x.v[0] * y.v[0] + x.v[1] * y.v[1];
        more.v[1] += x.v[0] * z.v[0] + x.v[1] * z.v[1];
      }
    }
    sum.v[0] += sum_of_eight(more.v[0]), sum.v[1] += sum_of_eight(more.v[1]);
  }

  // Bring the units of block j to shared memory, where they stay until the end of the span.
  DEVICE void stage_block(int j) {
    copy_wait<0>();  // before the barrier: cross products too
    stage_units(j * p_.rank, j * p_.rank, p_.rank);
    sync_block();
  }

  // Write products of rows of x with one block to `cross_to`.
  DEVICE void write_cross() const {
    for_own_units([&](bool real, int, int row, int unit) {
      const Pair sum = product(real, row, unit, 0);
      const int width = p_.gated ? 2 : 1, part = lane_ % 8;
      if (real && part < width)
        static_cast<T*>(p_.cross_to)[size_t(unit * width + part) * p_.cross_pitch + group_ * ROWS + row] =
            from_float<T>(part ? sum.v[1] : sum.v[0]);
    });
    copy_wait<0>();
  }

  // ---- the update ----

  // Copy `width` units of the span from global memory to column `to` of shared memory, for all rows.
  DEVICE void stage_units(int from, int to, int width) {
#pragma unroll 1
    for (int i = thread(); i < rows_ * width / 8; i += THREADS) {
      const int row = i / (width / 8), column = i % (width / 8) * 8;
      const T* at = all_units_ + row * p_.rank * p_.span + from + column;
      *reinterpret_cast<Word*>(units_ + row * Layout::unit_pitch(p_.chunk) + to + column) =
          load_for_all(reinterpret_cast<const Word*>(at));
    }
  }

  // Units of block j of the span times down, added to the stream.
  DEVICE void update(int j) {
    const int pitch = Layout::unit_pitch(p_.chunk);
#pragma unroll 1
    for (int start = 0; start < p_.rank; start += p_.chunk) {
      const int width = smaller(p_.chunk, p_.rank - start);
      if (MODE == GLOBAL && !(SPANS && p_.span > 1)) {
        if (start) sync_block();  // all have read the units before these
        stage_units(start, 0, width);
        sync_block();
      }
#pragma unroll
      for (int n = 0; n < NT; ++n)
        if (own_tile(n) < tiles_)
#pragma unroll 1
          for (int k = 0; k < width / TILE; k += FORMAT::TILES)
            multiply_word([&](int m) -> Tile& { return s_[m][n]; }, units_ + j * p_.rank + k * TILE, pitch,
                          width / TILE - k);
    }
  }

  DEVICE void write() {
    for_pairs([&](int m, int n, int half, int i, int row, int channel) {
      const float* s = &s_[m][n][half][2 * i];
      for (int j = 0; j < 2; ++j) {
        const int column = first_ * TILE + channel + j;
        if (row >= rows_ || column >= p_.hidden) continue;
        const float bias = p_.output_bias ? p_.output_bias[column] : 0.f;
        static_cast<T*>(p_.y)[size_t(group_ * ROWS + row) * p_.hidden + column] =
            from_float<T>(s[j] * p_.inverse_gain + bias);
      }
    });
  }

  const Args& p_;
  const int lane_, warp_, member_, group_;
  const int rows_;                    // tokens of this group
  const int first_, tiles_;           // own tiles of channels
  const int first_unit_, own_units_;  // own units, whose products this member adds up
  const Layout layout_;
  T *const t_, *const units_;
  float *const sums_, *const all_sums_;
  T* const all_units_;
  unsigned* const barrier_;
  Weights<FORMAT, STAGES> weights_;
  uint32_t x_[MT][NT][2][2];  // the input
  Tile s_[MT][NT];            // the stream times the gain
};

}  // namespace lockkit_cuda
