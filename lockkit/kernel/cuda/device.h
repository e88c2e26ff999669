// What the kernel needs of a GPU. Tests replace this header by one that runs the kernel on the CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#define DEVICE __device__ __forceinline__

namespace lockkit_cuda {

extern __shared__ __align__(128) unsigned char shared_memory[];

DEVICE int thread() { return int(threadIdx.x); }
DEVICE int block() { return int(blockIdx.x); }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void spin() {}

// ---- asynchronous copies from global to shared memory ----

// BYTES is 16, 8 or 4. Only copies of 16 bytes can pass by the L1 cache.
template <int BYTES>
DEVICE void copy_async(void* to, const void* from) {
  const auto at = uint32_t(__cvta_generic_to_shared(to));
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from));
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES));
}
// Copy 16 bytes, or zeros if they are not real. Then nothing is read.
DEVICE void copy_async_or_zeros(void* to, const void* from, bool real) {
  const auto at = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(real ? 16 : 0));
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;"); }
template <int N>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- data that other thread blocks read ----

DEVICE unsigned load_acquire(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
DEVICE unsigned add_release(unsigned* at, unsigned value) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(at), "r"(value) : "memory");
  return before;
}
// A load from the L2 cache: the L1 cache may hold an old value.
template <class V>
DEVICE V load_for_all(const V* at) {
  V value;
  if constexpr (sizeof(V) == 16) {
    const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(at));
    memcpy(&value, &bits, 16);
  } else if constexpr (sizeof(V) == 8) {
    const float2 bits = __ldcg(reinterpret_cast<const float2*>(at));
    memcpy(&value, &bits, 8);
  } else {
    value = __ldcg(at);
  }
  return value;
}
// Visible to other thread blocks once this one has done an `add_release`.
template <class V>
DEVICE void store_for_all(V* at, V value) {
  *at = value;
}

#if __CUDA_ARCH__ >= 900
DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// The same place in the shared memory of another member of the cluster.
template <class P>
DEVICE P* of_peer(P* mine, int rank) {
  uint64_t at;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(at) : "l"(mine), "r"(rank));
  return reinterpret_cast<P*>(at);
}
#else  // never called: CLUSTER kernels exist from sm_90 on
DEVICE void sync_cluster() {}
template <class P>
DEVICE P* of_peer(P* mine, int) {
  return mine;
}
#endif

// ---- kernels that follow each other on a stream ----

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
