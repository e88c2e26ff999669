// A whole chain: its packed weights and its computation. dlr_chain.cpp describes the steps.
//
// `Format` is the number format of the weights: `Plain` (plain.h) or `NBits` (nbits.h).
#pragma once
#include <atomic>
#include <thread>

#include "nbits.h"
#include "plain.h"
#include "team.h"

namespace {

constexpr int FEW_TOKENS = 8;           // up to this many tokens, all threads share the work of each block
constexpr int TILE_TOKENS = 256;        // above that, tokens that one thread takes through all blocks
constexpr int GROUP_TOKENS = 4 * ROWS;  // tokens of a tile computed together: their channels fit the L1 cache
constexpr int MIN_SLICE = 64;           // smallest number of channels in a slice

// A slice of the channels, for one thread if all come. It has a stream of weights of its own: of each block, its rows of
// gate and up, then its columns of down.
struct Slice {
  int start, end;  // channels; the last slice ends at a whole vector
  Stream weights;
};

template <class Format>
struct Block {
  int units, rank;                                      // the block's rank; the same rounded up to whole vectors
  std::vector<typename Format::template Matrix<3>> in;  // of each slice, [channels, columns]: gate and up, or up alone
  std::vector<typename Format::template Matrix<2>> out; // of each slice, [units, channels]
  Array<float> bias;                                    // [columns], or empty
};

class AnyChain {
 public:
  virtual ~AnyChain() = default;
  virtual void compute(ort::Context* context) = 0;
};

template <class Format>
class Chain : public AnyChain {
  using Io = typename Format::Io;
  using Weight = typename Format::Weight;
  static constexpr ort::Type IO_TYPE = sizeof(Io) == 4 ? ort::FLOAT : ort::FLOAT16;

 public:
  Chain(const ort::Api& api, const ort::Info* info) : Chain(api, Constants(api, info)) {}

  void compute(ort::Context* context) override {
    const ort::Value* input;
    check(api_.input(context, 0, &input));
    ort::Shape* shape;
    check(api_.shape(input, &shape));
    size_t rank;
    check(api_.rank(shape, &rank));
    std::vector<int64_t> dims(rank);
    ort::Status* failed = api_.dimensions(shape, dims.data(), rank);
    api_.release(shape);
    check(failed);
    if (!rank || dims.back() != hidden_)
      throw std::runtime_error("DLRChain: the input's hidden size is not that of the weights");
    int64_t tokens = 1;
    for (size_t i = 0; i + 1 < rank; ++i) tokens *= dims[i];
    ort::Value* output;
    check(api_.output(context, 0, dims.data(), rank, &output));
    void *from, *to;
    check(api_.data(input, &from));
    check(api_.data(output, &to));
    if (tokens > FEW_TOKENS)
      compute_many(context, static_cast<const Io*>(from), static_cast<Io*>(to), tokens);
    else if (tokens > 0)
      compute_few(context, static_cast<const Io*>(from), static_cast<Io*>(to), int(tokens));
  }

 private:
  static constexpr int PANEL = Format::template Matrix<2>::PANEL;

  Chain(const ort::Api& api, Constants constants)
      : api_(api), format_(constants), gated_(constants.number("gated")),
        activation_(activation_of(constants.text("activation"))), slice_step_(std::max(PANEL, format_.slice_step())) {
    const bool bias = constants.number("bias"), output_bias = constants.number("output_bias");
    const auto bias_of = [&](const Weight& weight) {
      if (!bias) return Array<float>();
      return numbers(constants, weight.n);
    };
    for (int64_t left = constants.number("depth"); left > 0; --left) {
      const Weight up = format_.read(constants);
      const Array<float> up_bias = bias_of(up);
      const Weight gate = gated_ ? format_.read(constants) : up;
      const Array<float> gate_bias = gated_ ? bias_of(gate) : Array<float>();
      pack(up, up_bias, gate, gate_bias, format_.read(constants));
      constants.release_all();
    }
    gain_ = numbers(constants, 1)[0];
    if (output_bias) output_bias_ = numbers(constants, hidden_);
    if (!constants.at_end()) throw std::runtime_error("DLRChain: inputs do not match the attributes");
    for (Slice& slice : slices_) slice.weights.move_into(arena_);
    threads_ = max_threads_;
  }

  void cut_into_slices() {
    const int most = hidden_ / std::max(MIN_SLICE, slice_step_), steps = (padded_hidden_ + slice_step_ - 1) / slice_step_;
    max_threads_ = std::max(1, std::min<int>(std::thread::hardware_concurrency(), most));
    slices_.resize(max_threads_);
    for (int i = 0; i < max_threads_; ++i) {
      slices_[i].start = steps * i / max_threads_ * slice_step_;
      slices_[i].end = std::min(padded_hidden_, steps * (i + 1) / max_threads_ * slice_step_);
    }
  }

