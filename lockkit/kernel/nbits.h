// Weights in int8 or int4 as MatMulNBits has them, and products with them.
//
// A weight w of the graph is `scale * (q - middle)`, with q of BITS bits, a scale for each column and each block
// of `size` rows, and the middle of q's range, 128 or 8. As the operator's accuracy level 4 says, and as
// onnxruntime does it, the other operand is rounded to 8 bits too: a row a of it is cut into the same blocks, each
// `scale_a * i` with i of -127 .. 127 to the nearest. So a block's product is, in integers,
//
//     scale * scale_a * (sum(q * i) - middle * sum(i))
//
// of which the second sum is known before. Blocks are added up in fp32. The weights are only ever widened in
// registers; processors with VNNI add four products of bytes to each 32-bit lane in one instruction.
#pragma once
#include <vector>

#include "constants.h"
#include "memory.h"
#include "tiles.h"

namespace {

// Per 32-bit lane, sum + the products of four bytes of `weights` (0 .. 255) and of `values` (-128 .. 127).
inline Integers dot(Integers sum, Integers weights, Integers values) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Integers>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(weights),
                                                        reinterpret_cast<__m512i>(values)));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return reinterpret_cast<Integers>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(weights), reinterpret_cast<__m256i>(values)));
#elif defined(__AVX2__) && !defined(__AVX512F__)  // two pairs of 16-bit products, which cannot overflow
  const __m256i w = reinterpret_cast<__m256i>(weights), v = reinterpret_cast<__m256i>(values);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(v, 8));
  return sum + reinterpret_cast<Integers>(even) + reinterpret_cast<Integers>(odd);
#else
  for (int byte = 0; byte < 4; ++byte) sum += (weights >> 8 * byte & 255) * (values << 8 * (3 - byte) >> 24);
  return sum;
#endif
}

// Whole numbers to the nearest, ties to even; |x| < 2^22.
inline Integers nearest(Vector x) {
  const Vector shifted = x + 12582912.f;
  return reinterpret_cast<Integers>(shifted) - 0x4b400000;
}

template <int BITS>
struct NBits {
  using Io = float;
  static constexpr int MIDDLE = 1 << (BITS - 1), STEP = 8;  // rows of a matrix that are packed together

  explicit NBits(Constants& constants) : size_(int(constants.number("block_size"))) {
    if (size_ < 16 || size_ > 256 || size_ % 16) throw std::runtime_error("DLRChain: no such block size");
  }

  int unit() const { return size_; }

  // A weight [k, n] of the graph: q [n, blocks, size * BITS / 8], low bits first, and scales [n, blocks].
  struct Weight {
    const uint8_t* data;
    const float* scales;
    int64_t n, blocks;
    int size;

    bool fits(int64_t k) const { return blocks == (k + size - 1) / size; }
    int operator()(int column, int row) const {
      const size_t at = size_t(column) * blocks * size + row;
      return BITS == 8 ? data[at] : data[at / 2] >> (at % 2 * 4) & 15;
    }
  };
  Weight read(Constants& constants) const {
    const Tensor q = constants.next(ort::UINT8), scales = constants.next(ort::FLOAT);
    if (q.dims.size() != 3 || q.dims[2] * 8 != int64_t(size_) * BITS || scales.count() != q.dims[0] * q.dims[1])
      throw std::runtime_error("DLRChain: a quantised weight and its scales do not go together");
    return {static_cast<const uint8_t*>(q.data), static_cast<const float*>(scales.data), q.dims[0], q.dims[1], size_};
  }

  // The left operand of a product, rounded: values [m, stride], and for each block its scale and correction.
  struct Rows {
    const int8_t* values;
    const float* scales;
    const int32_t* corrections;  // -MIDDLE * the sum of the block's values
    int stride, blocks;
  };

  // A matrix [k, n] in panels as in plain.h, where a lane holds four rows of a column: [n / panel][k / 4][panel][4]
  // bytes for int8, and for int4 [n / panel][k / 8][panel][4], of which the low halves are the first four rows.
  // Scales are [n / panel][blocks][panel].
  template <int W>
  class Matrix {
   public:
    static constexpr int PANEL = W * LANES;
    Matrix(Arena& arena, int k, int n, const NBits& format)
        : k_(k), padded_(multiple(k, STEP)), n_(n), size_(format.size_), blocks_((k + size_ - 1) / size_),
          data_(static_cast<uint8_t*>(arena.take(size_t(padded_) * n * BITS / 8))),
          scales_(static_cast<float*>(arena.take(sizeof(float) * blocks_ * n))) {}

