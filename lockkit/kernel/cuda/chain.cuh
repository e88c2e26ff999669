// A whole DLR chain in one kernel, for the few tokens of a decode step. prompt.cuh is for many.
//
// A team of thread blocks ("members") takes a group of up to 16 tokens through the chain. Every member owns some of the
// hidden channels, and some of the units of every DLR block. For each DLR block:
//
// 1. A member adds up the parts of s for its channels, and writes t = x + s to shared memory.
// 2. It multiplies t by its rows of gate and up. The tensor cores compute tiles of 16 x 8. It sends the products to the
//    owners of the units.
// 3. It waits for the products of all members for its own units, adds them up in a fixed order, and applies the bias and
//    the activation: results do not depend on timing. It sends the units to all members.
// 4. It waits for all units and multiplies them by its columns of down. Several warps share a tile of channels, each for
//    some of the units. Each adds its part to its part of s, which stays in registers, in fp32, for the whole chain.
//
// After the start, members wait for data alone, and no fence is needed. On an H100, a fence of a cluster takes 900
// cycles, and a barrier in global memory 1,800. The two modes differ in how data travel:
//   GLOBAL   through inboxes in global memory (in fact in the L2 cache). Each number has a flag, the number of its DLR
//            block. All members must be resident. A member clears its inbox at the end.
//   CLUSTER  to the shared memory of the receiver, where an object counts the bytes that have arrived ("mbarrier" in PTX).
//            sm_90 and up, at most 16 members.
// No data overtake others: a member sends products of a block only when it has all units of the one before it, and units
// only when it has the products of all members. With the same team, both modes give the same bits.
//
// weights.cuh brings the weights to the tensor cores. Integers become 16-bit floats on the way.
#pragma once
#include "parts.cuh"
#include "variants.h"
#include "weights.cuh"

namespace lockkit_cuda {

enum Mode { GLOBAL, CLUSTER };

template <class T, class FORMAT, Mode MODE, int BATCH, int STAGES>
class Chain {
  using Tile = float[2][4];  // this thread's part of 16 rows and 16 columns of sums
  static_assert(BATCH * STAGES == ring_words(MODE == CLUSTER, 16 / FORMAT::TILES));  // as the host plans

 public:
  DEVICE explicit Chain(const Args& p)
      : p_(p), lane_(thread() % 32), warp_(thread() / 32), member_(block() % p.team), group_(block() / p.team),
        rows_(smaller(p.rows, p.tokens - group_ * p.rows)), first_(member_ * p.tiles),
        tiles_(clamped(p.hidden_tiles() - first_, p.tiles)), tile_(warp_ % p.tiles), part_(warp_ / p.tiles),
        rank_words_((p.rank / TILE + FORMAT::TILES - 1) / FORMAT::TILES),
        down_first_(rank_words_ * part_ / p.parts),
        down_words_(tile_ < tiles_ && part_ < p.parts ? rank_words_ * (part_ + 1) / p.parts - down_first_ : 0),
        owners_per_pair_(1.f / p.own_pairs), own_units_(clamped(p.rank - member_ * p.own_pairs * 2, p.own_pairs * 2)),
        layout_(p, MODE == CLUSTER, BATCH * STAGES),
        t_(reinterpret_cast<T*>(shared_memory + layout_.t)), x_(reinterpret_cast<T*>(shared_memory + layout_.x)),
        units_(reinterpret_cast<T*>(shared_memory + layout_.units)),
        parts_(reinterpret_cast<float*>(shared_memory + layout_.parts)),
        inbox_(reinterpret_cast<float*>(shared_memory + layout_.inbox)),
        products_arrive_(reinterpret_cast<Arrivals*>(shared_memory + layout_.arrivals)),
        weights_(p, shared_memory, first_, tiles_, warp_, lane_, tile_, down_first_, down_words_) {}

  DEVICE void run() {
    if constexpr (MODE == CLUSTER) open_inbox();
    read();
#pragma unroll 1
    for (int l = 0; l < p_.depth; ++l) {
      write_t();
      products(l);
      activate_own_units(l);
      update(l);
    }
    write();
    if constexpr (MODE == GLOBAL) clear_inbox();
  }

 private:
  static DEVICE int clamped(int value, int most) { return value < 0 ? 0 : smaller(value, most); }

  // ---- 1. the stream ----

  // Call body(row, channel, both) for each pair of own channels: their number, and the sums of their parts of s.
  template <class F>
  DEVICE void for_pairs(F body) const {
    const int channels = tiles_ * TILE, pitch = Layout::part_pitch(p_.tiles);
#pragma unroll 1
    for (int i = thread() * 2; i < rows_ * channels; i += THREADS * 2) {
      const int row = rows_ == 1 ? 0 : i / channels, channel = i - row * channels;
      Pair sum{};
#pragma unroll 4
      for (int part = 0; part < p_.parts; ++part) {
        const Pair more = *reinterpret_cast<const Pair*>(parts_ + (part * p_.rows + row) * pitch + channel);
        sum.v[0] += more.v[0], sum.v[1] += more.v[1];
      }
      body(row, channel, sum);
    }
  }

