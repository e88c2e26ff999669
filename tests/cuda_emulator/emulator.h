// Runs the CUDA kernel on the CPU, in place of lockkit/kernel/cuda/device.h. It is built to make mistakes visible:
//
// 1. Every CUDA thread is a fiber. Between barriers, fibers run in a random order, and some warps lag behind. A missing
//    barrier gives wrong results, or results that depend on the seed.
// 2. An asynchronous copy happens at once, at a later barrier, or when it is waited for, at random.
// 3. Messages to other thread blocks arrive late, in a random order.
// 4. Shared memory starts as NaN. It is as large as the kernel asked for, and what follows it is checked.
// 5. The tensor cores' fragments are those of the PTX manual.
//
// What it cannot show: plain loads that hit an old line in the L1 cache, whether all thread blocks are resident, and what
// happens when a kernel starts while the one before it runs.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "args.h"

#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif

#define DEVICE inline

namespace emulator {

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};
struct Arrivals {  // in the place of an mbarrier
  int bytes;       // that are still to come
  uint16_t expected, phase;
};
struct Message {
  void* at;
  size_t bytes;
  unsigned char content[8];
  Arrivals* arrivals;  // of the receiver, or null
};
struct Fiber {
  void* stack;
  int thread, block;
  bool done = false;
  const long* counter = nullptr;  // at a barrier: waits until *counter reaches `goal`
  long goal = 0;
  int group = 0;  // of asynchronous copies
  std::vector<Copy> copies;
};
struct Block {
  std::vector<unsigned char> shared;
  long arrived = 0;
  unsigned char* memory() { return reinterpret_cast<unsigned char*>((uintptr_t(shared.data()) + 127) & ~uintptr_t(127)); }
};
struct Warp {
  uint32_t a[2][32][4], b[2][32][2];  // operands of two products in turn: a fast lane may be one ahead
  float sums[2][16][8], values[32];
  long products[32] = {}, arrived = 0;
};

inline Fiber* current;
inline void* scheduler_stack;
inline std::vector<Block> blocks;
inline std::vector<Warp> warps;
inline std::vector<Message> messages;  // on their way
inline long delivered;                 // so far
inline std::vector<long> clusters;
inline int threads_in_block, cluster_size;
inline std::function<void()> body;
inline bool misaligned;  // an address of an asynchronous copy or message
inline bool misused;     // an mbarrier, the number of a member, or an inbox
inline const void *inboxes_begin, *inboxes_end;  // all messages through global memory must be there, if these are set
inline long work;  // grows with every step that is no vain wait
inline unsigned random_state;
inline unsigned random_bits() {  // 24 good ones: the low bits of such a generator repeat soon
  random_state = random_state * 1664525u + 1013904223u;
  return (random_state >> 8) * 2654435761u >> 8;
}

