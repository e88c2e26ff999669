// Parts of the kernel that need nothing of its state.
#pragma once
#include "args.h"
#include "device.h"

namespace lockkit_cuda {

DEVICE int smaller(int a, int b) { return a < b ? a : b; }

struct alignas(8) Pair {
  float v[2];
};

// The A operand of a product: 16 columns of a row-major matrix, from its rows at `low` and `high`, which are rows lane / 4
// and lane / 4 + 8.
template <class T>
DEVICE void load_fragment(uint32_t (&a)[4], const T* low, const T* high) {
  a[0] = *reinterpret_cast<const uint32_t*>(low);
  a[1] = *reinterpret_cast<const uint32_t*>(high);
  a[2] = *reinterpret_cast<const uint32_t*>(low + 8);
  a[3] = *reinterpret_cast<const uint32_t*>(high + 8);
}

DEVICE float activate(Activation which, float x) {
  switch (which) {
    case Activation::silu: return x / (1.f + exponential(-x));
    case Activation::gelu: return 0.5f * x * (1.f + error_function(x * 0.70710678f));
    case Activation::gelu_tanh:  // x * sigmoid(2 u), which is x * (1 + tanh(u)) / 2
      return x / (1.f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));
    case Activation::relu: return x > 0.f ? x : 0.f;
    default: return x > 0.f ? x * x : 0.f;
  }
}

}  // namespace lockkit_cuda
