// Vectors of the target processor, and the activation functions on them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;  // floats in a vector; rows of a register tile, see tiles.h
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4;
#else
constexpr int LANES = 4, ROWS = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float AnyVector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef int32_t AnyIntegers __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef _Float16 Half;
typedef Half HalfVector __attribute__((vector_size(2 * LANES), aligned(2)));

inline Vector load(const float* at) { return *reinterpret_cast<const AnyVector*>(at); }
// Not with memcpy: for AVX2, GCC turns that into two halves through memory.
inline Integers load_integers(const void* at) { return *static_cast<const AnyIntegers*>(at); }
inline Vector load(const Half* at) {
#if defined(__AVX512F__)  // compilers turn the general form below into 16 scalar conversions
  return reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
#elif defined(__AVX__) && defined(__F16C__)
  return reinterpret_cast<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#else
  return __builtin_convertvector(*reinterpret_cast<const HalfVector*>(at), Vector);
#endif
}
inline void store(float* at, Vector value) { *reinterpret_cast<AnyVector*>(at) = value; }
inline int round_up(int n, int step) { return (n + step - 1) / step * step; }
inline int round_up_to_vector(int n) { return round_up(n, LANES); }

// ---- activations ----

// exp(x) as 2^n * e^f, with a polynomial in f; error about 2 ulp. Arguments are clamped to +-87.
inline Vector exponential(Vector x) {
  x = x < -87.f ? Vector{} - 87.f : x;
  x = x > 87.f ? Vector{} + 87.f : x;
  constexpr float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector n = (x * 1.44269504f + magic) - magic;
  const Vector f = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.f;
  const Integers bits = (__builtin_convertvector(n, Integers) + 127) << 23;
  Vector power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}
inline Vector silu(Vector x) { return x / (1.f + exponential(-x)); }

enum class Activation { silu, gelu, gelu_tanh, relu, relu_squared };

// The activation with this name in transformers.
Activation activation_of(const std::string& name) {
  if (name == "silu" || name == "swish") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_new" || name == "gelu_fast" || name == "gelu_pytorch_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "relu2") return Activation::relu_squared;
  throw std::runtime_error("DLRChain: unknown activation " + name);
}

inline Vector activate(Activation which, Vector x) {
  switch (which) {
    case Activation::silu: return silu(x);
    case Activation::gelu_tanh: {  // x * sigmoid(2 u), which is x * (1 + tanh(u)) / 2
      const Vector twice_u = 1.5957691216f * (x + 0.044715f * x * x * x);
      return x / (1.f + exponential(-twice_u));
    }
    case Activation::gelu: {
      Vector y;
      for (int lane = 0; lane < LANES; ++lane) y[lane] = 0.5f * x[lane] * (1.f + std::erf(x[lane] * 0.70710678f));
      return y;
    }
    default: {
      const Vector y = x > 0.f ? x : Vector{};
      return which == Activation::relu ? y : y * y;
    }
  }
}

}  // namespace
