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

#include "cross.h"
#include "driver.h"

using namespace lockkit_cuda;

namespace {

constexpr size_t BYTES_OF_ALL_COPIES = 400'000'000;  // several times the largest L2 cache
constexpr int ROUNDS = 3;

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

void launch(const Plan& plan, const Shape& shape, Args args) {
  const cuda::Function function = device().function(plan.kernel(shape.bits == 16 ? "BFloat16" : "Half", shape.bits));
  const size_t barriers = size_t(device().gpu().multiprocessors) * BARRIER_BYTES, sums = plan.sums_bytes(shape);
  if (!plan.cluster) {
    const cuda::Address at = device().scratch(nullptr, barriers + sums + plan.units_bytes(shape));
    args.barriers = reinterpret_cast<unsigned*>(at);
    args.sums = reinterpret_cast<float*>(at + barriers);
    args.units = reinterpret_cast<void*>(at + barriers + sums);
  }
  const int rows = plan.groups * plan.rows();
  const Args all = args;
  for (int done = 0; done < all.tokens; done += rows) {
    const size_t moved = size_t(done) * shape.hidden * 2;
    args.x = static_cast<const char*>(all.x) + moved, args.y = static_cast<char*>(all.y) + moved;
    args.tokens = std::min(all.tokens - done, rows);
    const int groups = (args.tokens + plan.rows() - 1) / plan.rows();
    cuda::LaunchOption option{plan.cluster ? cuda::LAUNCH_CLUSTER : cuda::LAUNCH_COOPERATIVE, 0,
                              {plan.cluster ? plan.team : 1, 1, 1}};
    cuda::LaunchConfig config{{unsigned(groups * plan.team), 1, 1}, {THREADS, 1, 1}, unsigned(plan.shared_bytes),
                              nullptr, &option, 1};
    void* parameters[] = {&args};
    driver().call("cuLaunchKernelEx", static_cast<const cuda::LaunchConfig*>(&config), function,
                  static_cast<void**>(parameters), static_cast<void**>(nullptr));
  }
}

void measure(const Case& which, int tokens, const Plan& plan, bool chosen, const std::vector<cuda::Address>& weights,
             cuda::Address cross, cuda::Address x, cuda::Address y) {
  const Shape shape = [&] {
    Shape found = shape_of(which);
    found.span = plan.span;
    return found;
  }();
  Args args = plan.args(shape);
  args.x = reinterpret_cast<void*>(x), args.y = reinterpret_cast<void*>(y), args.tokens = tokens;
  args.cross = reinterpret_cast<void*>(cross), args.inverse_gain = 0.5f, args.activation = Activation::silu;
  void *start, *end;
  driver().call("cuEventCreate", &start, 0u), driver().call("cuEventCreate", &end, 0u);
  float least = 0;
  for (int round = 0; round <= ROUNDS; ++round) {
    driver().call("cuEventRecord", start, static_cast<void*>(nullptr));
    for (const cuda::Address at : weights) {
      args.weights = reinterpret_cast<const unsigned char*>(at);
      launch(plan, shape, args);
    }
    driver().call("cuEventRecord", end, static_cast<void*>(nullptr));
    driver().call("cuEventSynchronize", end);
    float milliseconds;
    driver().call("cuEventElapsedTime", &milliseconds, start, end);
    if (round == 1 || (round > 1 && milliseconds < least)) least = milliseconds;
  }
  std::printf("{\"hidden\": %d, \"depth\": %d, \"rank\": %d, \"bits\": %d, \"tokens\": %d, \"mode\": \"%s\", \"mt\": %d, "
              "\"nt\": %d, \"team\": %d, \"tiles\": %d, \"span\": %d, \"groups\": %d, \"chosen\": %s, "
              "\"expected_us\": %.1f, \"measured_us\": %.1f}\n",
              which.hidden, which.depth, shape.rank, which.bits, tokens, plan.cluster ? "cluster" : "global", plan.mt,
              plan.nt, plan.team, plan.tiles, plan.span, plan.groups, chosen ? "true" : "false", plan.microseconds,
              least * 1e3 / double(weights.size()));
  std::fflush(stdout);
}

void measure(const Case& which) {
  const Gpu gpu = device().gpu();
  const Shape shape = shape_of(which);
  const size_t bytes = shape.block_bytes() * shape.depth;
  std::vector<cuda::Address> weights;
  while (weights.size() * bytes < BYTES_OF_ALL_COPIES || weights.size() < 4) weights.push_back(random_memory(bytes));
  const cuda::Address cross = random_memory(cross_count(shape, 4) * 2 + cross_count(shape, 2) * 2);
  const cuda::Address x = random_memory(size_t(512) * shape.hidden * 2), y = random_memory(size_t(512) * shape.hidden * 2);
  for (const int tokens : {1, 16, 64, 512}) {
    Shape spanned = shape;
    spanned.span = best_span(gpu, shape);
    const Plan best = make_plan(gpu, spanned, tokens);
    for (const int mt : {1, 4})
      for (const int mode : {0, 1})
        for (const int span : {1, 2, 4}) {
          if ((mode && (span > 1 || !gpu.max_cluster)) || (mt > 1 && (tokens <= TILE || span > 1))) continue;
          int before = 0;
          for (const int team : {16, 32, 43, 64, 86, 128}) {
            if (mode && team != 16) continue;
            Plan plan;
            plan.cluster = mode, plan.mt = mt, plan.span = span;
            plan.team = mode ? std::min(gpu.max_cluster, shape.hidden_tiles()) : std::min(team, shape.hidden_tiles());
            Shape own = shape;
            own.span = span;
            if (!complete(plan, gpu, own, tokens) || plan.team == before) continue;
            before = plan.team;
            const bool chosen = plan.cluster == best.cluster && plan.mt == best.mt && plan.span == best.span &&
                                plan.team == best.team;
            measure(which, tokens, plan, chosen, weights, cross, x, y);
          }
        }
  }
  for (const cuda::Address at : weights) device().free(at);
  for (const cuda::Address at : {cross, x, y}) device().free(at);
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
