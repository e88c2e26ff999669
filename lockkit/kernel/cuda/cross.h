// Cross products: of the down of a DLR block with the gate and up of a later block of its span.
//
// A span is DLR blocks that follow each other. If t is its input, block j's input is t + a_0 D_0 + ... + a_(j-1) D_(j-1),
// with units a and downs D. So its products with gate and up G_j are t G_j + a_0 (D_0 G_j) + ..., and the cross products
// D_i G_j let the kernel go from one block to the next without the stream (chain.cuh).
//
// The kernel computes them itself, when weights are loaded: the rows of D_0 to D_(j-1) are the `x` of a chain of block j
// alone, and `Args::cross_to` is where its products go. They are numbers of the activations' type. For each span, for
// each of its blocks j but the first: [columns of G_j][units of the blocks before it].
#pragma once
#include <algorithm>
#include <vector>

#include "pack.h"

namespace lockkit_cuda {

// Numbers in the cross products of the first `depth` blocks of a chain.
inline size_t cross_count(const Shape& shape, int span, int depth) {
  const size_t pairs = size_t(depth / span) * pairs_before(span) + pairs_before(depth % span);
  return pairs * shape.columns() * shape.rank;
}
inline size_t cross_count(const Shape& shape, int span) { return cross_count(shape, span, shape.depth); }

// Call compute(j, rows, x, to) for each block j that has a block before it in its span: `x` [rows, hidden] are the downs
// before it, as 16-bit floats, and `to` is the place of its cross products.
template <class M, class F>
void for_cross_products(const Shape& shape, const std::vector<BlockWeights<M>>& blocks, F compute) {
  std::vector<uint16_t> x(size_t(shape.span - 1) * shape.rank * shape.hidden);
  for (int first = 0; first < shape.depth; first += shape.span) {
    std::fill(x.begin(), x.end(), uint16_t(0));
    for (int j = 1; j < std::min(shape.span, shape.depth - first); ++j) {
      const BlockWeights<M>& before = blocks[first + j - 1];
      before.down.copy_to(x.data() + size_t(j - 1) * shape.rank * shape.hidden, before.up.n);
      compute(first + j, j * shape.rank, x.data(), cross_count(shape, shape.span, first + j));
    }
  }
}

}  // namespace lockkit_cuda
