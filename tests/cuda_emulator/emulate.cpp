// The CUDA kernels as a library for the CPU, on the emulator.
//
// `emulate_chain` computes a chain, for tests in Python. `run_kernel` computes what the operator launches on the fake
// CUDA driver of the tests. MUTANTS or PROMPT_MUTANTS, if defined, is a file with changed copies of the kernels, see
// mutants.py and prompt_mutants.py.
#include "emulator.h"

#include <map>
#include <string>

#if defined(MUTANTS)
#include "mutants.h"
#elif defined(PROMPT_MUTANTS)
#include "prompt_mutants.h"
#else
#include "chain.cuh"
#include "prompt.cuh"
#endif
#include "plan.h"
#include "prompt.h"
#include "variants.h"

using namespace lockkit_cuda;
using Kernel = void (*)(const Args&);

static const std::map<std::string, Kernel> kernels = {
#if defined(MUTANTS)
#include MUTANTS
#elif !defined(PROMPT_MUTANTS)
#define ENTRY(TYPE, FORMAT, MODE, BATCH, STAGES) \
  {"chain_" #TYPE "_" #FORMAT "_" #MODE, [](const Args& args) { Chain<TYPE, FORMAT, MODE, BATCH, STAGES>(args).run(); }},
    LOCKKIT_VARIANTS(ENTRY) LOCKKIT_CLUSTER_VARIANTS(ENTRY)
#endif
};

using PromptKernel = void (*)(const PromptArgs&);
static const std::map<std::string, PromptKernel> prompt_kernels = {
#if defined(PROMPT_MUTANTS)
#include PROMPT_MUTANTS
#elif !defined(MUTANTS)
#define PROMPT_ENTRY(TYPE, FORMAT, NAME, UNITS, ROWS)     \
  {"prompt_" #NAME "_" #TYPE "_" #FORMAT "_" #ROWS,       \
   [](const PromptArgs& args) { Prompt<TYPE, FORMAT, UNITS, ROWS>(args).run(); }},
    LOCKKIT_PROMPT_VARIANTS(PROMPT_ENTRY) {"prompt_pack", [](const PromptArgs& args) { prompt_pack(args); }}
#endif
};

static int launch(const std::string& name, int grid, int shared, const PromptArgs& args, unsigned seed) {
  const auto found = prompt_kernels.find(name);
  if (found == prompt_kernels.end()) return -1;
  return emulator::launch(grid, PROMPT_THREADS, shared, 1, [&] { found->second(args); }, seed);
}

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
  const bool prompt = !std::strncmp(name, "prompt_", 7);
  if (int(block[0]) != (prompt ? PROMPT_THREADS : THREADS)) return 1;  // invalid value
  const int result = prompt ? launch(name, int(grid[0]), int(shared), *static_cast<const PromptArgs*>(parameters[0]), 1)
                            : launch(name, int(grid[0]), int(shared), *static_cast<const Args*>(parameters[0]), 1);
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
  int prompt_units_rows, prompt_stream_rows, prompt_rows;  // of a PromptPlan, if rows are not 0
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

// Compute a chain by the kernels for many tokens. Scratch memory starts as NaN.
static int emulate_prompt(const Request& r, const Shape& shape, const unsigned char* weights, const float* bias,
                          const float* output_bias) {
  constexpr size_t GUARD_BYTES = 1 << 16;
  PromptPlan plan;
  plan.units_rows = r.prompt_units_rows, plan.stream_rows = r.prompt_stream_rows, plan.rows = r.prompt_rows;
  std::vector<unsigned char> scratch(plan.bytes(shape) + GUARD_BYTES, 0xff);
  PromptArgs args = prompt_args(shape);
  args.x = r.x, args.y = r.y, args.tokens = r.tokens, args.weights = weights, args.bias = bias;
  args.output_bias = output_bias, args.inverse_gain = 1 / r.gain, args.activation = Activation(r.activation);
  int result = 0;
  plan.run(shape, r.bfloat16 ? "BFloat16" : "Half", args, scratch.data(),
               [&](const std::string& name) { return r.mutant + name; },
               [&](const std::string& name, int grid, int shared, const PromptArgs& of_kernel, bool) {
                 if (!result) result = launch(name, grid, shared, of_kernel, r.seed);
               });
  const auto changed = [](unsigned char byte) { return byte != 0xff; };
  return !result && std::any_of(scratch.end() - GUARD_BYTES, scratch.end(), changed) ? emulator::OUT_OF_BOUNDS : result;
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
  if (r.prompt_rows)
    return emulate_prompt(r, shape, weights.data(), bias.empty() ? nullptr : bias.data(),
                          output_bias.empty() ? nullptr : output_bias.data());

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
  const std::string name = r.mutant + plan.kernel(r.bfloat16 ? "BFloat16" : "Half", shape);
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
  return fits && kernels.count(plan.kernel("Half", shape));
}

// Whether the operator takes the kernels for many tokens, on an H200: 1 or 0.
extern "C" int prefers_prompt_on_h200(int hidden, int rank, int depth, int tokens) {
  Shape shape;
  shape.hidden = hidden, shape.rank = rank, shape.depth = depth, shape.gated = 1;
  return prefers_prompt({132, 227 << 10, 16, 7}, shape, tokens);
}

// Bytes of scratch memory of the plan for many tokens, or -1 if one of its kernels does not exist.
extern "C" int prompt_scratch_bytes(int hidden, int rank, int gated, int bits, int block_size, int tokens,
                                    int multiprocessors) {
  Shape shape;
  if (bits < 16) QuantisedMatrix{nullptr, nullptr, 0, 0, block_size, bits}.describe(shape);
  shape.hidden = hidden, shape.depth = 2, shape.rank = rank, shape.gated = gated;
  const PromptPlan plan = make_prompt_plan({multiprocessors, 99 << 10, 0}, shape, tokens);
  PromptArgs args{};
  args.tokens = tokens;
  bool found = plan.shared_bytes(shape, true) <= 99 << 10 && plan.shared_bytes(shape, false) <= 99 << 10;
  const auto find = [&](const std::string& name) { return found &= prompt_kernels.count(name) > 0; };
  plan.run(shape, "Half", args, nullptr, find, [](bool, int, int, const PromptArgs&, bool) {});
  return found ? int(plan.bytes(shape)) : -1;
}

// Rows of a thread block of prompt_units, for a gated chain with weights of 16 bits.
extern "C" int prompt_units_rows(int hidden, int rank, int tokens, int multiprocessors) {
  Shape shape;
  shape.hidden = hidden, shape.depth = 2, shape.rank = rank, shape.gated = 1;
  return make_prompt_plan({multiprocessors, 99 << 10, 0}, shape, tokens).units_rows;
}
