// The weights of a chain, as one thread of the kernel reads them.
//
// Weights flow from global memory through a ring in shared memory, which goes on loading while members wait for each
// other. Each thread copies exactly the words that it will read itself, so the ring needs no barrier.
//
// A word of 16 bytes is a thread's part of one or several tiles of 16 x 16 that follow each other along k: for each
// tile, the B operands of two products, for columns 0 - 7 and 8 - 15. pack.h writes the words.
#pragma once
#include "parts.cuh"

namespace lockkit_cuda {

struct alignas(16) Word {
  uint32_t v[4];
};

// 16-bit floats: a word is one tile.
struct Plain {
  static constexpr int TILES = 1;
};

// Integers q of BITS bits for weights `scale * (q - middle)`, where `middle` is the middle of their range. Two
// neighbours along k are 16 bits apart in a word. Below the exponent of 1024 in fp16, the bits of q make a number:
// 1024 + q, or 1024 + 16 q in the upper half of a byte. One fused operation turns it into q - middle, exactly. The
// product with the scale is rounded to fp16.
template <int BITS>
struct NBits {
  static constexpr int TILES = 16 / BITS;

  // Tile `j` of a word, in fp16. `scales`: of this thread's columns in 0 - 7 (the low half) and in 8 - 15.
  static DEVICE Word tile(const Word& word, int j, uint32_t scales) {
    const uint32_t first = (scales & 0xffffu) * 0x10001u, second = (scales >> 16) * 0x10001u;
    if constexpr (BITS == 4) {
      const uint32_t low = word.v[j], high = low >> 8;
      return {{scaled(lower_half(low), first), scaled(upper_half(low), first), scaled(lower_half(high), second),
               scaled(upper_half(high), second)}};
    } else {
      const uint32_t a = word.v[2 * j], b = word.v[2 * j + 1];
      return {{scaled(byte(a), first), scaled(byte(a >> 8), first), scaled(byte(b), second),
               scaled(byte(b >> 8), second)}};
    }
  }

 private:
  // Pairs in fp16: 1024, 1, 1/16, and what is to be added: -(1024 + 8), -(1024 / 16 + 8), -(1024 + 128), -0.
  static constexpr uint32_t NUMBER = 0x64006400, ONE = 0x3c003c00, SIXTEENTH = 0x2c002c00;
  static constexpr uint32_t LOWER = 0xe408e408, UPPER = 0xd480d480, BYTE = 0xe480e480, NOTHING = 0x80008000;
  static DEVICE uint32_t lower_half(uint32_t v) { return multiply_add((v & 0x000f000fu) | NUMBER, ONE, LOWER); }
  static DEVICE uint32_t upper_half(uint32_t v) { return multiply_add((v & 0x00f000f0u) | NUMBER, SIXTEENTH, UPPER); }
  static DEVICE uint32_t byte(uint32_t v) { return multiply_add((v & 0x00ff00ffu) | NUMBER, ONE, BYTE); }
  static DEVICE uint32_t scaled(uint32_t pair, uint32_t scale) { return multiply_add(pair, scale, NOTHING); }
};
using Int4 = NBits<4>;
using Int8 = NBits<8>;

// The words that one thread multiplies, in order of use. STAGES batches of BATCH words are on their way at any time.
//
// A warp reads runs of consecutive words. For each DLR block: for each of the warp's tiles of columns of gate and up, the
// member's channels; then, for its tile of channels of down, its part of the units. A run begins with a new batch; the
// last batch of a run may be shorter. FORMAT is `Plain`, `Int4` or `Int8`.
template <class FORMAT, int BATCH, int STAGES>
class Weights {
  static constexpr int TILES = FORMAT::TILES;

 public:
  // Of a warp that takes `down_words` words from word `down_first` on of tile `tile` of channels.
  DEVICE Weights(const Args& p, unsigned char* ring, int first_tile, int tiles, int warp, int lane, int tile,
                 int down_first, int down_words)
      : depth_(p.depth), scales_(p.scales), step_(word_bytes(p.scales)), ins_((p.columns() / TILE - warp + WARPS - 1) / WARPS),
        in_words_((tiles + TILES - 1) / TILES), down_words_(down_words), words_(ring + thread() * 16),
        scales_at_(ring + BATCH * STAGES * THREADS * 16 + thread() * 4 * p.scales),
        scales_from_(32 * 16 - lane * 16 + lane / 4 * 4 * p.scales), block_(p.weights + lane * 16) {
    const size_t hidden_words = (p.hidden_tiles() + TILES - 1) / TILES, rank_words = (p.rank / TILE + TILES - 1) / TILES;
    const size_t all_in = p.columns() / TILE * hidden_words;
    first_in_ = (warp * hidden_words + first_tile / TILES) * step_, in_step_ = WARPS * hidden_words * step_;
    first_down_ = (all_in + (first_tile + tile) * rank_words + down_first) * step_;
    block_step_ = (all_in + p.hidden_tiles() * rank_words) * step_;
    next_in_ = block_ + first_in_;
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) fetch();
  }

  // Wait for the next batch.
  DEVICE void wait() const { copy_wait<STAGES - 1>(); }
  // Word `i` of that batch.
  DEVICE Word word(int i) const {
    return *reinterpret_cast<const Word*>(words_ + (slot_ * BATCH + i) * (THREADS * 16));
  }
  // The B operands in tile `j` of that word.
  DEVICE Word tile(const Word& word, int i, int j) const {
    if constexpr (TILES == 1) return word;
    else return FORMAT::tile(word, j, reinterpret_cast<const uint32_t*>(scales_of(i))[j * scales_ / TILES]);
  }
  // Go on to the batch after it. Call it when its words have been used: a later batch takes their place.
  DEVICE void advance() { fetch(); }

 private:
  DEVICE unsigned char* scales_of(int i) const { return scales_at_ + (slot_ * BATCH + i) * (THREADS * 4) * scales_; }

  DEVICE void fetch() {
    if (left_ == 0) next_run();
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
      if (i < left_) {
        copy_async<16>(words_ + (slot_ * BATCH + i) * (THREADS * 16), at_ + i * step_);
        if constexpr (TILES > 1) fetch_scales(scales_of(i), at_ + i * step_ + scales_from_);
      }
    copy_commit();
    at_ += BATCH * step_;
    left_ = left_ > BATCH ? left_ - BATCH : 0;
    slot_ = (slot_ + 1) % STAGES;
  }

  DEVICE void fetch_scales(unsigned char* to, const unsigned char* from) const {
    if (scales_ == 1) copy_async<4>(to, from);
    else if (scales_ == 2) copy_async<8>(to, from);
    else copy_async<16>(to, from);
  }

  DEVICE void next_run() {
    while (left_ == 0 && depth_ > 0) {
      at_ = next_in_, left_ = in_words_, next_in_ += in_step_;
      if (run_++ < ins_) continue;
      at_ = block_ + first_down_, left_ = down_words_;
      run_ = 0, --depth_, block_ += block_step_, next_in_ = block_ + first_in_;
    }
  }

  int depth_;  // blocks whose weights are still to be fetched
  const int scales_, step_, ins_, in_words_, down_words_;
  unsigned char *const words_, *const scales_at_;  // this thread's slots
  const int scales_from_;                          // from a word to its scales
  const unsigned char *block_, *next_in_, *at_ = nullptr;  // this thread's part of the block, its next tile, the next word
  size_t first_in_, in_step_, first_down_, block_step_;  // in bytes
  int run_ = 0, left_ = 0, slot_ = 0;
};

}  // namespace lockkit_cuda
