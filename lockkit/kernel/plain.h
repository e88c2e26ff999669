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
    Matrix(Stream& stream, int k, int n, const Plain&)
        : stream_(&stream), offset_(stream.append(sizeof(T) * k * n)), k_(k), n_(n) {}

    // Copy rows [first_row, first_row + k) and columns [first, end) of a weight into the columns that start at `to`.
    void pack(const Weight& weight, int first_row, int first, int end, int to) {
      T* data = reinterpret_cast<T*>(stream_->at(offset_));
      for (int row = 0; row < std::min(k_, int(weight.dims[0]) - first_row); ++row)
        for (int i = first; i < std::min(end, int(weight.n)); ++i) {
          const int column = to + i - first, from = column / PANEL * PANEL;
          data[size_t(from) * k_ + size_t(row) * std::min(PANEL, n_ - from) + column - from] =
              weight.data[size_t(first_row + row) * weight.n + i];
        }
    }

    // `a` [m, k] as the left operand of `multiply`.
    Rows prepare(int, const float* a, int stride) const { return {a, stride}; }

    // A [m, k] times this matrix.
    void multiply(int m, const Rows& a, const Target& target) const {
      const T* data = reinterpret_cast<const T*>(stream_->at(offset_));
      for_tiles<ROWS, W>(m, n_, [&](auto rows, auto vectors, int row, int column, int width) {
        tile<decltype(rows)::value, decltype(vectors)::value>(a.data + row * a.stride, a.stride,
                                                              data + size_t(column) * k_, width, k_,
                                                              target.at(row, column));
      });
    }

   private:
    // One tile: A [R, k] times B [k, V * LANES], both row-major; sums stay in registers.
    template <int R, int V>
    static void tile(const float* a, int lda, const T* b, int ldb, int k, const Target& target) {
      Vector sum[R][V] = {};
      for (int i = 0; i < k; ++i, b += ldb) {
        Vector row[V];
        for (int v = 0; v < V; ++v) row[v] = load(b + v * LANES);
        fetch_ahead<R>(b, V * LANES * sizeof(T));
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) sum[r][v] += a[r * lda + i] * row[v];
      }
      finish(sum, target);
    }

    Stream* stream_;
    size_t offset_;
    int k_, n_;
  };
};

}  // namespace