  // Write this warp's part of s to shared memory, and wait for the other parts.
  DEVICE void collect_parts() const {
    float* to = parts_ + part_ * p_.rows * Layout::part_pitch(p_.tiles) + tile_ * TILE;
    if (part_ < p_.parts)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = lane_ / 4 + 8 * i;
          if (row < rows_)
            *reinterpret_cast<Pair*>(to + row * Layout::part_pitch(p_.tiles) + half * 8 + lane_ % 4 * 2) =
                Pair{{s_[half][2 * i], s_[half][2 * i + 1]}};
        }
    sync_block();
  }

  DEVICE void read() {
#pragma unroll
    for (int i = 0; i < 8; ++i) s_[i / 4][i % 4] = 0.f;
#pragma unroll 1
    for (int row = warp_; row < rows_; row += WARPS)
#pragma unroll 1
      for (int channel = lane_; channel < tiles_ * TILE; channel += 32) {
        const int column = first_ * TILE + channel;
        const T* from = static_cast<const T*>(p_.x) + size_t(group_ * p_.rows + row) * p_.hidden + column;
        x_[row * Layout::t_pitch(p_.tiles) + channel] = column < p_.hidden ? *from : from_float<T>(0.f);
      }
  }

  DEVICE void write_t() const {
    collect_parts();
    for_pairs([&](int row, int channel, Pair s) {
      const int at = row * Layout::t_pitch(p_.tiles) + channel;
      const Pair x = unpack_pair<T, Pair>(*reinterpret_cast<const uint32_t*>(x_ + at));
      *reinterpret_cast<uint32_t*>(t_ + at) = pack_pair<T>(x.v[0] + s.v[0], x.v[1] + s.v[1]);
    });
    sync_block();
  }

  DEVICE void write() const {
    collect_parts();
    for_pairs([&](int row, int channel, Pair s) {
      for (int j = 0; j < 2; ++j) {
        const int column = first_ * TILE + channel + j;
        if (column >= p_.hidden) continue;
        const float bias = p_.output_bias ? p_.output_bias[column] : 0.f;
        static_cast<T*>(p_.y)[size_t(group_ * p_.rows + row) * p_.hidden + column] =
            from_float<T>(s.v[j] * p_.inverse_gain + bias);
      }
    });
  }

  // ---- 2. products with gate and up ----

