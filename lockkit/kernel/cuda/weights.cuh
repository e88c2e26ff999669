// The weights of a chain, as one thread of the kernel reads them.
//
// Weights flow from global memory through a ring in shared memory, which goes on loading while the team meets. Each
// thread copies exactly the words that it will read itself, so the ring needs no barrier.
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

// The words that one thread multiplies, in order of use. STAGES of them are on their way at any time.
//
// A warp reads runs of consecutive words. For each DLR block of a span and each of the warp's tiles of columns of gate
// and up: the member's channels. Then, for each block, each chunk of units and each of the warp's tiles of channels: the
// chunk's units. FORMAT is `Plain`, `Int4` or `Int8`.
template <class FORMAT, int STAGES>
class Weights {
  static constexpr int TILES = FORMAT::TILES;

 public:
  DEVICE Weights(const Args& p, unsigned char* ring, int first_tile, int tiles, int warp, int lane, int outs)
      : p_(p), words_(ring + thread() * 16), scales_(ring + STAGES * THREADS * 16 + thread() * 4 * p.scales),
        span_(p.weights + lane * 16), scales_from_(32 * 16 - lane * 16 + lane / 4 * 4 * p.scales),
        first_(first_tile), tiles_(tiles), warp_(warp), outs_(outs), rank_words_(words(p.rank / TILE)),
        chunk_words_(words(p.chunk / TILE)), hidden_words_(words(p.hidden_tiles())),
        ins_((p.columns() / TILE - warp + WARPS - 1) / WARPS), chunks_((p.rank + p.chunk - 1) / p.chunk),
        blocks_left_(p.depth), of_span_(smaller(p.span, p.depth)) {
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) fetch();
  }

  // The next word.
  DEVICE Word peek() const {
    copy_wait<STAGES - 1>();
    return *reinterpret_cast<const Word*>(words_ + slot_ * (THREADS * 16));
  }
  // The B operands in tile `j` of the word that `peek` has returned.
  DEVICE Word tile(const Word& word, int j) const {
    if constexpr (TILES == 1) return word;
    else return FORMAT::tile(word, j, reinterpret_cast<const uint32_t*>(scales_ + scale_slot())[j * p_.scales / TILES]);
  }
  // Go on to the word after it. Call it when the word has been used: a later word takes its place.
  DEVICE void advance() { fetch(); }

 private:
  // Words that hold this many tiles.
  static DEVICE int words(int tiles) { return (tiles + TILES - 1) / TILES; }
  DEVICE int scale_slot() const { return slot_ * (THREADS * 4) * p_.scales; }

  DEVICE void fetch() {
    if (left_ == 0) next_run();
    if (left_ > 0) {
      copy_async<16>(words_ + slot_ * (THREADS * 16), at_);
      if constexpr (TILES > 1) fetch_scales(scales_ + scale_slot(), at_ + scales_from_);
      at_ += word_bytes(p_.scales);
      --left_;
    }
    copy_commit();
    slot_ = (slot_ + 1) % STAGES;
  }

  DEVICE void fetch_scales(unsigned char* to, const unsigned char* from) {
    if (p_.scales == 1) copy_async<4>(to, from);
    else if (p_.scales == 2) copy_async<8>(to, from);
    else copy_async<16>(to, from);
  }

  DEVICE void next_run() {
    while (left_ == 0 && blocks_left_ > 0) {
      const size_t in_words = size_t(p_.columns() / TILE) * hidden_words_;
      const size_t block_words = in_words + size_t(p_.hidden_tiles()) * rank_words_;
      size_t from = block_words * in_span_;
      if (run_ == (down_ ? chunks_ * outs_ : ins_)) {
        next_block(block_words);
        continue;
      }
      if (!down_) {
        from += size_t(warp_ + run_ * WARPS) * hidden_words_ + first_ / TILES;
        left_ = words(tiles_);
      } else {
        const int chunk = run_ / outs_, tile = WARPS - 1 - warp_ + run_ % outs_ * WARPS;
        from += in_words + size_t(first_ + tile) * rank_words_ + chunk * chunk_words_;
        left_ = smaller(chunk_words_, rank_words_ - chunk * chunk_words_);
      }
      at_ = span_ + from * word_bytes(p_.scales);
      ++run_;
    }
  }

  // Go on to the next block of the span, to its first one, or to the next span.
  DEVICE void next_block(size_t block_words) {
    run_ = 0;
    if (++in_span_ < of_span_) return;
    if (down_) {
      span_ += block_words * of_span_ * word_bytes(p_.scales);
      blocks_left_ -= of_span_;
      of_span_ = smaller(of_span_, blocks_left_);
    }
    in_span_ = 0, down_ = !down_;
  }

  const Args& p_;
  unsigned char *const words_, *const scales_;  // this thread's slots
  const unsigned char *span_, *at_ = nullptr;   // this thread's part of the span, and of the next word
  const int scales_from_;                       // from there to the word's scales
  const int first_, tiles_, warp_, outs_, rank_words_, chunk_words_, hidden_words_, ins_, chunks_;
  int blocks_left_, of_span_;  // DLR blocks: from this span on; in this span
  bool down_ = false;
  int in_span_ = 0, run_ = 0, left_ = 0, slot_ = 0;
};

}  // namespace lockkit_cuda
