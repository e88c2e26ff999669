// Times of the fused CUDA operator's kernels for many plans, beside the times that plan.h expects of them.
//
//   c++ -std=c++17 -O1 -I lockkit/kernel/cuda -DLOCKKIT_CUBINS='"chain.fatbin"' tools/gpu_plans.cpp -ldl -o gpu_plans
//   ./gpu_plans > plans.jsonl
//
// A chain runs with many copies of its weights in turn, so that they come from the GPU's memory and not from its cache,
// as those of a model's layers do. Weights are random. One line of JSON for each plan: sizes, plan, microseconds expected
// and measured for one chain.
#include <cstdio>
#include <random>

#include "launch.h"

using namespace lockkit_cuda;

namespace {

constexpr size_t BYTES_OF_ALL_COPIES = 150'000'000;  // three times an H200's L2 cache
constexpr int ROUNDS = 3, MOST_TOKENS = 8192;

struct Case {
  int hidden, depth, width, bits;
};

cuda::Device& device() { return cuda::Device::current(); }
const cuda::Driver& driver() { return cuda::Driver::get(); }

// Random 16-bit floats of small size; as integers and scales, small too.
cuda::Address random_memory(size_t bytes) {
  static const std::vector<uint16_t> numbers = [] {
    std::vector<uint16_t> found(1 << 20);
    std::mt19937 random(0);
    for (auto& number : found) number = uint16_t((random() & 0x81ff) | 0x2c00);  // fp16: 0.06 to 0.12, and signs
    return found;
  }();
  const cuda::Address at = device().allocate(bytes + 4096);
  for (size_t done = 0; done < bytes; done += numbers.size() * 2)
    driver().call("cuMemcpyHtoD_v2", at + done, static_cast<const void*>(numbers.data()),
                  std::min(bytes - done, numbers.size() * 2));
  return at;
}

Shape shape_of(const Case& which) {
  Shape shape;
  shape.hidden = which.hidden, shape.depth = which.depth, shape.gated = 1, shape.bits = which.bits;
  shape.rank = (which.width / which.depth + TILE - 1) / TILE * TILE;
  shape.scales = which.bits == 16 ? 0 : std::max(1, 256 / which.bits / 32);
  return shape;
}

const char* type_of(const Shape& shape) { return shape.bits == 16 ? "BFloat16" : "Half"; }

// Microseconds of one of the launches that `launch_with` makes, each with one copy of the weights.
template <class F>
double time_of(const std::vector<cuda::Address>& weights, F launch_with) {
  void *start, *end;
  driver().call("cuEventCreate", &start, 0u), driver().call("cuEventCreate", &end, 0u);
  float least = 0;
  for (int round = 0; round <= ROUNDS; ++round) {
    driver().call("cuEventRecord", start, static_cast<void*>(nullptr));
    for (const cuda::Address at : weights) launch_with(reinterpret_cast<const unsigned char*>(at));
    driver().call("cuEventRecord", end, static_cast<void*>(nullptr));
    driver().call("cuEventSynchronize", end);
    float milliseconds;
    driver().call("cuEventElapsedTime", &milliseconds, start, end);
    if (round == 1 || (round > 1 && milliseconds < least)) least = milliseconds;
  }
  return least * 1e3 / double(weights.size());
}

void print(const Case& which, int tokens, const char* mode, const std::string& plan, bool chosen, double expected,
           double measured) {
  std::printf("{\"hidden\": %d, \"depth\": %d, \"rank\": %d, \"bits\": %d, \"tokens\": %d, \"mode\": \"%s\", %s, "
              "\"chosen\": %s, \"expected_us\": %.1f, \"measured_us\": %.1f}\n",
              which.hidden, which.depth, shape_of(which).rank, which.bits, tokens, mode, plan.c_str(),
              chosen ? "true" : "false", expected, measured);
  std::fflush(stdout);
}

void measure(const Case& which, int tokens, const Plan& plan, bool chosen, const std::vector<cuda::Address>& weights,
             cuda::Address x, cuda::Address y) {
  const Shape shape = shape_of(which);
  Args args = plan.args(shape);
  args.x = reinterpret_cast<void*>(x), args.y = reinterpret_cast<void*>(y), args.tokens = tokens;
  args.inverse_gain = 0.5f, args.activation = Activation::silu;
  const double measured = time_of(weights, [&](const unsigned char* at) {
    args.weights = at;
    cuda::launch(device(), plan, shape, type_of(shape), args, nullptr);
  });
  const std::string form = "\"team\": " + std::to_string(plan.team) + ", \"rows\": " + std::to_string(plan.rows);
  print(which, tokens, plan.cluster ? "cluster" : "global", form, chosen, plan.microseconds, measured);
}

// The kernels for many tokens, by the fastest of their plans.
void measure_prompt(const Case& which, int tokens, const std::vector<cuda::Address>& weights, cuda::Address x,
                    cuda::Address y) {
  const Shape shape = shape_of(which);
  const PromptPlan plan = make_prompt_plan(device().gpu(), shape, tokens);
  PromptArgs args = prompt_args(shape);
  args.x = reinterpret_cast<void*>(x), args.y = reinterpret_cast<void*>(y), args.tokens = tokens;
  args.inverse_gain = 0.5f, args.activation = Activation::silu;
  const double measured = time_of(weights, [&](const unsigned char* at) {
    args.weights = at;
    cuda::launch(device(), plan, shape, type_of(shape), args, nullptr);
  });
  const std::string form = "\"team\": 0, \"rows\": " + std::to_string(plan.rows);
  print(which, tokens, "prompt", form, prefers_prompt(device().gpu(), shape, tokens), plan.microseconds, measured);
}

void measure(const Case& which) {
  const Gpu gpu = device().gpu();
  const Shape shape = shape_of(which);
  const size_t bytes = shape.block_bytes() * shape.depth;
  std::vector<cuda::Address> weights;
  while (weights.size() * bytes < BYTES_OF_ALL_COPIES || weights.size() < 4) weights.push_back(random_memory(bytes));
  const cuda::Address x = random_memory(size_t(MOST_TOKENS) * shape.hidden * 2),
                      y = random_memory(size_t(MOST_TOKENS) * shape.hidden * 2);
  for (const int tokens : {1, 4, 16, 64, 128}) {
    const Plan best = make_plan(gpu, shape, tokens);
    if (best.team) measure(which, tokens, best, !prefers_prompt(gpu, shape, tokens), weights, x, y);
    for (const bool cluster : {true, false}) {
      int before = 0;
      for (const int team : {8, 16, 32, 43, 64, 86, 128}) {
        Plan plan;
        plan.cluster = cluster, plan.team = std::min(team, shape.hidden_tiles());
        if (cluster && team > gpu.max_cluster) continue;
        if (!complete(plan, gpu, shape, tokens) || plan.team == before) continue;
        before = plan.team;
        if (plan.cluster != best.cluster || plan.team != best.team) measure(which, tokens, plan, false, weights, x, y);
      }
    }
  }
  for (const int tokens : {16, 64, 128, 512, MOST_TOKENS}) measure_prompt(which, tokens, weights, x, y);
  for (const cuda::Address at : weights) device().free(at);
  for (const cuda::Address at : {x, y}) device().free(at);
}

}  // namespace

int main() {
  try {
    for (const int bits : {16, 4})
      for (const int depth : {32, 16, 64}) {
        measure({1024, depth, 3072, bits});
        measure({4096, depth, 12288, bits});
      }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gpu_plans: %s\n", error.what());
    return 1;
  }
  return 0;
}
