// Which of the kernels for many tokens (prompt.cuh) compute a chain, and their launches: one for x, then two for each DLR
// block, one after the other on a stream.
#pragma once
#include <cmath>

#include "plan.h"
#include "prompt_args.h"

namespace lockkit_cuda {

// For more tokens than these, the plans of plan.h are not considered.
constexpr int MOST_TOKENS_OF_TEAMS = 256;

constexpr int PASS_ROWS = 128;  // passes have a multiple of these
constexpr size_t MOST_PASS_BYTES = size_t{128} << 20;  // of scratch memory, about

// Figures of an H200, fitted to measured times. Per multiprocessor and microsecond: operations of the tensor cores; bytes
// of the operands; bytes of the stream. Then microseconds from the end of a kernel to its successor's full speed, and, for
// prompt_units, more of them for each element of a thread block.
constexpr double PROMPT_OPERATIONS = 3e6, PROMPT_BYTES = 6e4, STREAM_BYTES = 3e4;
constexpr double PROMPT_START = 1.5, PROMPT_START_OF_ELEMENT = 5e-4;
// Starting early helps kernels that do not fill the GPU. Others are slower for it.
constexpr int MOST_EARLY_BLOCKS = 2;  // thread blocks for each multiprocessor

struct PromptPlan {
  int units_rows = 0, stream_rows = 0;  // of thread blocks of prompt_units and prompt_stream
  int rows = 0;                         // of a pass, which takes so many tokens through the whole chain
  bool early = false;                   // kernels start before the ones before them end
  double microseconds = 0;              // expected for all tokens

  // Thread blocks of a kernel.
  static int blocks(const Shape& shape, bool units, int block_rows, int tokens) {
    const int n = units ? shape.columns() / TILE : shape.hidden_tiles();
    const int of_block = prompt_tiles(units, block_rows).tile_columns();
    return (tokens + block_rows - 1) / block_rows * ((n + of_block - 1) / of_block);
  }
  // Scratch memory: packed_x, t, units, s.
  size_t matrix_bytes(const Shape& shape) const { return size_t(rows) * shape.hidden_tiles() * TILE * 2; }
  size_t units_bytes(const Shape& shape) const { return size_t(rows) * shape.rank * 2; }
  size_t bytes(const Shape& shape) const {
    const PromptTiles tiles = prompt_tiles(false, stream_rows);
    const size_t of_block = size_t(tiles.tile_rows()) * tiles.tile_columns() * TILE * TILE * 4;
    return 2 * matrix_bytes(shape) + units_bytes(shape) + blocks(shape, false, stream_rows, rows) * of_block;
  }

