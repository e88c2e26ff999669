// Weights in int8 or int4 in the format of MatMulNBits, and products with them.
//
// A weight is `scale * (q - middle)`. q has BITS bits; `middle` is the middle of its range, 128 or 8. There is one
// scale per column and block of `block_size` rows. The left operand is rounded to 8 bits, as the operator's accuracy
// level 4 allows and as onnxruntime does: each row is cut into the same blocks, and a block is `scale_a * i`, with i in
// -127 .. 127. So the product of a block is, with sums of integers,
//
//     scale * scale_a * (sum(q * i) - middle * sum(i))
//
// The second sum is computed once per row of the left operand. Blocks are added up in fp32. Weights are widened only
// in registers. Processors with VNNI add four products of bytes to each 32-bit lane in one instruction (`Sums`).
#pragma once
#include <vector>

#include "constants.h"
#include "memory.h"
#include "tiles.h"

namespace {

// Sums of products of bytes: each 32-bit lane adds up the products of its four weights and its four values.
// `add` takes weights as they are stored, 0 .. 2^BITS - 1, and values from -127 to 127. `flush` must follow at most
// eight calls of `add`. If SIGNED, `total` is that of the weights less the middle of their range.
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
// Pairs of products are added up in 16 bits. Eight pairs of int4 fit: 8 * 2 * 15 * 127. A single pair of int8 fits if
// weights are signed, 2 * 128 * 127, and is widened at once.
template <int BITS>
struct Sums {
  static constexpr bool SIGNED = BITS == 8;
  Integers total;
  __m256i pairs = _mm256_setzero_si256();

  void add(Integers weights, Integers values) {
    const __m256i w = reinterpret_cast<__m256i>(weights), v = reinterpret_cast<__m256i>(values);
    if (SIGNED) {
      const __m256i less = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
      widen(_mm256_maddubs_epi16(_mm256_abs_epi8(less), _mm256_sign_epi8(v, less)));
    } else {
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w, v));
    }
  }
  void flush() {
    if (SIGNED) return;
    widen(pairs);
    pairs = _mm256_setzero_si256();
  }

 private:
  void widen(__m256i of) { total += reinterpret_cast<Integers>(_mm256_madd_epi16(of, _mm256_set1_epi16(1))); }
};
#else
template <int BITS>
struct Sums {
  static constexpr bool SIGNED = false;
  Integers total;

  void add(Integers weights, Integers values) {
#if defined(__AVX512VNNI__)
    total = reinterpret_cast<Integers>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(total), reinterpret_cast<__m512i>(weights), reinterpret_cast<__m512i>(values)));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
    total = reinterpret_cast<Integers>(_mm256_dpbusd_avx_epi32(
        reinterpret_cast<__m256i>(total), reinterpret_cast<__m256i>(weights), reinterpret_cast<__m256i>(values)));
#else
    for (int byte = 0; byte < 4; ++byte) total += (weights >> 8 * byte & 255) * (values << 8 * (3 - byte) >> 24);
#endif
  }
  void flush() {}
};
#endif

// Round to the nearest integer, ties to even; |x| < 2^22.
inline Integers nearest(Vector x) {
  const Vector shifted = x + 12582912.f;
  return reinterpret_cast<Integers>(shifted) - 0x4b400000;
}

template <int BITS>
struct NBits {
  using Io = float;
  static constexpr int MIDDLE = 1 << (BITS - 1);
  static constexpr int STEP = 8, FLUSH_ROWS = 4 * STEP;  // rows of a matrix in one loop iteration; between two flushes

  explicit NBits(Constants& constants) : block_size_(int(constants.number("block_size"))) {
    if (block_size_ < 16 || block_size_ > 256 || block_size_ % 16)
      throw std::runtime_error("DLRChain: the block size must be a multiple of 16 from 16 to 256");
  }

  // A thread's slice of channels starts at a multiple of this.
  int slice_step() const { return block_size_; }

  // A weight [k, n] as the graph stores it: q [n, blocks, block_size * BITS / 8], low bits first; scales [n, blocks].
  struct Weight {
    const uint8_t* data;
    const float* scales;
    int64_t n, blocks;
    int block_size;

