// What the kernel needs of a GPU. Tests replace this header by one that runs the kernel on the CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "args.h"

#define DEVICE __device__ __forceinline__

namespace lockkit_cuda {

extern __shared__ __align__(128) unsigned char shared_memory[];

DEVICE int thread() { return int(threadIdx.x); }
DEVICE int block() { return int(blockIdx.x); }
DEVICE void sync_block() { __syncthreads(); }

// Wait a little for another thread block. `since` is the clock at the first call, and 0 before it. After most of a minute
// something is wrong: the kernel fails, instead of keeping the GPU for ever.
DEVICE void wait_a_little(long long& since) {
  const long long now = clock64();
  if (since == 0) since = now;
  else if (now - since > (1ll << 36)) __trap();
}

// ---- asynchronous copies from global to shared memory ----

// BYTES is 16, 8 or 4. Only copies of 16 bytes can pass by the L1 cache.
template <int BYTES>
DEVICE void copy_async(void* to, const void* from) {
  const auto at = uint32_t(__cvta_generic_to_shared(to));
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES) : "memory");
}
// Copy 16 bytes, or zeros if they are not real. Then nothing is read.
DEVICE void copy_async_or_zeros(void* to, const void* from, bool real) {
  const auto at = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(real ? 16 : 0) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;"); }
template <int N>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- messages to other thread blocks, through global memory ----

// Numbers of 8 bytes are read and written at once. These accesses pass by the L1 cache, which may hold old values.
DEVICE void send(Message* to, const Message& content) {
  uint64_t halves[2];
  memcpy(halves, &content, 16);
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(halves[0]), "l"(halves[1]) : "memory");
}
DEVICE void send(ShortMessage* to, const ShortMessage& content) {
  uint64_t all;
  memcpy(&all, &content, 8);
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(all) : "memory");
}
DEVICE Message receive(const Message* at) {
  uint64_t halves[2];
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(halves[0]), "=l"(halves[1]) : "l"(at) : "memory");
  Message content;
  memcpy(&content, halves, 16);
  return content;
}
DEVICE ShortMessage receive(const ShortMessage* at) {
  uint64_t all;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(all) : "l"(at) : "memory");
  ShortMessage content;
  memcpy(&content, &all, 8);
  return content;
}

// ---- messages within a cluster, sm_90 and up ----

using Arrivals = uint64_t;  // an mbarrier: it counts the bytes that arrive, in phases

DEVICE uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }
// The same place in the shared memory of another member.
DEVICE uint32_t address_at(const void* mine, int member) {
  uint32_t at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(mine)), "r"(member));
  return at;
}
DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
DEVICE void init_arrivals(Arrivals* arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(
                   shared_address(arrivals))
               : "memory");
}
// A phase ends when this was called once for it and that many bytes have arrived. Some may come before the call.
DEVICE void expect_bytes(Arrivals* arrivals, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrivals)), "r"(bytes)
               : "memory");
}
// Wait for the end of a phase: 0, 1, 0, and so on.
DEVICE void wait_for_arrivals(const Arrivals* arrivals, int phase) {
  for (long long since = 0;; wait_a_little(since)) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(arrivals)), "r"(phase)
        : "memory");
    if (done) return;
  }
}
// Write to the place `mine` of a member, and tell its `arrivals`.
template <class P>
DEVICE void send_async(float* mine, int member, const P& pair, Arrivals* arrivals) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                   address_at(mine, member)),
               "f"(pair.v[0]), "f"(pair.v[1]), "r"(address_at(arrivals, member))
               : "memory");
}
DEVICE void send_async(void* mine, int member, uint32_t content, Arrivals* arrivals) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                   address_at(mine, member)),
               "r"(content), "r"(address_at(arrivals, member))
               : "memory");
}

// ---- kernels that follow each other on a stream ----

// A load of 16 bytes from the L2 cache: the L1 cache may hold what was there before another kernel wrote.
template <class V>
DEVICE V load_from_l2(const V* at) {
  static_assert(sizeof(V) == 16);
  const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(at));
  V value;
  memcpy(&value, &bits, 16);
  return value;
}

#if __CUDA_ARCH__ >= 900
// Wait until all kernels before this one have ended, and what they wrote is visible.
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel's thread blocks may start once all thread blocks of this one have come here.
DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
DEVICE void wait_for_previous_kernel() {}
DEVICE void let_next_kernel_start() {}
#endif

// ---- arithmetic ----

using Half = __half;
using BFloat16 = __nv_bfloat16;

// The sum over eight neighbouring lanes, the same bits in all of them. All lanes of the warp take part.
DEVICE float sum_of_eight(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  value += __shfl_xor_sync(0xffffffffu, value, 2);
  return value + __shfl_xor_sync(0xffffffffu, value, 4);
}

// The value of the lane whose number differs in the bit `distance`.
DEVICE float of_lane_across(float value, int distance) { return __shfl_xor_sync(0xffffffffu, value, distance); }

DEVICE float exponential(float x) { return __expf(x); }
DEVICE float error_function(float x) { return erff(x); }
DEVICE float to_float(Half v) { return __half2float(v); }
DEVICE float to_float(BFloat16 v) { return __bfloat162float(v); }
template <class T>
DEVICE T from_float(float v);
template <>
DEVICE Half from_float<Half>(float v) {
  return __float2half_rn(v);
}
template <>
DEVICE BFloat16 from_float<BFloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Two numbers in one register.
template <class T>
DEVICE uint32_t pack_pair(float a, float b) {
  if constexpr (sizeof(T) == sizeof(Half) && __is_same(T, Half)) {
    const __half2 both = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
}
template <class T, class P>
DEVICE P unpack_pair(uint32_t bits) {
  float2 both;
  if constexpr (__is_same(T, Half)) both = __half22float2(*reinterpret_cast<const __half2*>(&bits));
  else both = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits));
  return P{{both.x, both.y}};
}

// a * b + c for each of two numbers in fp16, rounded once.
DEVICE uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

// c [16, 8] += a [16, 16] b [16, 8], all in fragments of PTX's m16n8k16.
#define LOCKKIT_MMA(TYPE, NAME)                                                                                      \
  DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, TYPE) {                           \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                              \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                        \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                    \
  }
LOCKKIT_MMA(Half, "f16")
LOCKKIT_MMA(BFloat16, "bf16")
#undef LOCKKIT_MMA

}  // namespace lockkit_cuda