  // Compute a chain. `find` finds a kernel by its name. `launch(kernel, thread blocks, bytes of shared memory, arguments,
  // early)` launches it; early: it may start before the kernel before it ends. `all` has what is the same for all
  // kernels, and x, y, tokens, weights and biases of the whole chain.
  template <class FIND, class LAUNCH>
  void run(const Shape& shape, const char* type, const PromptArgs& all, unsigned char* scratch, FIND find,
           LAUNCH launch) const {
    const std::string form = std::string("_") + shape.format() + "_";
    const auto pack_kernel = find("prompt_pack");
    const auto units_kernel = find("prompt_units_" + (type + form) + std::to_string(units_rows));
    const auto stream_kernel = find("prompt_stream_" + (type + form) + std::to_string(stream_rows));
    PromptArgs args = all;
    void* const t = scratch + matrix_bytes(shape);
    args.packed_x = scratch;
    args.units = scratch + 2 * matrix_bytes(shape);
    args.s = reinterpret_cast<float*>(scratch + 2 * matrix_bytes(shape) + units_bytes(shape));
    for (int done = 0; done < all.tokens; done += rows) {
      args.x = static_cast<const uint16_t*>(all.x) + size_t(done) * shape.hidden;
      args.y = static_cast<uint16_t*>(all.y) + size_t(done) * shape.hidden;
      args.tokens = std::min(all.tokens - done, rows);
      const int row_tiles = (args.tokens + PASS_ROWS - 1) / PASS_ROWS * (PASS_ROWS / TILE);
      launch(pack_kernel, row_tiles * shape.hidden_tiles() / PROMPT_WARPS, 0, args, false);
      for (int l = 0; l < shape.depth; ++l) {
        args.first = l == 0, args.last = l + 1 == shape.depth;
        args.t = l ? t : args.packed_x;
        args.weights = all.weights + l * shape.block_bytes();
        args.bias = all.bias ? all.bias + size_t(l) * shape.columns() : nullptr;
        launch(units_kernel, blocks(shape, true, units_rows, args.tokens), shared_bytes(shape, true), args, early);
        args.t = t, args.weights += shape.in_bytes();
        launch(stream_kernel, blocks(shape, false, stream_rows, args.tokens), shared_bytes(shape, false), args, early);
      }
    }
  }
  int shared_bytes(const Shape& shape, bool units) const {
    return prompt_tiles(units, units ? units_rows : stream_rows).shared_bytes(shape.word_tiles());
  }
};

// What kernels are told of the chain's shape.
inline PromptArgs prompt_args(const Shape& shape) {
  PromptArgs args{};
  args.hidden = shape.hidden, args.rank = shape.rank, args.gated = shape.gated, args.scales = shape.scales;
  return args;
}

// Expected microseconds of one kernel.
inline double prompt_time(const Gpu& gpu, const Shape& shape, bool units, int block_rows, int tokens) {
  const PromptTiles tiles = prompt_tiles(units, block_rows);
  const double blocks = PromptPlan::blocks(shape, units, block_rows, tokens);
  const double rounds = std::ceil(blocks / gpu.multiprocessors), share = std::max(1., blocks / gpu.multiprocessors);
  const int step = tiles.step(shape.word_tiles());
  const int k = ((units ? shape.hidden_tiles() : shape.rank / TILE) + step - 1) / step * step;
  const double area = double(TILE) * TILE * tiles.tile_rows() * tiles.tile_columns();
  const double bytes = 512.0 * k * (tiles.tile_rows() + double(tiles.tile_columns()) / shape.word_tiles());
  const double of_stream = units ? 0 : area * 12;  // s is read and written, x is read, t is written
  const double start = PROMPT_START + (units ? PROMPT_START_OF_ELEMENT * area : 0);
  const double work = std::max(2 * area * TILE * k / PROMPT_OPERATIONS, bytes / PROMPT_BYTES + of_stream / STREAM_BYTES);
  return start + (units ? rounds : share) * work;
}

// The fastest plan by these figures. They leave out prompt_pack, and the tokens behind the last whole pass count as if they
// had the thread blocks that are best for them.
inline PromptPlan make_prompt_plan(const Gpu& gpu, const Shape& shape, int tokens) {
  const auto best_rows = [&](bool units, int rows, double& time) {
    int best = 0;
    double least = 0;
    for (const int block_rows : {128, 64, 32}) {
      if (block_rows == 32 && !units) continue;
      const double found = prompt_time(gpu, shape, units, block_rows, rows);
      if (!best || found < least) best = block_rows, least = found;
    }
    time += least;
    return best;
  };
  const size_t of_token = size_t(shape.hidden_tiles()) * TILE * 8 + shape.rank * 2;
  const int most = int(std::max<size_t>(1, MOST_PASS_BYTES / of_token / PASS_ROWS));
  PromptPlan best;
  double least = 0;
  for (int rows = PASS_ROWS; rows <= most * PASS_ROWS; rows += PASS_ROWS) {
    PromptPlan plan;
    plan.rows = rows;
    double time = 0, of_rest = 0;
    plan.units_rows = best_rows(true, std::min(rows, tokens), time);
    plan.stream_rows = best_rows(false, std::min(rows, tokens), time);
    if (tokens % rows) best_rows(true, tokens % rows, of_rest), best_rows(false, tokens % rows, of_rest);
    time = tokens < rows ? time : tokens / rows * time + of_rest;
    if (!best.rows || time < least) best = plan, least = time;
    best.microseconds = least * shape.depth;
    if (rows >= tokens) break;
  }
  const int first = std::min(best.rows, tokens), most_early = MOST_EARLY_BLOCKS * gpu.multiprocessors;
  best.early = PromptPlan::blocks(shape, true, best.units_rows, first) <= most_early &&
               PromptPlan::blocks(shape, false, best.stream_rows, first) <= most_early;
  return best;
}

// Whether the kernels for many tokens compute these tokens faster than a team.
inline bool prefers_prompt(const Gpu& gpu, const Shape& shape, int tokens) {
  if (tokens == 1) return false;
  return tokens > MOST_TOKENS_OF_TEAMS ||
         make_prompt_plan(gpu, shape, tokens).microseconds < make_plan(gpu, shape, tokens).microseconds;
}

}  // namespace lockkit_cuda
