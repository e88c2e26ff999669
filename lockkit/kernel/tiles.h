// Matrix products cut into tiles whose sums stay in registers.
#pragma once
#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace {

// Where a product goes. Without `x`, it is written to `to`, or added to what is there if `add`. With `x`, `to` is the
// stream s: the product is added to it, and x + s, the next block's input, is written to `t`.
struct Target {
  float* to;
  int stride;
  bool add = false;
  const float* x = nullptr;
  float* t = nullptr;

  Target at(int row, int column) const {
    const size_t offset = size_t(row) * stride + column;
    return {to + offset, stride, add, x ? x + offset : x, x ? t + offset : t};
  }
};

// Store a finished tile.
template <int R, int W>
inline void finish(const Vector (&sum)[R][W], const Target& target) {
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) {
      const int at = r * target.stride + w * LANES;
      if (!target.x && !target.add) {
        store(target.to + at, sum[r][w]);
        continue;
      }
      const Vector s = load(target.to + at) + sum[r][w];
      store(target.to + at, s);
      if (target.x) store(target.t + at, load(target.x + at) + s);
    }
}

// How far ahead of the weights in use the next ones are fetched into the cache. A thread's weights are packed in the
// order of use, so these may be those of the next product or block: memory goes on working while threads meet.
constexpr int AHEAD_BYTES = 16384;

// Fetch `bytes` of weights, AHEAD_BYTES after `at`. Only for a tile of one row (R = 1): its limit is memory.
template <int R>
inline void fetch_ahead(const void* at, int bytes) {
  constexpr int LINE_BYTES = 64;
  if constexpr (R == 1)
    for (int i = 0; i < bytes; i += LINE_BYTES)
      __builtin_prefetch(static_cast<const char*>(at) + AHEAD_BYTES + i, 0, 2);
}

// Call `tile(rows, vectors, row, column, width)` for each tile of a product [m, n]. The right matrix has n columns, in
// panels of W (2 or 3) vectors. `width` is the panel's number of columns. `rows` (at most R) and `vectors` are
// compile-time constants.
template <int R, int W, class F>
inline void for_tiles(int m, int n, F tile) {
  constexpr int PANEL = W * LANES;
  int row = 0;
  const auto rows = [&](auto count) {
    for (; row + count <= m; row += count)
      for (int column = 0; column < n; column += PANEL) {
        const int width = std::min(PANEL, n - column);
        if (width == PANEL) tile(count, std::integral_constant<int, W>{}, row, column, width);
        else if (width == LANES) tile(count, std::integral_constant<int, 1>{}, row, column, width);
        else tile(count, std::integral_constant<int, 2>{}, row, column, width);
      }
  };
  rows(std::integral_constant<int, R>{});
  if constexpr (R > 4) rows(std::integral_constant<int, 4>{});
  if constexpr (R > 2) rows(std::integral_constant<int, 2>{});
  rows(std::integral_constant<int, 1>{});
}

}  // namespace