  static Array<float> numbers(Constants& constants, int64_t count) {
    const Tensor tensor = constants.next(IO_TYPE);
    if (tensor.count() != count) throw std::runtime_error("DLRChain: inputs do not match the attributes");
    const Io* data = static_cast<const Io*>(tensor.data);
    return Array<float>(data, data + count);
  }

  // Add a block with up and gate [d, r], down [r, d] and biases [r].
  void pack(const Weight& up, const Array<float>& up_bias, const Weight& gate, const Array<float>& gate_bias,
            const Weight& down) {
    const int64_t d = down.n, r = up.n;
    if (blocks_.empty()) {
      hidden_ = int(d);
      padded_hidden_ = round_up_to_vector(hidden_);
      row_stride_ = padded_hidden_ + 16;
      cut_into_slices();
    }
    if (d != hidden_ || !up.fits(d) || !gate.fits(d) || gate.n != r || !down.fits(r))
      throw std::runtime_error("DLRChain: shapes of weights do not match");
    const int rank = round_up_to_vector(int(r)), columns = rank * (gated_ ? 2 : 1), up_at = gated_ ? rank : 0;
    Block<Format> block{int(r), rank, {}, {}, {}};
    for (Slice& slice : slices_) {
      auto& in = block.in.emplace_back(slice.weights, std::min(slice.end, hidden_) - slice.start, columns, format_);
      in.pack(up, slice.start, 0, int(r), up_at);
      if (gated_) in.pack(gate, slice.start, 0, int(r), 0);
      auto& out = block.out.emplace_back(slice.weights, int(r), slice.end - slice.start, format_);
      out.pack(down, 0, slice.start, slice.end, 0);
    }
    if (!up_bias.empty()) {
      block.bias.assign(columns, 0.f);
      std::copy(up_bias.begin(), up_bias.end(), &block.bias[up_at]);
      std::copy(gate_bias.begin(), gate_bias.end(), &block.bias[0]);
    }
    max_columns_ = std::max(max_columns_, columns);
    blocks_.push_back(std::move(block));
  }

  // Units [m, rank] from partial products [parts][m, columns], `stride` apart, which are summed first.
  void units(const Block<Format>& block, int m, const float* products, size_t stride, int parts, float* to) const {
    const int columns = block.rank * (gated_ ? 2 : 1);
    const auto sum = [&](int at, int column) {
      Vector value = load(products + at);
      for (int part = 1; part < parts; ++part) value += load(products + part * stride + at);
      return block.bias.empty() ? value : value + load(&block.bias[column]);
    };
    for (int row = 0; row < m; ++row)
      for (int i = 0; i < block.rank; i += LANES) {
        Vector value = activate(activation_, sum(row * columns + i, i));
        if (gated_) value *= sum(row * columns + block.rank + i, block.rank + i);
        store(to + row * block.rank + i, value);
      }
  }

  // Start the stream: x and t are the input's channels [start, end), s is zero.
  void read(const Io* from, int m, int start, int end, float* x, float* s, float* t) const {
    for (int row = 0; row < m; ++row)
      for (int i = start; i < end; ++i) {
        const size_t at = size_t(row) * row_stride_ + i;
        x[at] = t[at] = i < hidden_ ? float(from[size_t(row) * hidden_ + i]) : 0.f;
        s[at] = 0.f;
      }
  }

  // Write channels [start, end) of the output: s over the gain, plus the output bias.
  void write(Io* to, int m, int start, int end, const float* s) const {
    for (int row = 0; row < m; ++row)
      for (int i = start; i < std::min(end, hidden_); ++i) {
        const float value = s[size_t(row) * row_stride_ + i] / gain_;
        to[size_t(row) * hidden_ + i] = Io(output_bias_.empty() ? value : value + output_bias_[i]);
      }
  }

  // The thread's own buffer of `size` floats, kept between calls: new pages would cost as much as a few blocks.
  static float* scratch(size_t size) {
    thread_local Array<float> memory;
    if (memory.size() < size) memory.resize(size);
    return memory.data();
  }

  // The products of a block's gate and up with slices [first, end) of t. They are written to [m, columns] at `to`.
  void in_products(const Block<Format>& block, int m, int first, int end, const float* t, float* to) const {
    for (int i = first; i < end; ++i)
      block.in[i].multiply(m, block.in[i].prepare(m, t + slices_[i].start, row_stride_),
                           {to, block.rank * (gated_ ? 2 : 1), i > first});
  }

  // Add the product of units and down to slices [first, end) of s, and update t.
  void update(const Block<Format>& block, int m, int first, int end, const float* units, const float* x, float* s,
              float* t) const {
    const auto rows = block.out[first].prepare(m, units, block.rank);
    for (int i = first; i < end; ++i) {
      const int at = slices_[i].start;
      block.out[i].multiply(m, rows, {s + at, row_stride_, true, x + at, t + at});
    }
  }