    bool fits(int64_t k) const { return blocks == (k + block_size - 1) / block_size; }
    int operator()(int column, int row) const {
      const size_t at = size_t(column) * blocks * block_size + row;
      return BITS == 8 ? data[at] : data[at / 2] >> (at % 2 * 4) & 15;
    }
  };
  Weight read(Constants& constants) const {
    const Tensor q = constants.next(ort::UINT8), scales = constants.next(ort::FLOAT);
    if (q.dims.size() != 3 || q.dims[2] * 8 != int64_t(block_size_) * BITS || scales.count() != q.dims[0] * q.dims[1])
      throw std::runtime_error("DLRChain: the shapes of a quantised weight and its scales do not match");
    const auto* data = static_cast<const uint8_t*>(q.data);
    return {data, static_cast<const float*>(scales.data), q.dims[0], q.dims[1], block_size_};
  }

  // The left operand of a product, rounded: values [m, stride]; one scale and one correction per block.
  struct Rows {
    const int8_t* values;
    const float* scales;
    const int32_t* corrections;  // -MIDDLE * the sum of the block's values
    int stride, blocks;
  };

  // A matrix [k, n] in panels as in plain.h. Panels are cut into blocks of rows, [n / panel][blocks]. A block is the
  // scales of its columns, [panel] floats, then its weights, so that a product reads one stream of memory. A 32-bit
  // lane holds four rows of a column. Weights in int8 have the layout [rows / 4][panel][4] in bytes. int4 has
  // [rows / 8][panel][4]: the low half of a byte is one of the first four rows, the high half one of the next four.
  template <int W>
  class Matrix {
   public:
    static constexpr int PANEL = W * LANES;
    Matrix(Stream& stream, int k, int n, const NBits& format)
        : stream_(&stream), k_(k), n_(n), block_size_(format.block_size_), blocks_((k + block_size_ - 1) / block_size_),
          column_bytes_(int(sizeof(float)) + block_size_ * BITS / 8),
          offset_(stream.append(size_t(blocks_) * n * column_bytes_)) {}

    // Copy rows [first_row, first_row + k) and columns [first, end) of a weight into the columns that start at `to`.
    // first_row is the start of a block.
    void pack(const Weight& weight, int first_row, int first, int end, int to) {
      uint8_t* const all = stream_->at(offset_);
      for (int i = first; i < std::min(end, int(weight.n)); ++i) {
        const int column = to + i - first, from = column / PANEL * PANEL, width = std::min(PANEL, n_ - from);
        for (int block = 0; block < blocks_; ++block) {
          const int start = block * block_size_;
          uint8_t* data = all + at(from, block, width) + (column - from) * 4;
          const size_t scale = size_t(i) * weight.blocks + first_row / block_size_ + block;
          std::memcpy(data, &weight.scales[scale], sizeof(float));
          data += width * sizeof(float);
          for (int row = 0; row < std::min(block_size_, k_ - start); ++row) {
            const int q = weight(i, first_row + start + row);
            if (BITS == 8) data[size_t(row / 4) * width * 4 + row % 4] = uint8_t(q);
            else data[size_t(row / 8) * width * 4 + row % 4] |= uint8_t(q << (row % 8 / 4 * 4));
          }
        }
      }
    }

    // Round `a` [m, k], as the left operand of `multiply`. `a` holds zeros from k to the next whole vector. The result
    // is valid until the thread's next call.
    Rows prepare(int m, const float* a, int stride) const {
      thread_local Array<int8_t> values;
      thread_local Array<float> scales;
      thread_local Array<int32_t> corrections;
      const int pitch = blocks_ * block_size_ + 64;
      if (values.size() < size_t(m) * pitch) values.resize(size_t(m) * pitch);
      if (scales.size() < size_t(m) * blocks_) scales.resize(size_t(m) * blocks_), corrections.resize(scales.size());
      for (int row = 0; row < m; ++row)
        for (int block = 0; block < blocks_; ++block) {
          const int from = block * block_size_, at = row * blocks_ + block;
          round(a + size_t(row) * stride + from, std::min(block_size_, k_ - from),
                &values[size_t(row) * pitch + from], scales[at], corrections[at]);
        }
      return {values.data(), scales.data(), corrections.data(), pitch, blocks_};
    }

