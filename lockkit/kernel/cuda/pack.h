// Weights in the order in which the kernel reads them.
//
// Every DLR block takes the same number of bytes. Ranks are filled up with zeros to the largest, and that to a multiple
// of 16. First gate and up, then down, in tiles of 16 x 16:
//   [tiles of columns][tiles of channels]: columns are gate and up of a unit in turn, or up alone
//   [tiles of channels][tiles of units]
// so that the tiles of neighbouring channels, or of neighbouring units, follow each other. In a tile, each of the 32
// lanes of a warp has its part of the two B operands of m16n8k16 (PTX manual): four pairs of neighbours along k.
//
// In 16 bits, a tile is 16 bytes for each lane, a word. In 8 or 4 bits, a word holds 2 or 4 tiles that follow each
// other; the last word of a row of tiles is filled up. The words of 32 lanes are followed by the scales of their
// weights, [8 columns][scales in a word][2: this column and the one 8 after it], in fp16. weights.cuh reads them.
#pragma once
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "args.h"

namespace lockkit_cuda {

struct Shape {
  int hidden = 0, depth = 0, rank = 0, gated = 0;
  int bits = 16, scales = 0;  // of a weight; in a word for each of its columns

  int columns() const { return rank * (gated ? 2 : 1); }
  const char* format() const { return bits == 16 ? "Plain" : bits == 8 ? "Int8" : "Int4"; }  // as in variants.h
  int word_tiles() const { return 16 / bits; }
  int hidden_tiles() const { return (hidden + TILE - 1) / TILE; }
  int hidden_words() const { return (hidden_tiles() + word_tiles() - 1) / word_tiles(); }
  int rank_words() const { return (rank / TILE + word_tiles() - 1) / word_tiles(); }
  // Of gate and up, or up alone; of all weights of a DLR block.
  size_t in_bytes() const { return size_t(columns() / TILE) * hidden_words() * word_bytes(scales); }
  size_t block_bytes() const { return in_bytes() + size_t(hidden_tiles()) * rank_words() * word_bytes(scales); }
};

// Where an element of a tile is: its lane, which of the lane's four pairs, and which of the two in the pair.
struct Place {
  int lane, pair, second;
  Place(int k, int n) : lane(n % 8 * 4 + k % 8 / 2), pair(n / 8 * 2 + k / 8), second(k % 2) {}
};

// A matrix [k, n] of 16-bit floats, as the graph stores it.
struct Matrix {
  const uint16_t* data = nullptr;
  int64_t k = 0, n = 0;

  bool takes(int64_t rows) const { return k == rows; }
  void describe(Shape&) const {}

  // Write column i to column first + i * step of a packed matrix with `row_words` words in a row of tiles.
  void pack(const Shape&, unsigned char* to, int64_t row_words, int first, int step) const {
    auto* words = reinterpret_cast<uint16_t*>(to);
    for (int64_t row = 0; row < k; ++row)
      for (int64_t i = 0; i < n; ++i) {
        const int64_t column = first + i * step;
        const Place at(int(row % TILE), int(column % TILE));
        uint16_t* word = words + ((column / TILE * row_words + row / TILE) * 32 + at.lane) * 8;
        word[at.pair * 2 + at.second] = data[row * n + i];
      }
  }
};

// A matrix [k, n] in the format of MatMulNBits: weights [n, blocks, block_size] of `bits` bits, low bits first, and
// scales [n, blocks] in fp16. A weight is its scale times (q - the middle of the range of q).
struct QuantisedMatrix {
  const uint8_t* data = nullptr;
  const uint16_t* scales = nullptr;
  int64_t blocks = 0, n = 0;
  int block_size = 0, bits = 0;

  bool takes(int64_t rows) const { return blocks == (rows + block_size - 1) / block_size; }
  void describe(Shape& shape) const { shape.bits = bits, shape.scales = std::max(1, 256 / bits / block_size); }

