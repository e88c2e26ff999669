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
// in registers. Processors with VNNI add four products of bytes to each 32-bit lane in one instruction.
#pragma once
#include <vector>

#include "constants.h"
#include "memory.h"
#include "tiles.h"

namespace {

// Per 32-bit lane: sum plus the dot product of four bytes of `weights` (0 .. 255) and `values` (-128 .. 127).
inline Integers dot(Integers sum, Integers weights, Integers values) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Integers>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(weights),
                                                        reinterpret_cast<__m512i>(values)));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return reinterpret_cast<Integers>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(weights), reinterpret_cast<__m256i>(values)));
#elif defined(__AVX2__) && !defined(__AVX512F__)  // two pairs of 16-bit products each; they cannot overflow
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

// Round to the nearest integer, ties to even; |x| < 2^22.
inline Integers nearest(Vector x) {
  const Vector shifted = x + 12582912.f;
  return reinterpret_cast<Integers>(shifted) - 0x4b400000;
}

template <int BITS>
struct NBits {
  using Io = float;
  static constexpr int MIDDLE = 1 << (BITS - 1), STEP = 8;  // rows of a matrix that one loop iteration reads

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

  // A matrix [k, n] in panels as in plain.h. A 32-bit lane holds four rows of a column. int8 has the layout
  // [n / panel][k / 4][panel][4] in bytes. int4 has [n / panel][k / 8][panel][4]: the low half of a byte is one of the
  // first four rows, the high half one of the next four. Scales are [n / panel][blocks][panel].
  template <int W>
  class Matrix {
   public:
    static constexpr int PANEL = W * LANES;
    Matrix(Arena& arena, int k, int n, const NBits& format)
        : k_(k), padded_k_(round_up(k, STEP)), n_(n), block_size_(format.block_size_),
          blocks_((k + block_size_ - 1) / block_size_),
          data_(static_cast<uint8_t*>(arena.allocate(size_t(padded_k_) * n * BITS / 8))),
          scales_(static_cast<float*>(arena.allocate(sizeof(float) * blocks_ * n))) {}

    // Copy a weight into the columns that start at `first`.
    void pack(const Weight& weight, int first) {
      for (int i = 0; i < int(weight.n); ++i) {
        const int column = first + i, from = column / PANEL * PANEL, width = std::min(PANEL, n_ - from);
        uint8_t* data = data_ + size_t(from) * padded_k_ * BITS / 8 + (column - from) * 4;
        for (int block = 0; block < int(weight.blocks); ++block)
          scales_[size_t(from) * blocks_ + size_t(block) * width + column - from] =
              weight.scales[size_t(i) * weight.blocks + block];
        for (int row = 0; row < k_; ++row) {
          if (BITS == 8) data[size_t(row / 4) * width * 4 + row % 4] = uint8_t(weight(i, row));
          else data[size_t(row / 8) * width * 4 + row % 4] |= uint8_t(weight(i, row) << (row % 8 / 4 * 4));
        }
      }
    }

    // Round columns [k_from, k_to) of `a`, as the left operand of `multiply`. `a` holds zeros from k_to to the next
    // whole vector. k_from is the start of a block. The result is valid until the thread's next call.
    Rows prepare(int m, int k_from, int k_to, const float* a, int stride) const {
      thread_local Array<int8_t> values;
      thread_local Array<float> scales;
      thread_local Array<int32_t> corrections;
      const int blocks = (k_to - k_from + block_size_ - 1) / block_size_, pitch = blocks * block_size_ + 64;
      if (values.size() < size_t(m) * pitch) values.resize(size_t(m) * pitch);
      if (scales.size() < size_t(m) * blocks) scales.resize(size_t(m) * blocks), corrections.resize(scales.size());
      for (int row = 0; row < m; ++row)
        for (int block = 0; block < blocks; ++block) {
          const int from = k_from + block * block_size_, at = row * blocks + block;
          round(a + size_t(row) * stride + from, std::min(block_size_, k_to - from),
                &values[size_t(row) * pitch + block * block_size_], scales[at], corrections[at]);
        }
      return {values.data(), scales.data(), corrections.data(), pitch, blocks};
    }

    // As in plain.h. k_from is the start of a block.
    void multiply(int m, int k_from, int k_to, int from, int to, const Rows& a, float* c, int ldc,
                  const float* x = nullptr, float* t = nullptr) const {
      for_tiles<LANES == 16 ? 4 : 2, W>(m, from, to, n_, [&](auto rows, auto vectors, int row, int column, int width) {
        const int at = row * ldc + column - from;
        const Rows these{a.values + row * a.stride, a.scales + row * a.blocks, a.corrections + row * a.blocks, a.stride,
                         a.blocks};
        const uint8_t* b = data_ + (size_t(column) * padded_k_ + size_t(k_from) * width) * BITS / 8;
        const float* scales = scales_ + size_t(column) * blocks_ + size_t(k_from / block_size_) * width;
        tile<decltype(rows)::value, decltype(vectors)::value>(these, b, scales, width, k_to - k_from, c + at, ldc,
                                                              x ? x + at : x, x ? t + at : t);
      });
    }

   private:
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
      correction = -MIDDLE * sum;
    }

    template <int R, int V>
    void tile(const Rows& a, const uint8_t* b, const float* scales, int width, int k, float* c, int ldc, const float* x,
              float* t) const {
      Vector sum[R][V] = {};
      const auto value = [&](int r, int at) {  // four neighbours, in each lane
        int32_t four;
        std::memcpy(&four, a.values + r * a.stride + at, 4);
        return Integers{} + four;
      };
      for (int block = 0, from = 0; from < k; ++block, from += block_size_, scales += width) {
        Integers integer_sum[R][V];
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) integer_sum[r][v] = Integers{} + a.corrections[r * a.blocks + block];
        for (int i = from; i < std::min(k, from + block_size_); i += STEP) {
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
            for (int v = 0; v < V; ++v) integer_sum[r][v] = dot(integer_sum[r][v], low[v], value(r, i));
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) integer_sum[r][v] = dot(integer_sum[r][v], high[v], value(r, i + 4));
        }
        for (int v = 0; v < V; ++v) {
          const Vector scale = load(scales + v * LANES);
          for (int r = 0; r < R; ++r)
            sum[r][v] += __builtin_convertvector(integer_sum[r][v], Vector) * (scale * a.scales[r * a.blocks + block]);
        }
      }
      finish(sum, c, ldc, x, t);
    }

    int k_, padded_k_, n_, block_size_, blocks_;
    uint8_t* data_;
    float* scales_;
  };

 private:
  int block_size_;
};

}  // namespace