    // As in plain.h.
    void multiply(int m, const Rows& a, const Target& target) const {
      const uint8_t* data = stream_->at(offset_);
      for_tiles<LANES == 16 ? 4 : 2, W>(m, n_, [&](auto rows, auto vectors, int row, int column, int width) {
        const Rows these{a.values + row * a.stride, a.scales + row * a.blocks, a.corrections + row * a.blocks, a.stride,
                         a.blocks};
        tile<decltype(rows)::value, decltype(vectors)::value>(these, data + at(column, 0, width), width,
                                                              target.at(row, column));
      });
    }

   private:
    // Where a block starts, given the first column of its panel and the panel's width.
    size_t at(int column, int block, int width) const {
      return (size_t(column) * blocks_ + size_t(block) * width) * column_bytes_;
    }

    // Round `count` numbers to a scale times 8-bit values, followed by zeros up to a multiple of STEP.
    static void round(const float* from, int count, int8_t* to, float& scale, int32_t& correction) {
      typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1)));
      Vector largest_lanes{};
      for (int i = 0; i < count; i += LANES) {
        const Vector value = load(from + i), magnitude = value < 0.f ? -value : value;
        largest_lanes = magnitude > largest_lanes ? magnitude : largest_lanes;
      }
      float largest = 0.f;
      for (int lane = 0; lane < LANES; ++lane) largest = std::max(largest, largest_lanes[lane]);
      scale = largest / 127.f;
      const float inverse = largest > 0.f ? 127.f / largest : 0.f;
      Integers sums{};
      int i = 0;
      for (; i < count; i += LANES) {
        const Integers value = nearest(load(from + i) * inverse);
        sums += value;
        *reinterpret_cast<Bytes*>(to + i) = __builtin_convertvector(value, Bytes);
      }
      for (; i % STEP; ++i) to[i] = 0;
      int32_t sum = 0;
      for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
      correction = Sums<BITS>::SIGNED ? 0 : -MIDDLE * sum;
    }

    template <int R, int V>
    void tile(const Rows& a, const uint8_t* b, int width, const Target& target) const {
      Vector sum[R][V] = {};
      const auto value = [&](int r, int at) {  // four neighbours, in each lane
        int32_t four;
        std::memcpy(&four, a.values + r * a.stride + at, 4);
        return Integers{} + four;
      };
      for (int block = 0, from = 0; from < k_; ++block, from += block_size_) {
        const auto* scales = reinterpret_cast<const float*>(b);
        fetch_ahead<R>(b, V * sizeof(Vector));
        b += width * sizeof(float);
        Sums<BITS> sums[R][V];
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) sums[r][v].total = Integers{} + a.corrections[r * a.blocks + block];
        const int end = std::min(k_, from + block_size_);
        for (int i = from; i < end; i += STEP) {
          Integers low[V], high[V];
#pragma GCC unroll 3
          for (int v = 0; v < V; ++v) {
            low[v] = load_integers(b + v * LANES * 4);
            if (BITS == 8) {
              high[v] = load_integers(b + (width + v * LANES) * 4);
            } else {
              high[v] = low[v] >> 4 & 0x0f0f0f0f;
              low[v] &= 0x0f0f0f0f;
            }
          }
          fetch_ahead<R>(b, V * LANES * BITS);
          b += width * BITS;
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sums[r][v].add(low[v], value(r, i));
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sums[r][v].add(high[v], value(r, i + 4));
          if ((i - from) % FLUSH_ROWS == FLUSH_ROWS - STEP || i + STEP >= end)
            for (int r = 0; r < R; ++r)
              for (int v = 0; v < V; ++v) sums[r][v].flush();
        }
        for (int v = 0; v < V; ++v) {
          const Vector scale = load(scales + v * LANES);
          for (int r = 0; r < R; ++r)
            sum[r][v] += __builtin_convertvector(sums[r][v].total, Vector) * (scale * a.scales[r * a.blocks + block]);
        }
      }
      finish(sum, target);
    }

    Stream* stream_;
    int k_, n_, block_size_, blocks_;
    int column_bytes_;  // of one column of a block: its scale and its weights
    size_t offset_;
  };

 private:
  int block_size_;
};

}  // namespace
