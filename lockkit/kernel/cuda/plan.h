// How a chain runs for a number of tokens: in which mode, with how many members in a team, and how many groups at once.
#pragma once
#include <algorithm>
#include <string>

#include "pack.h"
#include "variants.h"

namespace lockkit_cuda {

struct Gpu {
  int multiprocessors;
  int shared_bytes;  // that a thread block may have
  int max_cluster;   // thread blocks in a cluster; 0: no clusters
  int clusters = 0;  // of that size, at once
};

struct Plan {
  bool cluster = false;
  int team = 0, tiles = 0;  // members, and tiles of channels of each; team = 0: there is no plan
  int rows = 0;             // tokens in a group
  int groups = 0;           // of tokens, in one launch
  int shared_bytes = 0;
  double microseconds = 0;  // expected for all launches

  // The kernel's name, for a type of activations.
  std::string kernel(const char* type, const Shape& shape) const {
    return std::string("chain_") + type + "_" + shape.format() + (cluster ? "_CLUSTER" : "_GLOBAL");
  }
  // What a kernel is told of the chain's shape and of this plan.
  Args args(const Shape& shape) const {
    Args args{};
    args.hidden = shape.hidden, args.depth = shape.depth, args.rank = shape.rank, args.gated = shape.gated;
    args.scales = shape.scales, args.team = team, args.tiles = tiles, args.rows = rows;
    args.parts = WARPS / tiles, args.own_pairs = (shape.rank / 2 + team - 1) / team;
    return args;
  }
  // Of the inboxes of all members in global memory.
  size_t inboxes_bytes(const Shape& shape) const {
    return cluster ? 0 : size_t(args(shape).inbox_bytes()) * team * groups;
  }
};

// Figures of an H200, in microseconds, fitted to what tools/gpu_plans.cpp measured there. Other GPUs were not tried.
constexpr double LAUNCH = 2.2;
constexpr double BLOCK_CLUSTER = 1.8, BLOCK_GLOBAL = 2.3, BLOCK_OF_MEMBER = 0.03;  // a DLR block; GLOBAL: for each member
constexpr double UNIT = 0.006, UNIT_OF_TILE = 0.0009;                              // its units; for each tile of a member
constexpr double ROW_UNIT_CLUSTER = 0.0011, ROW_UNIT_GLOBAL = 0.0019;              // for each token but the first
constexpr double BYTES_OF_CLUSTER = 1e6, BYTES_OF_MULTIPROCESSOR = 2e4;            // that are read in a microsecond

// Fill in what follows from the team: false if the GPU cannot run it. Members of GLOBAL must all be resident.
inline bool complete(Plan& plan, const Gpu& gpu, const Shape& shape, int tokens) {
  if (plan.team > (plan.cluster ? gpu.max_cluster : gpu.multiprocessors)) return false;
  const int step = shape.word_tiles();  // members own whole words
  plan.tiles = ((shape.hidden_tiles() + plan.team - 1) / plan.team + step - 1) / step * step;
  if (plan.tiles > WARPS) return false;
  if (!plan.cluster) plan.team = (shape.hidden_tiles() + plan.tiles - 1) / plan.tiles;  // no member without channels
  for (plan.rows = std::min(tokens, MAX_ROWS); plan.rows > 0; plan.rows /= 2) {
    plan.shared_bytes = Layout(plan.args(shape), plan.cluster, ring_words(plan.cluster, shape.bits)).bytes;
    if (plan.shared_bytes <= gpu.shared_bytes) break;
  }
  if (plan.rows == 0) return false;

  const int all_groups = (tokens + plan.rows - 1) / plan.rows;
  const int at_once = std::max(1, plan.cluster ? gpu.clusters : gpu.multiprocessors / plan.team);
  const double rounds = (all_groups + at_once - 1) / at_once;
  const double bytes = double(shape.block_bytes()) * shape.depth;
  const double rate = plan.cluster ? BYTES_OF_CLUSTER : BYTES_OF_MULTIPROCESSOR * gpu.multiprocessors;
  const double block = (plan.cluster ? BLOCK_CLUSTER : BLOCK_GLOBAL + BLOCK_OF_MEMBER * plan.team) +
                       shape.rank * (UNIT + UNIT_OF_TILE * plan.tiles) +
                       shape.rank * (plan.rows - 1) * (plan.cluster ? ROW_UNIT_CLUSTER : ROW_UNIT_GLOBAL);
  plan.microseconds = rounds * (std::max(bytes / rate, shape.depth * block) + LAUNCH);
  plan.groups = plan.cluster ? all_groups : std::min(all_groups, at_once);  // all members of GLOBAL must be resident
  return true;
}

// The fastest plan by these figures. Its `team` is 0 if the GPU cannot run this chain.
inline Plan make_plan(const Gpu& gpu, const Shape& shape, int tokens) {
  Plan best;
  const auto consider = [&](bool cluster, int team) {
    Plan plan;
    plan.cluster = cluster, plan.team = team;
    if (complete(plan, gpu, shape, tokens) && (!best.team || plan.microseconds < best.microseconds)) best = plan;
  };
  if (gpu.max_cluster) consider(true, std::min(gpu.max_cluster, shape.hidden_tiles()));
  for (int tiles = 1; tiles <= WARPS; ++tiles) consider(false, (shape.hidden_tiles() + tiles - 1) / tiles);
  return best;
}

}  // namespace lockkit_cuda
