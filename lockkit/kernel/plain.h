// Weights in fp32 or fp16, and products with them. Sums are fp32.
#pragma once
#include <vector>

#include "constants.h"
#include "memory.h"
#include "tiles.h"

namespace {

template <class T>
struct Plain {
  using Io = T;  // type of the chain's input and output

  explicit Plain(Constants&) {}

  // A thread's slice of channels starts at a multiple of this.
  int slice_step() const { return 1; }

  // A weight [k, n] as the graph stores it.
  struct Weight {
    const T* data;
    std::vector<int64_t> dims;
    int64_t n;

    bool fits(int64_t k) const { return dims == std::vector<int64_t>{k, n}; }
  };
  Weight read(Constants& constants) const {
    const Tensor tensor = constants.next(sizeof(T) == 4 ? ort::FLOAT : ort::FLOAT16);
    if (tensor.dims.size() != 2) throw std::runtime_error("DLRChain: a weight is not a matrix");
    return {static_cast<const T*>(tensor.data), tensor.dims, tensor.dims[1]};
  }

  // The left operand of a product, row-major.
  struct Rows {
    const float* data;
    int stride;
  };

  // A matrix [k, n] in panels of W vectors of columns, [n / panel][k][panel], so that a product reads it from start to
  // end. n is a whole number of vectors; the last panel may be narrower.
  template <int W>
  class Matrix {
   public:
    static constexpr int PANEL = W * LANES;
    Matrix(Arena& arena, int k, int n, const Plain&)
        : k_(k), n_(n), data_(static_cast<T*>(arena.allocate(sizeof(T) * k * n))) {}

    // Copy a weight into the columns that start at `column`.
    void pack(const Weight& weight, int column) {
      const int rows = int(weight.dims[0]), n = int(weight.n);
      for (int row = 0; row < rows; ++row)
        for (int i = 0; i < n; ++i) at(row, column + i) = weight.data[size_t(row) * n + i];
    }

    // Columns [k_from, k_to) of `a` as the left operand of `multiply`.
    Rows prepare(int, int k_from, int, const float* a, int stride) const { return {a + k_from, stride}; }

    // A [m, k_to - k_from] times rows [k_from, k_to) and columns [from, to) of this matrix. The result goes to
    // C [m, to - from], or updates the stream (see `finish`). `from` is the start of a panel.
    void multiply(int m, int k_from, int k_to, int from, int to, const Rows& a, float* c, int ldc,
                  const float* x = nullptr, float* t = nullptr) const {
      for_tiles<ROWS, W>(m, from, to, n_, [&](auto rows, auto vectors, int row, int column, int width) {
        const int at = row * ldc + column - from;
        const T* b = &data_[size_t(column) * k_ + size_t(k_from) * width];
        const float* these = a.data + row * a.stride;
        tile<decltype(rows)::value, decltype(vectors)::value>(these, a.stride, b, width, k_to - k_from, c + at, ldc,
                                                              x ? x + at : x, x ? t + at : t);
      });
    }

   private:
    T& at(int row, int column) {
      const int from = column / PANEL * PANEL;
      return data_[size_t(from) * k_ + size_t(row) * std::min(PANEL, n_ - from) + column - from];
    }

    // One tile: C [R, V * LANES] = A [R, k] B [k, V * LANES]. All are row-major; sums stay in registers.
    template <int R, int V>
    static void tile(const float* a, int lda, const T* b, int ldb, int k, float* c, int ldc, const float* x, float* t) {
      Vector sum[R][V] = {};
      for (int i = 0; i < k; ++i, b += ldb) {
        Vector row[V];
        for (int v = 0; v < V; ++v) row[v] = load(b + v * LANES);
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) sum[r][v] += a[r * lda + i] * row[v];
      }
      finish(sum, c, ldc, x, t);
    }

    int k_, n_;
    T* data_;
  };
};

}  // namespace