  void pack(const Shape& shape, unsigned char* to, int64_t row_words, int first, int step) const {
    const int word_rows = TILE * shape.word_tiles(), scale_rows = word_rows / shape.scales;
    const int64_t rows = std::min(row_words * word_rows, blocks * block_size);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t row = 0, column = first + i * step; row < rows; ++row) {
        unsigned char* word = to + (column / TILE * row_words + row / word_rows) * word_bytes(shape.scales);
        put(word, int(row % word_rows), int(column % TILE), q(i, row));
        if (row % scale_rows) continue;
        auto* at = reinterpret_cast<uint16_t*>(word + 32 * 16) + column % 8 * shape.scales * 2;
        at[row % word_rows / scale_rows * 2 + column % TILE / 8] = scales[i * blocks + row / block_size];
      }
  }

 private:
  int q(int64_t column, int64_t row) const {
    const size_t at = size_t(column) * blocks * block_size + row;
    return bits == 8 ? data[at] : data[at / 2] >> at % 2 * 4 & 15;
  }
  // Write a number to a word of zeros. Pairs of a tile follow each other from low bits to high ones; the second numbers
  // of two pairs (8 bits) or four (4 bits) are 16 bits above the first ones.
  void put(unsigned char* word, int k, int n, int value) const {
    const Place at(k % TILE, n);
    const int in_32_bits = 16 / bits, pair = k / TILE * 4 + at.pair;
    uint32_t* to = reinterpret_cast<uint32_t*>(word) + at.lane * 4 + pair / in_32_bits;
    *to |= uint32_t(value) << (pair % in_32_bits * bits + at.second * 16);
  }
};

// `M` is Matrix or QuantisedMatrix.
template <class M>
struct BlockWeights {
  M up, gate, down;                     // [hidden, units] twice, [units, hidden]; no gate: data is null
  const uint16_t *up_bias, *gate_bias;  // [units], or null
};

// The shape of a chain. Throws if its matrices do not fit together.
template <class M>
Shape shape_of(const std::vector<BlockWeights<M>>& blocks) {
  if (blocks.empty()) throw std::runtime_error("DLRChain: the chain has no blocks");
  Shape shape;
  shape.hidden = int(blocks[0].down.n), shape.depth = int(blocks.size()), shape.gated = blocks[0].gate.data != nullptr;
  blocks[0].up.describe(shape);
  for (const BlockWeights<M>& block : blocks) {
    const int64_t d = shape.hidden, r = block.up.n;
    const bool fits = block.up.takes(d) && block.down.takes(r) && block.down.n == d &&
                      (!shape.gated || (block.gate.takes(d) && block.gate.n == r));
    if (!fits || r < 1) throw std::runtime_error("DLRChain: shapes of weights do not match");
    shape.rank = std::max(shape.rank, int(r + TILE - 1) / TILE * TILE);
  }
  return shape;
}

// All weights of a chain, `depth * block_bytes()` bytes.
template <class M>
std::vector<unsigned char> pack_weights(const Shape& shape, const std::vector<BlockWeights<M>>& blocks) {
  std::vector<unsigned char> packed(shape.block_bytes() * shape.depth);
  const int width = shape.gated ? 2 : 1;
  for (int l = 0; l < shape.depth; ++l) {
    unsigned char* in = packed.data() + l * shape.block_bytes();
    if (shape.gated) blocks[l].gate.pack(shape, in, shape.hidden_words(), 0, width);
    blocks[l].up.pack(shape, in, shape.hidden_words(), width - 1, width);
    blocks[l].down.pack(shape, in + shape.in_bytes(), shape.rank_words(), 0, 1);
  }
  return packed;
}

// Biases of all units [depth, columns] as fp32, or nothing. `number` converts one of the graph's numbers.
template <class M, class F>
std::vector<float> pack_bias(const Shape& shape, const std::vector<BlockWeights<M>>& blocks, F number) {
  if (!blocks[0].up_bias) return {};
  const int width = shape.gated ? 2 : 1;
  std::vector<float> packed(size_t(shape.depth) * shape.columns());
  for (int l = 0; l < shape.depth; ++l)
    for (int64_t unit = 0; unit < blocks[l].up.n; ++unit) {
      float* at = &packed[size_t(l) * shape.columns() + unit * width];
      if (shape.gated) at[0] = number(blocks[l].gate_bias[unit]);
      at[width - 1] = number(blocks[l].up_bias[unit]);
    }
  return packed;
}

}  // namespace lockkit_cuda
