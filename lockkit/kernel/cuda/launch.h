// How a chain is launched on a stream, by a plan for a few tokens or for many. The host waits for nothing.
#pragma once
#include "driver.h"
#include "prompt.h"

namespace {
namespace cuda {

using lockkit_cuda::Args;
using lockkit_cuda::Plan;
using lockkit_cuda::PromptArgs;
using lockkit_cuda::PromptPlan;
using lockkit_cuda::Shape;

// Launch a plan's kernel, once or several times in turn. `type` is Half or BFloat16; `all` has the chain, x, y and tokens.
inline void launch(Device& device, const Plan& plan, const Shape& shape, const char* type, const Args& all, Stream stream) {
  const Function function = device.function(plan.kernel(type, shape));
  Args args = all;
  if (!plan.cluster)
    args.inboxes = reinterpret_cast<unsigned char*>(device.zeros(stream, plan.inboxes_bytes(shape)));
  const int rows = plan.groups * plan.rows;
  for (int64_t done = 0; done < all.tokens; done += rows) {
    args.x = static_cast<const uint16_t*>(all.x) + done * shape.hidden;
    args.y = static_cast<uint16_t*>(all.y) + done * shape.hidden;
    args.tokens = int(std::min<int64_t>(all.tokens - done, rows));
    const int groups = (args.tokens + plan.rows - 1) / plan.rows;
    LaunchOption option{plan.cluster ? LAUNCH_CLUSTER : LAUNCH_COOPERATIVE, 0, {plan.cluster ? plan.team : 1, 1, 1}};
    const LaunchConfig config{{unsigned(groups * plan.team), 1, 1}, {lockkit_cuda::THREADS, 1, 1},
                              unsigned(plan.shared_bytes), stream, &option, 1};
    Driver::get().launch(config, function, args);
  }
}

// Launch the kernels for many tokens.
inline void launch(Device& device, const PromptPlan& plan, const Shape& shape, const char* type, const PromptArgs& all,
                   Stream stream) {
  auto* scratch = reinterpret_cast<unsigned char*>(device.scratch(stream, plan.bytes(shape)));
  const bool can_be_early = device.gpu().max_cluster > 0;  // of sm_90 or up, and not compiled from PTX
  plan.run(
      shape, type, all, scratch, [&](const std::string& name) { return device.function(name); },
      [&](Function function, int grid, int shared, PromptArgs args, bool early) {
        LaunchOption option{LAUNCH_EARLY, 0, {1}};
        const LaunchConfig config{{unsigned(grid), 1, 1}, {lockkit_cuda::PROMPT_THREADS, 1, 1}, unsigned(shared),
                                  stream, &option, early && can_be_early};
        Driver::get().launch(config, function, args);
      });
}

}  // namespace cuda
}  // namespace