extern "C" void lockkit_switch(void** save, void* to);
asm(R"(
.text
.weak lockkit_switch
.type lockkit_switch,@function
lockkit_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

inline void yield() { lockkit_switch(&current->stack, scheduler_stack); }

// A barrier of `size` fibers. `arrived` only grows.
inline void wait(long& arrived, int size) {
  const long goal = (arrived / size + 1) * size;
  ++work;
  if (++arrived >= goal) return;
  current->counter = &arrived, current->goal = goal;
  while (arrived < goal) yield();
  current->counter = nullptr;
}

inline void end_phase(Arrivals& arrivals) {
  if (arrivals.expected && arrivals.bytes == 0) arrivals.expected = 0, arrivals.phase ^= 1, ++delivered;
}

// Let half of the messages arrive, or all, in a random order.
inline void deliver(bool all) {
  std::vector<Message> later;
  for (size_t i = messages.size(); i > 1; --i) std::swap(messages[i - 1], messages[random_bits() % i]);
  for (const Message& message : messages) {
    if (!all && random_bits() % 2) {
      later.push_back(message);
      continue;
    }
    memcpy(message.at, message.content, message.bytes);
    if (message.arrivals) message.arrivals->bytes -= int(message.bytes), end_phase(*message.arrivals);
    ++work, ++delivered;
  }
  messages.swap(later);
}

// Wait a little for messages.
inline void wait_for_messages() {
  const long before = delivered;
  current->counter = &delivered, current->goal = before + 1;
  while (delivered == before) yield();
  current->counter = nullptr;
}

inline void enter() {
  body();
  current->done = true, ++work;
  yield();
  abort();
}

enum Result { OK, DEADLOCK, OUT_OF_BOUNDS, MISALIGNED, MISUSED };

// Run `kernel` on grid x threads fibers, clusters of `cluster` thread blocks, and `shared` bytes of shared memory each.
inline Result launch(int grid, int threads, int shared, int cluster, std::function<void()> kernel, unsigned seed) {
  constexpr size_t STACK_BYTES = 16384, GUARD_BYTES = 256;
  constexpr unsigned char GUARD = 0xff;  // filled with NaN, like the memory itself
  blocks.assign(grid, {}), messages.clear();
  for (Block& block : blocks) block.shared.assign(shared + 128 + GUARD_BYTES, GUARD);
  warps.assign(size_t(grid) * threads / 32, {});
  clusters.assign(grid / cluster, 0);
  threads_in_block = threads, cluster_size = cluster, body = std::move(kernel), random_state = seed, misaligned = misused = false;
  const int count = grid * threads;
  std::unique_ptr<char[]> stacks(new char[STACK_BYTES * count]);  // not filled: most pages are never touched
  std::vector<Fiber> fibers(count);
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) {
    auto* top = reinterpret_cast<void**>((uintptr_t(&stacks[STACK_BYTES * (i + 1)]) & ~uintptr_t(63)) - 8);
    *--top = reinterpret_cast<void*>(enter);
    fibers[i].stack = top - 6, fibers[i].thread = i % threads, fibers[i].block = i / threads;
    order[i] = i;
  }
  long last_work = 0, idle_rounds = 0;
  for (long round = 0; !order.empty(); ++round) {
    if (round % 4 == 0) deliver(false);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
    for (const int i : order) {
      const unsigned lag = (unsigned(i / 32) * 2654435761u ^ unsigned(round / 64) * 40503u ^ seed * 77777u) * 2246822519u;
      if (round % 4 && lag >> 30 == 0) continue;  // this warp lags for a while
      if (fibers[i].counter && *fibers[i].counter < fibers[i].goal) continue;
      current = &fibers[i];
      lockkit_switch(&scheduler_stack, current->stack);
    }
    order.erase(std::remove_if(order.begin(), order.end(), [&](int i) { return fibers[i].done; }), order.end());
    idle_rounds = work == last_work ? idle_rounds + 1 : 0, last_work = work;
    if (idle_rounds > 2000) return DEADLOCK;
  }
  deliver(true);
  for (Block& block : blocks) {
    const unsigned char* end = block.memory() + shared;
    for (size_t i = 0; i < GUARD_BYTES; ++i)
      if (end[i] != GUARD) return OUT_OF_BOUNDS;
  }
  return misaligned ? MISALIGNED : misused ? MISUSED : OK;
}

inline Block& this_block() { return blocks[current->block]; }
inline Warp& this_warp() { return warps[current->block * (threads_in_block / 32) + current->thread / 32]; }

}  // namespace emulator