  DEVICE void products(int l) {
#pragma unroll 1
    for (int n = warp_; n < p_.columns() / TILE; n += WARPS) {
      Tile c = {};
      multiply_run(c, t_, Layout::t_pitch(p_.tiles), 0, tiles_);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = n * TILE + half * 8 + lane_ % 4 * 2;
        const int pair = p_.gated ? column / 4 : column / 2;  // of units
        const int owner = int((pair + 0.5f) * owners_per_pair_);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = lane_ / 4 + 8 * i;
          if (row >= rows_) continue;
          const int own_column = column - owner * p_.own_columns();
          send_products(owner, l, row, own_column, c[half][2 * i], c[half][2 * i + 1]);
        }
      }
    }
  }

  // Multiply all rows of tiles [first, end) of columns at `from` by the next run of weights.
  DEVICE void multiply_run(Tile& sums, const T* from, int pitch, int first, int end) {
    constexpr int TILES = FORMAT::TILES;
    from += lane_ % 4 * 2;
    // Rows that are no tokens are computed, too, and not used. They may hold anything: rows of a product do not mix.
    const T* low = from + smaller(lane_ / 4, p_.rows - 1) * pitch;
    const T* high = from + smaller(lane_ / 4 + 8, p_.rows - 1) * pitch;
#pragma unroll 1
    for (int k = first; k < end; k += BATCH * TILES) {
      weights_.wait();
      if (end - k >= BATCH * TILES) {
        multiply_words<BATCH>(sums, low + k * TILE, high + k * TILE, 0, BATCH * TILES);
      } else {
        constexpr int HALF = BATCH / 2;  // fewer words in vain
#pragma unroll 1
        for (int i = 0; i * TILES < end - k; i += HALF) {
          const int column = (k + i * TILES) * TILE;
          multiply_words<HALF>(sums, low + column, high + column, i, end - k - i * TILES);
        }
        weights_.advance();
      }
    }
  }

  // Multiply by N words of the batch, from `word` on. Of their tiles, the first `tiles` are real. If N is BATCH, go on to
  // the next batch.
  template <int N>
  DEVICE void multiply_words(Tile& sums, const T* low, const T* high, int word, int tiles) {
    constexpr int TILES = FORMAT::TILES;
    Word words[N];
    uint32_t a[N][TILES][4];
#pragma unroll
    for (int i = 0; i < N; ++i) words[i] = weights_.word(word + i);
#pragma unroll
    for (int i = 0; i < N * TILES; ++i) {
      const int column = (N == BATCH ? i : smaller(i, tiles - 1)) * TILE;
      load_fragment(a[i / TILES][i % TILES], low + column, high + column);
    }
    if constexpr (N == BATCH && TILES == 1) weights_.advance();  // integers still need their scales
#pragma unroll
    for (int i = 0; i < N * TILES; ++i) {
      if (N < BATCH && i >= tiles) continue;
      const Word b = weights_.tile(words[i / TILES], word + i / TILES, i % TILES);
      mma(sums[0], a[i / TILES][i % TILES], b.v[0], b.v[1], T());
      mma(sums[1], a[i / TILES][i % TILES], b.v[2], b.v[3], T());
    }
    if constexpr (N == BATCH && TILES > 1) weights_.advance();
  }

  // ---- 3. own units ----

  // Call body(real, row, unit) for each row and each own unit, counted from the first one. Eight lanes share them. If it is
  // not real, they only take part in sums over lanes. Sixteen lanes have two units that follow each other.
  template <class F>
  DEVICE void for_own_units(F body) const {
    const int items = rows_ * own_units_;
#pragma unroll 1
    for (int base = warp_ * 4; base < items; base += WARPS * 4) {
      const bool real = base + lane_ / 8 < items;
      const int item = real ? base + lane_ / 8 : 0, row = rows_ == 1 ? 0 : item / own_units_;
      body(real, row, item - row * own_units_);
    }
  }

  DEVICE void activate_own_units(int l) const {
    if (own_units_ == 0) return;
    if constexpr (MODE == CLUSTER) {
      wait_for_arrivals(products_arrive_, l & 1);
      if (thread() == 0 && l + 1 < p_.depth) expect_products();
    }
    const int part = lane_ % 8, width = p_.gated ? 2 : 1, first_unit = member_ * p_.own_pairs * 2;
    for_own_units([&](bool real, int row, int unit) {
      const Pair members = real ? sum_of_members(l, row, unit, part) : Pair{};
      Pair sum{{sum_of_eight(members.v[0]), sum_of_eight(members.v[1])}};
      if (p_.bias) {
        const float* bias = p_.bias + size_t(l) * p_.columns() + (first_unit + unit) * width;
        sum.v[0] += bias[0];
        if (p_.gated) sum.v[1] += bias[1];
      }
      const float value = activate(p_.activation, sum.v[0]) * (p_.gated ? sum.v[1] : 1.f);
      const float other = of_lane_across(value, 8);
      const uint32_t both = unit % 2 ? pack_pair<T>(other, value) : pack_pair<T>(value, other);
      if (real)
#pragma unroll 1
        for (int peer = lane_ % 16; peer < p_.team; peer += 16) send_units(peer, l, row, first_unit + unit / 2 * 2, both);
    });
  }

  // The sum over members part, part + 8, ... of the products for an own unit: of up, or of gate and up.
  DEVICE Pair sum_of_members(int l, int row, int unit, int part) const {
    constexpr int N = MODE == GLOBAL ? 4 : 2;  // at once
    Pair sum{};
#pragma unroll 1
    for (int first = part; first < p_.team; first += 8 * N) {
      Pair found[N];
      products_of_members(found, first, l, row, unit);
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (first + 8 * i < p_.team) sum.v[0] += found[i].v[0], sum.v[1] += found[i].v[1];
    }
    return sum;
  }

  // ---- 4. the update ----

  DEVICE void update(int l) {
    if constexpr (MODE == CLUSTER) {
      wait_for_arrivals(products_arrive_ + 1, l & 1);
      if (thread() == 0 && l + 1 < p_.depth) expect_units();
    } else {
      receive_units(l);
      sync_block();
    }
    if (down_words_ > 0)
      multiply_run(s_, units_, Layout::unit_pitch(p_.rank), down_first_ * FORMAT::TILES,
                   smaller((down_first_ + down_words_) * FORMAT::TILES, p_.rank / TILE));
  }

  // ---- messages, CLUSTER ----

  DEVICE void expect_products() const {
    expect_bytes(products_arrive_, rows_ * p_.team * own_units_ * (p_.gated ? 8 : 4));
  }
  DEVICE void expect_units() const { expect_bytes(products_arrive_ + 1, rows_ * p_.rank * 2); }

  DEVICE void open_inbox() const {
    if (thread() == 0) {
      init_arrivals(products_arrive_), init_arrivals(products_arrive_ + 1);
      expect_products(), expect_units();  // no products come if there are no own units, and nobody waits for them
    }
    sync_cluster();
  }

  // The place of products in the shared memory of their receiver.
  DEVICE float* place(int sender, int row, int own_column) const {
    return inbox_ + (sender * p_.rows + row) * p_.own_columns() + own_column;
  }

  // ---- messages, GLOBAL ----

  DEVICE unsigned char* inbox_of(int member) const {
    return p_.inboxes + size_t(group_ * p_.team + member) * p_.inbox_bytes();
  }
  DEVICE Message* message(int receiver, int sender, int row, int own_pair) const {
    return reinterpret_cast<Message*>(inbox_of(receiver)) + (row * (p_.own_columns() / 2) + own_pair) * p_.team + sender;
  }
  DEVICE ShortMessage* short_message(int receiver, int i) const {
    return reinterpret_cast<ShortMessage*>(inbox_of(receiver) + p_.products_bytes()) + i;
  }

  DEVICE void receive_units(int l) const {
    const int pairs = p_.rank / 2;
#pragma unroll 1
    for (int i = thread(); i < rows_ * pairs; i += THREADS) {
      const int row = rows_ == 1 ? 0 : i / pairs;
      const ShortMessage* at = short_message(member_, i);
      ShortMessage found = receive(at);
      for (long long since = 0; found.flag != unsigned(l + 1); found = receive(at)) wait_a_little(since);
      *reinterpret_cast<uint32_t*>(units_ + row * Layout::unit_pitch(p_.rank) + (i - row * pairs) * 2) = found.content;
    }
  }

  // All messages to this member have come, and no other ones will.
  DEVICE void clear_inbox() const {
    auto* words = reinterpret_cast<Word*>(inbox_of(member_));
#pragma unroll 1
    for (int i = thread(); i < int(p_.inbox_bytes() / sizeof(Word)); i += THREADS) words[i] = Word{};
  }

  // ---- messages, both modes ----

  DEVICE void send_products(int owner, int l, int row, int own_column, float first, float second) const {
    if constexpr (MODE == CLUSTER) send_async(place(member_, row, own_column), owner, Pair{{first, second}}, products_arrive_);
    else send(message(owner, member_, row, own_column / 2), Message{first, unsigned(l + 1), second, unsigned(l + 1)});
  }

  // The products for an own unit of members first, first + 8, ...
  template <int N>
  DEVICE void products_of_members(Pair (&found)[N], int first, int l, int row, int unit) const {
    const float* inbox = place(first, row, unit * (p_.gated ? 2 : 1));
    const Message* at = message(member_, first, row, p_.gated ? unit : unit / 2);
    for (long long since = 0;; wait_a_little(since)) {
      bool complete = true;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (first + 8 * i >= p_.team) continue;
        if constexpr (MODE == CLUSTER) {
          const float* from = inbox + i * 8 * p_.rows * p_.own_columns();
          found[i] = p_.gated ? *reinterpret_cast<const Pair*>(from) : Pair{{*from, 0.f}};
        } else {
          const Message content = receive(at + 8 * i);
          complete &= content.first_flag == unsigned(l + 1) && content.second_flag == unsigned(l + 1);
          found[i] = p_.gated ? Pair{{content.first, content.second}} : Pair{{unit % 2 ? content.second : content.first, 0.f}};
        }
      }
      if (complete) return;
    }
  }

  DEVICE void send_units(int peer, int l, int row, int unit, uint32_t both) const {
    if constexpr (MODE == CLUSTER) send_async(units_ + row * Layout::unit_pitch(p_.rank) + unit, peer, both, products_arrive_ + 1);
    else send(short_message(peer, (row * p_.rank + unit) / 2), ShortMessage{both, unsigned(l + 1)});
  }

  const Args& p_;
  const int lane_, warp_, member_, group_;
  const int rows_;                          // tokens of this group
  const int first_, tiles_;                 // own tiles of channels
  const int tile_, part_;                   // this warp's tile of them in `update`, and its part of the units
  const int rank_words_, down_first_, down_words_;  // words of weights: of a tile of down; of this warp's part
  const float owners_per_pair_;             // of units: the members that own a pair
  const int own_units_;
  const Layout layout_;
  T *const t_, *const x_, *const units_;
  float *const parts_, *const inbox_;
  Arrivals* const products_arrive_;  // of products, and of units behind it
  Weights<FORMAT, BATCH, STAGES> weights_;
  Tile s_;  // this warp's part of the stream times the gain
};

}  // namespace lockkit_cuda
