// The CUDA kernels as a library for the CPU, on the emulator.
//
// `emulate_chain` computes a chain, for tests in Python. `run_kernel` computes what the operator launches on the fake
// CUDA driver of the tests. MUTANTS, if defined, is a file with changed copies of the kernel, see mutants.py.
#include "emulator.h"

#include <map>
#include <string>

#if defined(MUTANTS)
#include "mutants.h"
#else
#include "chain.cuh"
#endif
#include "plan.h"
#include "variants.h"

using namespace lockkit_cuda;
using Kernel = void (*)(const Args&);

static const std::map<std::string, Kernel> kernels = {
#if defined(MUTANTS)
#include MUTANTS
#else
#define ENTRY(TYPE, FORMAT, MODE, BATCH, STAGES) \
  {"chain_" #TYPE "_" #FORMAT "_" #MODE, [](const Args& args) { Chain<TYPE, FORMAT, MODE, BATCH, STAGES>(args).run(); }},
    LOCKKIT_VARIANTS(ENTRY) LOCKKIT_CLUSTER_VARIANTS(ENTRY)
#endif
};

static int launch(const std::string& name, int grid, int shared, const Args& args, unsigned seed) {
  const auto found = kernels.find(name);
  if (found == kernels.end()) return -1;
  const bool cluster = name.find("_CLUSTER") != std::string::npos;
  return emulator::launch(grid, THREADS, shared, cluster ? args.team : 1, [&] { found->second(args); }, seed);
}

// A CUDA error, -1 for an unknown kernel, or 0.
extern "C" int run_kernel(const char* name, const unsigned grid[3], const unsigned block[3], unsigned shared,
                          void** parameters) {
  emulator::inboxes_begin = nullptr;
  if (block[0] != THREADS) return 1;                                                              // invalid value
  const int result = launch(name, int(grid[0]), int(shared), *static_cast<const Args*>(parameters[0]), 1);
  constexpr int ERRORS[] = {0, 702, 700, 716, 719};  // timeout; illegal address; misaligned address; launch failure
  return result < 0 ? result : ERRORS[result];
}

constexpr int NOT_CLEARED = 5;  // after the results of emulator.h

struct Request {
  const char* mutant;  // a prefix of the kernel's name, or ""
  int bfloat16, bits, block_size, cluster, team, tokens, hidden, depth, gated, bias, activation;
  unsigned seed;
  float gain;
  const int* ranks;                  // [depth]
  const void* const* tensors;        // in the order of the graph's function: up, its bias, gate, its bias, down;
                                     // a quantised weight is two of them
  const uint16_t *output_bias, *x;   // [hidden] or null, [tokens, hidden]
  uint16_t* y;                       // [tokens, hidden]
};

template <class T>
static float number(uint16_t bits) {
  T value;
  memcpy(&value, &bits, 2);
  return to_float(value);
}

// The weight [k, n] at `next`, which goes on to the tensor behind it.
static void read(const Request&, const void* const*& next, int k, int n, Matrix& matrix) {
  matrix.data = static_cast<const uint16_t*>(*next++), matrix.k = k, matrix.n = n;
}
static void read(const Request& r, const void* const*& next, int k, int n, QuantisedMatrix& matrix) {
  matrix.data = static_cast<const uint8_t*>(*next++), matrix.scales = static_cast<const uint16_t*>(*next++);
  matrix.blocks = (k + r.block_size - 1) / r.block_size, matrix.n = n;
  matrix.block_size = r.block_size, matrix.bits = r.bits;
}

template <class M>
static int emulate(const Request& r) {
  std::vector<BlockWeights<M>> blocks;
  const void* const* next = r.tensors;
  const auto vector = [&] { return static_cast<const uint16_t*>(*next++); };
  for (int l = 0; l < r.depth; ++l) {
    BlockWeights<M> block{};
    read(r, next, r.hidden, r.ranks[l], block.up);
    if (r.bias) block.up_bias = vector();
    if (r.gated) read(r, next, r.hidden, r.ranks[l], block.gate);
    if (r.gated && r.bias) block.gate_bias = vector();
    read(r, next, r.ranks[l], r.hidden, block.down);
    blocks.push_back(block);
  }
  const auto convert = r.bfloat16 ? number<BFloat16> : number<Half>;
  const Shape shape = shape_of(blocks);
  const std::vector<unsigned char> weights = pack_weights(shape, blocks);
  const std::vector<float> bias = pack_bias(shape, blocks, convert);
  std::vector<float> output_bias;
  for (int i = 0; r.output_bias && i < r.hidden; ++i) output_bias.push_back(convert(r.output_bias[i]));

  Plan plan;
  plan.cluster = r.cluster, plan.team = r.team;
  if (!complete(plan, {1000, 227 << 10, 16}, shape, r.tokens)) return -2;
  std::vector<uint64_t> inboxes(plan.inboxes_bytes(shape) / 8);
  emulator::inboxes_begin = inboxes.data(), emulator::inboxes_end = inboxes.data() + inboxes.size();
  Args args = plan.args(shape);
  args.x = r.x, args.y = r.y, args.tokens = r.tokens, args.weights = weights.data();
  args.bias = bias.empty() ? nullptr : bias.data();
  args.output_bias = output_bias.empty() ? nullptr : output_bias.data();
  args.inboxes = reinterpret_cast<unsigned char*>(inboxes.data());
  args.inverse_gain = 1 / r.gain, args.activation = Activation(r.activation);
  const std::string name = r.mutant + plan.kernel(r.bfloat16 ? "BFloat16" : "Half", shape.bits);
  const int result = launch(name, plan.groups * plan.team, plan.shared_bytes, args, r.seed);
  for (const uint64_t word : inboxes)
    if (!result && word) return NOT_CLEARED;  // the next launch would take it for its own
  return result;
}

// 0, or an `emulator::Result`, or NOT_CLEARED, or -1 for an unknown kernel, or -2 if the plan does not fit.
extern "C" int emulate_chain(const Request* request) {
  return request->bits == 16 ? emulate<Matrix>(*request) : emulate<QuantisedMatrix>(*request);
}

// Whether there is a kernel for the plan of a chain of depth 2: 1 or 0, or -1 if there is no plan.
extern "C" int has_kernel(int hidden, int rank, int gated, int bits, int block_size, int tokens, int multiprocessors,
                          int shared_bytes, int max_cluster) {
  Shape shape;
  if (bits < 16) QuantisedMatrix{nullptr, nullptr, 0, 0, block_size, bits}.describe(shape);
  shape.hidden = hidden, shape.depth = 2, shape.rank = rank, shape.gated = gated;
  const Gpu gpu{multiprocessors, shared_bytes, max_cluster};
  const Plan plan = make_plan(gpu, shape, tokens);
  if (!plan.team) return -1;
  const bool fits = plan.shared_bytes <= shared_bytes && (plan.cluster || plan.groups * plan.team <= multiprocessors);
  return fits && kernels.count(plan.kernel("Half", bits));
}