    void put(const Weight& weight, int first) {
      for (int i = 0; i < int(weight.n); ++i) {
        const int column = first + i, from = column / PANEL * PANEL, width = std::min(PANEL, n_ - from);
        uint8_t* data = data_ + size_t(from) * padded_ * BITS / 8 + (column - from) * 4;
        for (int block = 0; block < int(weight.blocks); ++block)
          scales_[size_t(from) * blocks_ + size_t(block) * width + column - from] =
              weight.scales[size_t(i) * weight.blocks + block];
        for (int row = 0; row < k_; ++row) {
          if (BITS == 8) data[size_t(row / 4) * width * 4 + row % 4] = uint8_t(weight(i, row));
          else data[size_t(row / 8) * width * 4 + row % 4] |= uint8_t(weight(i, row) << (row % 8 / 4 * 4));
        }
      }
    }

    // Round columns k_from to k_to of `a`, zeros up to a whole vector; k_from starts a block. What comes back lasts
    // until the thread's next call.
    Rows rows(int m, int k_from, int k_to, const float* a, int stride) const {
      thread_local Array<int8_t> values;
      thread_local Array<float> scales;
      thread_local Array<int32_t> corrections;
      const int blocks = (k_to - k_from + size_ - 1) / size_, pitch = blocks * size_ + 64;
      if (values.size() < size_t(m) * pitch) values.resize(size_t(m) * pitch);
      if (scales.size() < size_t(m) * blocks) scales.resize(size_t(m) * blocks), corrections.resize(scales.size());
      for (int row = 0; row < m; ++row)
        for (int block = 0; block < blocks; ++block) {
          const int from = k_from + block * size_, at = row * blocks + block;
          round(a + size_t(row) * stride + from, std::min(size_, k_to - from),
                &values[size_t(row) * pitch + block * size_], scales[at], corrections[at]);
        }
      return {values.data(), scales.data(), corrections.data(), pitch, blocks};
    }

    // As in plain.h; k_from starts a block.
    void multiply(int m, int k_from, int k_to, int from, int to, const Rows& a, float* c, int ldc,
                  const float* x = nullptr, float* t = nullptr) const {
      for_tiles<LANES == 16 ? 4 : 2, W>(m, from, to, n_, [&](auto rows, auto vectors, int row, int column, int width) {
        const int at = row * ldc + column - from;
        const Rows these{a.values + row * a.stride, a.scales + row * a.blocks, a.corrections + row * a.blocks, a.stride,
                         a.blocks};
        const uint8_t* b = data_ + (size_t(column) * padded_ + size_t(k_from) * width) * BITS / 8;
        const float* scales = scales_ + size_t(column) * blocks_ + size_t(k_from / size_) * width;
        tile<decltype(rows)::value, decltype(vectors)::value>(these, b, scales, width, k_to - k_from, c + at, ldc,
                                                              x ? x + at : x, x ? t + at : t);
      });
    }

   private:
    // `count` numbers, and zeros up to whole steps, as a scale times values of 8 bits.
    static void round(const float* from, int count, int8_t* to, float& scale, int32_t& correction) {
      typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1)));
      Vector most{};
      for (int i = 0; i < count; i += LANES) {
        const Vector value = load(from + i), size = value < 0.f ? -value : value;
        most = size > most ? size : most;
      }
      float largest = 0.f;
      for (int lane = 0; lane < LANES; ++lane) largest = std::max(largest, most[lane]);
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
      correction = -MIDDLE * sum;
    }

    template <int R, int V>
    void tile(const Rows& a, const uint8_t* b, const float* scales, int width, int k, float* c, int ldc, const float* x,
              float* t) const {
      Vector sum[R][V] = {};
      const auto value = [&](int r, int at) {  // four neighbours in each lane
        int32_t four;
        std::memcpy(&four, a.values + r * a.stride + at, 4);
        return Integers{} + four;
      };
      for (int block = 0, from = 0; from < k; ++block, from += size_, scales += width) {
        Integers whole_sum[R][V];
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) whole_sum[r][v] = Integers{} + a.corrections[r * a.blocks + block];
        for (int i = from; i < std::min(k, from + size_); i += STEP) {
          Integers low[V], high[V];
          for (int v = 0; v < V; ++v) {
            std::memcpy(&low[v], b + v * LANES * 4, sizeof(Integers));
            if (BITS == 8) {
              std::memcpy(&high[v], b + (width + v * LANES) * 4, sizeof(Integers));
            } else {
              high[v] = low[v] >> 4 & 0x0f0f0f0f;
              low[v] &= 0x0f0f0f0f;
            }
          }
          b += width * BITS;
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) whole_sum[r][v] = dot(whole_sum[r][v], low[v], value(r, i));
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) whole_sum[r][v] = dot(whole_sum[r][v], high[v], value(r, i + 4));
        }
        for (int v = 0; v < V; ++v) {
          const Vector scale = load(scales + v * LANES);
          for (int r = 0; r < R; ++r)
            sum[r][v] += __builtin_convertvector(whole_sum[r][v], Vector) * (scale * a.scales[r * a.blocks + block]);
        }
      }
      finish(sum, c, ldc, x, t);
    }

    int k_, padded_, n_, size_, blocks_;
    uint8_t* data_;
    float* scales_;
  };

 private:
  int size_;  // of a block
};

}  // namespace
