// Parts of the kernel that need nothing of its state.
#pragma once
#include "args.h"
#include "device.h"

namespace lockkit_cuda {

DEVICE int smaller(int a, int b) { return a < b ? a : b; }

struct alignas(8) Pair {
  float v[2];
};

// The A operand of a product: rows and columns [0, 16) of a row-major matrix at `from`.
template <class T>
DEVICE void load_fragment(uint32_t (&a)[4], const T* from, int pitch, int lane) {
  const T* at = from + lane / 4 * pitch + lane % 4 * 2;
  a[0] = *reinterpret_cast<const uint32_t*>(at);
  a[1] = *reinterpret_cast<const uint32_t*>(at + 8 * pitch);
  a[2] = *reinterpret_cast<const uint32_t*>(at + 8);
  a[3] = *reinterpret_cast<const uint32_t*>(at + 8 * pitch + 8);
}

// Wait until all members have come. What they wrote before is then visible. Do `meanwhile` on the way. The first member
// adds so much that the top bit flips when the last one comes, and the other bits return to zero: the counter needs no
// reset.
template <class F>
DEVICE void meet_in_global_memory(unsigned* barrier, int team, bool first, F meanwhile) {
  sync_block();
  unsigned before = 0;
  if (thread() == 0) {
    const unsigned add = first ? 0x80000000u - unsigned(team - 1) : 1u;
    before = add_release(barrier, add);
  }
  meanwhile();
  if (thread() == 0)
    while (((before ^ load_acquire(barrier)) & 0x80000000u) == 0) spin();
  sync_block();
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
