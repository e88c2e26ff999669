// Matrix products cut into tiles whose sums stay in registers.
#pragma once
#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace {

// Store a finished tile `sum`. Without `x`, write it to C. With `x`, C is the stream s: add the tile to it, and write
// x + s, the next block's input, to `t`.
template <int R, int W>
inline void finish(const Vector (&sum)[R][W], float* c, int ldc, const float* x, float* t) {
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) {
      const int at = r * ldc + w * LANES;
      if (!x) {
        store(c + at, sum[r][w]);
        continue;
      }
      const Vector s = load(c + at) + sum[r][w];
      store(c + at, s);
      store(t + at, load(x + at) + s);
    }
}

// Call `tile(rows, vectors, row, column, width)` for each tile of columns [from, to) of a product with m rows. The
// right matrix has n columns, in panels of W (2 or 3) vectors. `width` is the panel's number of columns. `rows` (at
// most R) and `vectors` are compile-time constants.
template <int R, int W, class F>
inline void for_tiles(int m, int from, int to, int n, F tile) {
  constexpr int PANEL = W * LANES;
  int row = 0;
  const auto rows = [&](auto count) {
    for (; row + count <= m; row += count)
      for (int column = from; column < to; column += PANEL) {
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