  // Few tokens: every thread owns slices of the channels; one barrier per block.
  void compute_few(ort::Context* context, const Io* from, Io* to, int m) {
    const int wanted = threads_.load();
    // The 16 floats keep products of two threads off one cache line.
    const size_t stream_size = size_t(m) * row_stride_ + 32, product_size = size_t(m) * max_columns_ + 16;
    float *x = scratch(3 * stream_size + size_t(wanted) * 3 * product_size), *s = x + stream_size, *t = s + stream_size;
    float *products = t + stream_size, *all_units = products + 2 * wanted * product_size;
    Team team(wanted);
    auto member = [&] {
      const int number = team.join();
      if (number < 0) return;
      const int size = team.size(), slices = int(slices_.size());
      const int first = slices * number / size, last = slices * (number + 1) / size;
      const int start = slices_[first].start, end = slices_[last - 1].end;
      float* own_units = all_units + number * product_size;
      read(from, m, start, end, x, s, t);
      int barriers = 0;
      for (const Block<Format>& block : blocks_) {
        // Two sets of partial products, used in turn: a fast thread may be one block ahead of the others.
        float* partial = products + (barriers & 1) * wanted * product_size;
        in_products(block, m, first, last, t, partial + number * product_size);
        ++barriers;
        if (size > 1) team.barrier(barriers);
        units(block, m, partial, product_size, size, own_units);
        update(block, m, first, last, own_units, x, s, t);
      }
      write(to, m, start, end, s);
    };
    if (wanted == 1) {
      member();
    } else {
      using Member = decltype(member);
      check(api_.parallel_for(
          context, [](void* data, size_t) { (*static_cast<Member*>(data))(); }, wanted, &member));
    }
    adjust_threads(wanted, team.size());
  }

  // A session may have fewer threads than the machine. Ask only for as many as join; every 32 calls ask for all
  // again, since the missing ones may have been asleep.
  void adjust_threads(int wanted, int joined) {
    if (joined < wanted && (wanted < max_threads_ || ++short_calls_ >= 4))
      threads_ = joined;
    else if (joined == max_threads_)
      short_calls_ = 0;
    else if (++calls_ % 32 == 0)
      threads_ = max_threads_;
  }

  // Many tokens: every thread takes a tile of tokens through all blocks; no barriers.
  void compute_many(ort::Context* context, const Io* from, Io* to, int64_t tokens) {
    const int64_t tiles = (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    const int64_t parts = std::max<int64_t>(tiles, std::min<int64_t>(max_threads_, tokens / FEW_TOKENS));
    auto part = [&](int64_t index) {
      const int64_t first = tokens * index / parts, m = tokens * (index + 1) / parts - first;
      const size_t stream_size = size_t(m) * row_stride_ + 32;
      float *x = scratch(3 * stream_size + 2 * size_t(GROUP_TOKENS) * max_columns_), *s = x + stream_size;
      float *t = s + stream_size, *products = t + stream_size, *own_units = products + GROUP_TOKENS * max_columns_;
      read(from + first * hidden_, int(m), 0, padded_hidden_, x, s, t);
      const int slices = int(slices_.size());
      for (const Block<Format>& block : blocks_)
        for (int64_t row = 0; row < m; row += GROUP_TOKENS) {
          const int count = int(std::min<int64_t>(GROUP_TOKENS, m - row));
          const size_t at = size_t(row) * row_stride_;
          in_products(block, count, 0, slices, t + at, products);
          units(block, count, products, 0, 1, own_units);
          update(block, count, 0, slices, own_units, x + at, s + at, t + at);
        }
      write(to + first * hidden_, int(m), 0, padded_hidden_, s);
    };
    using Part = decltype(part);
    check(api_.parallel_for(
        context, [](void* data, size_t index) { (*static_cast<Part*>(data))(int64_t(index)); }, size_t(parts),
        &part));
  }

  const ort::Api& api_;
  const Format format_;
  const bool gated_;
  const Activation activation_;
  const int slice_step_;                // a thread's slice starts at a multiple of this many channels
  int hidden_ = 0, padded_hidden_ = 0;  // channels, and the same rounded up to whole vectors
  int max_columns_ = 0;                 // of gate and up together, in any block
  int row_stride_ = 0;  // between rows of x, s and t; at a power of two, rows would compete for the same cache lines
  float gain_ = 1.f;
  Arena arena_;
  std::vector<Slice> slices_;
  std::vector<Block<Format>> blocks_;
  Array<float> output_bias_;
  int max_threads_ = 1;
  std::atomic<int> threads_{1};      // threads to ask for
  std::atomic<int> short_calls_{0};  // calls that asked for all threads and got fewer
  std::atomic<int> calls_{0};        // calls with fewer than all threads
};

}  // namespace
