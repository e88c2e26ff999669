// Which kernel of variants.h computes a chain for a number of tokens, with how many thread blocks, and in which spans.
#pragma once
#include <algorithm>
#include <string>

#include "cross.h"

namespace lockkit_cuda {

struct Gpu {
  int multiprocessors;
  int shared_bytes;  // that a thread block may have
  int max_cluster;   // thread blocks in a cluster; 0: no clusters
  double memory_rate = 0;  // bytes that its memory gives in a microsecond, at most; 0: unknown
};

struct Plan {
  bool cluster = false;
  int mt = 0, nt = 1;        // as in variants.h; mt = 0: there is no plan
  int team = 0, tiles = 0;   // members, and tiles of channels of each
  int chunk = 0;             // units in shared memory
  int span = 1;              // DLR blocks in a span
  int groups = 0;            // of tokens, in one launch
  int shared_bytes = 0;
  double microseconds = 0;   // expected for all launches

  int rows() const { return TILE * mt; }
  // The kernel's name, for a type of activations and bits of a weight.
  std::string kernel(const char* type, int bits) const {
    const char* format = bits == 16 ? "_Plain" : bits == 8 ? "_Int8" : "_Int4";
    return std::string("chain_") + type + format + (cluster ? "_CLUSTER_" : "_GLOBAL_") + std::to_string(mt) + "_" +
           std::to_string(nt);
  }
  // What a kernel is told of the chain's shape and of this plan.
  Args args(const Shape& shape) const {
    Args args{};
    args.hidden = shape.hidden, args.depth = shape.depth, args.rank = shape.rank, args.gated = shape.gated;
    args.scales = shape.scales, args.team = team, args.tiles = tiles, args.chunk = chunk, args.span = span;
    return args;
  }
  int shared_bytes_for(const Shape& shape) const {
    const int stages = mt == 1 && shape.bits == 16 ? 16 : 8;
    return Layout(args(shape), cluster, rows(), stages).bytes;
  }
  size_t sums_bytes(const Shape& shape) const { return size_t(groups) * team * rows() * shape.columns() * span * 4; }
  size_t units_bytes(const Shape& shape) const { return size_t(groups) * rows() * shape.rank * span * 2; }
};

// Figures of an H100, from public sources; other GPUs are slower or smaller by similar factors, so that the choice
// between plans is the same. None is measured. Bytes and operations are per microsecond.
constexpr double BYTES_PER_MEMBER = 7e4, BYTES_PER_MULTIPROCESSOR = 2.1e4, OPERATIONS_PER_MEMBER = 2.5e6;
constexpr double SHARE_OF_MEMORY_RATE = 0.85;
constexpr double MEETING_GLOBAL = 1.0, MEETING_CLUSTER = 0.3, LAUNCH = 2.2;
// Of a span, of each of its blocks, and of each of them but the first.
constexpr double SPAN_OVERHEAD = 0.3, BLOCK_OVERHEAD = 0.2, CROSS_OVERHEAD = 0.1;
// With cross products, which are not for the tensor cores.
constexpr double CROSS_OPERATIONS_PER_MEMBER = 1.2e5;

// Making 16-bit floats of a tile of integers takes about as many instructions as multiplying it by these rows.
constexpr int ROWS_TO_WIDEN = TILE;

// Most tiles of channels in a member.
inline int max_tiles(int mt, const Shape& shape) { return mt == 1 || shape.bits == 16 ? 2 * WARPS : WARPS; }

// Fill in what follows from the team: false if the GPU cannot run it.
inline bool complete(Plan& plan, const Gpu& gpu, const Shape& shape, int tokens) {
  const int step = shape.word_tiles();  // members own whole words
  plan.tiles = ((shape.hidden_tiles() + plan.team - 1) / plan.team + step - 1) / step * step;
  plan.nt = plan.tiles > WARPS ? 2 : 1;
  if (plan.tiles > max_tiles(plan.mt, shape)) return false;
  if (!plan.cluster) plan.team = (shape.hidden_tiles() + plan.tiles - 1) / plan.tiles;  // no member without channels
  plan.chunk = shape.rank * plan.span;
  if (!plan.cluster && plan.span == 1) {
    plan.chunk = 0;
    const int room = (gpu.shared_bytes - plan.shared_bytes_for(shape)) / (plan.rows() * 2);
    plan.chunk = room < shape.rank ? room / (TILE * step) * TILE * step : shape.rank;
  }
  plan.shared_bytes = plan.shared_bytes_for(shape);
  if (plan.chunk < TILE || plan.shared_bytes > gpu.shared_bytes) return false;

  const int all_groups = (tokens + plan.rows() - 1) / plan.rows();
  const int at_once = std::max(1, gpu.multiprocessors / plan.team);
  const double rounds = (all_groups + at_once - 1) / at_once;
  const int spans = (shape.depth + plan.span - 1) / plan.span;
  const double bytes_read = double(shape.block_bytes()) * shape.depth + 2 * cross_count(shape, plan.span);
  const double rate =
      gpu.memory_rate > 0 ? gpu.memory_rate * SHARE_OF_MEMORY_RATE : BYTES_PER_MULTIPROCESSOR * gpu.multiprocessors;
  const double read = std::max(bytes_read / plan.team / BYTES_PER_MEMBER, bytes_read / rate);
  const double weights = double(shape.columns() + shape.rank) * shape.hidden_tiles() * TILE * shape.depth;
  const int rows = plan.rows() + (shape.bits < 16 ? ROWS_TO_WIDEN : 0);
  const double compute = 2 * weights * rows / plan.team / OPERATIONS_PER_MEMBER;
  const double meet = (shape.depth + spans) * (plan.cluster ? MEETING_CLUSTER : MEETING_GLOBAL) +
                      spans * SPAN_OVERHEAD + shape.depth * BLOCK_OVERHEAD + (shape.depth - spans) * CROSS_OVERHEAD;
  const double own = plan.args(shape).most_own_units(), cross_rows = std::min(tokens, plan.rows());
  const double cross = 2 * cross_rows * cross_count(shape, plan.span) * own / shape.rank / CROSS_OPERATIONS_PER_MEMBER;
  plan.microseconds = rounds * (std::max({read, compute, meet + cross}) + (plan.cluster ? 0 : LAUNCH));
  plan.groups = plan.cluster ? all_groups : std::min(all_groups, at_once);
  return true;
}

// The fastest plan by these figures, with spans of 1 or of `shape.span` blocks. Its `mt` is 0 if the GPU cannot run this
// chain.
inline Plan make_plan(const Gpu& gpu, const Shape& shape, int tokens) {
  Plan best;
  const auto consider = [&](bool cluster, int mt, int team, int span = 1) {
    Plan plan;
    plan.cluster = cluster, plan.mt = mt, plan.team = team, plan.span = span;
    if (complete(plan, gpu, shape, tokens) && (!best.mt || plan.microseconds < best.microseconds)) best = plan;
  };
  for (const int mt : {1, 4}) {
    if (mt > 1 && tokens <= TILE) break;
    if (gpu.max_cluster) consider(true, mt, std::min(gpu.max_cluster, shape.hidden_tiles()));
    const int groups = (tokens + TILE * mt - 1) / (TILE * mt);
    const int smallest = (shape.hidden_tiles() + max_tiles(mt, shape) - 1) / max_tiles(mt, shape);
    if (smallest > gpu.multiprocessors) continue;  // members must all be resident
    for (int share = 1; share <= std::max(1, std::min(groups, gpu.multiprocessors / smallest)); ++share)
      for (const int span : {1, shape.span})
        if (span == 1 || mt == 1) consider(false, mt, std::min(shape.hidden_tiles(), gpu.multiprocessors / share), span);
  }
  return best;
}

// How many blocks a span should have, for one token. It is 1 if cross products, which need memory, save too little time.
inline int best_span(const Gpu& gpu, Shape shape) {
  constexpr double WORTH = 0.9;
  shape.span = 1;
  int best = 1;
  double least = make_plan(gpu, shape, 1).microseconds * WORTH;
  for (const int span : {2, 4}) {
    shape.span = span;
    const Plan plan = make_plan(gpu, shape, 1);
    if (plan.span == span && plan.microseconds < least) best = span, least = plan.microseconds;
  }
  return best;
}

}  // namespace lockkit_cuda