namespace lockkit_cuda {

#define shared_memory (emulator::this_block().memory())
inline int thread() { return emulator::current->thread; }
inline int block() { return emulator::current->block; }
inline void sync_cluster() {
  const int size = emulator::cluster_size;
  emulator::wait(emulator::clusters[block() / size], emulator::threads_in_block * size);
}
inline void wait_a_little(long long&) { emulator::wait_for_messages(); }
template <class V>
V load_from_l2(const V* at) {
  return *at;
}
inline void wait_for_previous_kernel() {}  // here, kernels run one after the other
inline void let_next_kernel_start() {}

template <int BYTES>
void copy_async(void* to, const void* from) {
  if (uintptr_t(to) % BYTES || uintptr_t(from) % BYTES) emulator::misaligned = true;
  if (emulator::random_bits() & 1) memcpy(to, from, BYTES);
  else emulator::current->copies.push_back({to, from, BYTES, emulator::current->group});
}
inline void copy_async_or_zeros(void* to, const void* from, bool real) {
  alignas(16) static const unsigned char zeros[16] = {};
  copy_async<16>(to, real ? from : zeros);
}
inline void sync_block() {
  auto& copies = emulator::current->copies;
  if (!copies.empty() && emulator::random_bits() % 4 == 0) {
    memcpy(copies.back().to, copies.back().from, copies.back().bytes);
    copies.pop_back();
  }
  emulator::wait(emulator::this_block().arrived, emulator::threads_in_block);
}
inline void copy_commit() { ++emulator::current->group; }
template <int N>
void copy_wait() {
  auto& copies = emulator::current->copies;
  const auto late = [](const emulator::Copy& copy) { return copy.group >= emulator::current->group - N; };
  for (const emulator::Copy& copy : copies)
    if (!late(copy)) memcpy(copy.to, copy.from, copy.bytes);
  copies.erase(std::remove_if(copies.begin(), copies.end(), [&](const emulator::Copy& copy) { return !late(copy); }),
               copies.end());
}

// Halves of 8 bytes travel alone.
template <class M>
void send(M* to, const M& content) {
  if (emulator::inboxes_begin && (to < emulator::inboxes_begin || to + 1 > emulator::inboxes_end)) {
    emulator::misused = true;
    return;
  }
  for (size_t i = 0; i < sizeof(M); i += 8) {
    emulator::Message half{reinterpret_cast<char*>(to) + i, 8, {}, nullptr};
    memcpy(half.content, reinterpret_cast<const char*>(&content) + i, 8);
    emulator::messages.push_back(half);
  }
}
template <class M>
M receive(const M* at) {
  return *at;
}

using Arrivals = emulator::Arrivals;
inline void init_arrivals(Arrivals* arrivals) { *arrivals = {}; }
inline void expect_bytes(Arrivals* arrivals, int bytes) {
  if (arrivals->expected) emulator::misused = true;  // a second call for a phase
  arrivals->bytes += bytes, arrivals->expected = 1;
  emulator::end_phase(*arrivals);
}
inline void wait_for_arrivals(const Arrivals* arrivals, int phase) {
  while (arrivals->phase == phase) emulator::wait_for_messages();
}
template <class P>
P* of_member(P* mine, int rank) {
  if (rank >= emulator::cluster_size) emulator::misused = true, rank = 0;
  const int me = block(), peer = me / emulator::cluster_size * emulator::cluster_size + rank;
  return reinterpret_cast<P*>(uintptr_t(mine) - uintptr_t(emulator::blocks[me].memory()) +
                              uintptr_t(emulator::blocks[peer].memory()));
}
template <class P, class V>
void send_async(P* mine, int member, const V& content, Arrivals* arrivals) {
  emulator::Message message{of_member(mine, member), sizeof(V), {}, of_member(arrivals, member)};
  if (uintptr_t(mine) % sizeof(V)) emulator::misaligned = true;
  emulator::Block& here = emulator::this_block();
  if (reinterpret_cast<unsigned char*>(mine) + sizeof(V) > here.memory() + here.shared.size() - 128) {
    emulator::misused = true;
    return;
  }
  memcpy(message.content, &content, sizeof(V));
  emulator::messages.push_back(message);
}

using Half = _Float16;
struct BFloat16 {
  uint16_t bits;
};
inline float to_float(Half v) { return float(v); }
inline float to_float(BFloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
template <class T>
T from_float(float v);
template <>
inline Half from_float<Half>(float v) {
  return Half(v);
}
template <>
inline BFloat16 from_float<BFloat16>(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  if (v != v) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <class T>
uint32_t pack_pair(float a, float b) {
  const T both[2] = {from_float<T>(a), from_float<T>(b)};
  uint32_t bits;
  memcpy(&bits, both, 4);
  return bits;
}
template <class T, class P>
P unpack_pair(uint32_t bits) {
  T both[2];
  memcpy(both, &bits, 4);
  return P{{to_float(both[0]), to_float(both[1])}};
}
inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  Half x[2], y[2], z[2];
  memcpy(x, &a, 4), memcpy(y, &b, 4), memcpy(z, &c, 4);
  for (int i = 0; i < 2; ++i) x[i] = Half(double(x[i]) * double(y[i]) + double(z[i]));
  uint32_t sum;
  memcpy(&sum, x, 4);
  return sum;
}
inline float exponential(float x) { return std::exp(x); }
inline float error_function(float x) { return std::erf(x); }

inline float of_lane_across(float value, int distance) {
  emulator::Warp& warp = emulator::this_warp();
  const int lane = thread() % 32;
  warp.values[lane] = value;
  emulator::wait(warp.arrived, 32);
  const float other = warp.values[lane ^ distance];
  emulator::wait(warp.arrived, 32);
  return other;
}
inline float sum_of_eight(float value) {
  for (const int distance : {1, 2, 4}) value += of_lane_across(value, distance);
  return value;
}

// c [16, 8] += a [16, 16] b [16, 8]. The lane that comes last computes for all.
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  emulator::Warp& warp = emulator::this_warp();
  const int lane = thread() % 32, turn = int(warp.products[lane]++ & 1);
  memcpy(warp.a[turn][lane], a, 16);
  warp.b[turn][lane][0] = b0, warp.b[turn][lane][1] = b1;
  if (warp.arrived % 32 == 31) {
    struct Two {
      float v[2];
    };
    float left[16][16], right[16][8];
    for (int other = 0; other < 32; ++other) {
      const int row = other / 4, column = other % 4 * 2;  // of a; of b, row and column are exchanged
      for (int i = 0; i < 4; ++i) {
        const Two two = unpack_pair<T, Two>(warp.a[turn][other][i]);
        for (int j = 0; j < 2; ++j) left[row + i % 2 * 8][column + i / 2 * 8 + j] = two.v[j];
      }
      for (int i = 0; i < 2; ++i) {
        const Two two = unpack_pair<T, Two>(warp.b[turn][other][i]);
        for (int j = 0; j < 2; ++j) right[column + i * 8 + j][row] = two.v[j];
      }
    }
    for (int row = 0; row < 16; ++row) {
      float sums[8] = {};
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) sums[column] += left[row][k] * right[k][column];
      memcpy(warp.sums[turn][row], sums, sizeof sums);
    }
  }
  emulator::wait(warp.arrived, 32);
  for (int i = 0; i < 4; ++i) c[i] += warp.sums[turn][lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

}  // namespace lockkit_cuda
