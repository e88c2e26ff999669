// A whole chain: its weights, and what happens in a call. dlr_chain.cpp says how.
//
// What kind of numbers the weights are is the format's matter: `Plain` (plain.h) or `NBits` (nbits.h).
#pragma once
#include <atomic>
#include <thread>

#include "nbits.h"
#include "plain.h"
#include "team.h"

namespace {

constexpr int FEW_TOKENS = 8;    // at most this many are computed by all threads together
constexpr int TILE = 256;        // tokens that one thread takes through the chain
constexpr int GROUP = 4 * ROWS;  // of these, tokens whose channels stay in the first-level cache
constexpr int SLICE = 64;        // channels that a thread owns, at least

template <class Format>
struct Block {
  int units, rank;                            // without and with filling up to whole vectors
  typename Format::template Matrix<3> in;     // [d, columns]: gate and up, or up alone
  typename Format::template Matrix<2> out;    // [units, d]
  Array<float> bias;                          // [columns], or empty
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
    if (!rank || dims.back() != hidden_) throw std::runtime_error("DLRChain: the input has another hidden size");
    int64_t tokens = 1;
    for (size_t i = 0; i + 1 < rank; ++i) tokens *= dims[i];
    ort::Value* output;
    check(api_.output(context, 0, dims.data(), rank, &output));
    void *from, *to;
    check(api_.data(input, &from));
    check(api_.data(output, &to));
    if (tokens > FEW_TOKENS)
      many(context, static_cast<const Io*>(from), static_cast<Io*>(to), tokens);
    else if (tokens > 0)
      few(context, static_cast<const Io*>(from), static_cast<Io*>(to), int(tokens));
  }

 private:
  static constexpr int PANEL = Format::template Matrix<2>::PANEL;

  Chain(const ort::Api& api, Constants constants)
      : api_(api), format_(constants), gated_(constants.number("gated")),
        activation_(activation_of(constants.text("activation"))), unit_(std::max(PANEL, format_.unit())) {
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
      constants.let_go_of_all();
    }
    gain_ = numbers(constants, 1)[0];
    if (output_bias) output_bias_ = numbers(constants, hidden_);
    if (!constants.at_end()) throw std::runtime_error("DLRChain: inputs and attributes do not go together");
    most_threads_ = std::max(1, std::min<int>(std::thread::hardware_concurrency(), hidden_ / std::max(SLICE, unit_)));
    threads_ = most_threads_;
  }

  static Array<float> numbers(Constants& constants, int64_t count) {
    const Tensor tensor = constants.next(IO_TYPE);
    if (tensor.count() != count) throw std::runtime_error("DLRChain: inputs and attributes do not go together");
    const Io* data = static_cast<const Io*>(tensor.data);
    return Array<float>(data, data + count);
  }

  // up and gate [d, r], down [r, d], biases [r].
  void pack(const Weight& up, const Array<float>& up_bias, const Weight& gate, const Array<float>& gate_bias,
            const Weight& down) {
    const int64_t d = down.n, r = up.n;
    if (blocks_.empty()) hidden_ = int(d), width_ = whole(hidden_), pitch_ = width_ + 16;
    if (d != hidden_ || !up.fits(d) || !gate.fits(d) || gate.n != r || !down.fits(r))
      throw std::runtime_error("DLRChain: shapes of weights do not go together");
    const int rank = whole(int(r)), columns = rank * (gated_ ? 2 : 1), up_at = gated_ ? rank : 0;
    Block<Format> block{int(r), rank, {arena_, hidden_, columns, format_}, {arena_, int(r), width_, format_}, {}};
    block.in.put(up, up_at);
    if (gated_) block.in.put(gate, 0);
    block.out.put(down, 0);
    if (!up_bias.empty()) {
      block.bias.assign(columns, 0.f);
      std::copy(up_bias.begin(), up_bias.end(), &block.bias[up_at]);
      std::copy(gate_bias.begin(), gate_bias.end(), &block.bias[0]);
    }
    widest_ = std::max(widest_, columns);
    blocks_.push_back(std::move(block));
  }

  // Units [m, rank] from the sums of `parts` products [parts][m, columns], `stride` apart.
  void units(const Block<Format>& block, int m, const float* sums, size_t stride, int parts, float* to) const {
    const int columns = block.rank * (gated_ ? 2 : 1);
    const auto sum = [&](int at, int column) {
      Vector value = load(sums + at);
      for (int part = 1; part < parts; ++part) value += load(sums + part * stride + at);
      return block.bias.empty() ? value : value + load(&block.bias[column]);
    };
    for (int row = 0; row < m; ++row)
      for (int i = 0; i < block.rank; i += LANES) {
        Vector value = activate(activation_, sum(row * columns + i, i));
        if (gated_) value *= sum(row * columns + block.rank + i, block.rank + i);
        store(to + row * block.rank + i, value);
      }
  }

  void read(const Io* from, int m, int start, int end, float* x, float* s, float* t) const {
    for (int row = 0; row < m; ++row)
      for (int i = start; i < end; ++i) {
        const size_t at = size_t(row) * pitch_ + i;
        x[at] = t[at] = i < hidden_ ? float(from[size_t(row) * hidden_ + i]) : 0.f;
        s[at] = 0.f;
      }
  }

  void write(Io* to, int m, int start, int end, const float* s) const {
    for (int row = 0; row < m; ++row)
      for (int i = start; i < std::min(end, hidden_); ++i) {
        const float value = s[size_t(row) * pitch_ + i] / gain_;
        to[size_t(row) * hidden_ + i] = Io(output_bias_.empty() ? value : value + output_bias_[i]);
      }
  }

  // A thread's own memory, kept between calls: fresh pages would cost as much as some blocks.
  static float* scratch(size_t size) {
    thread_local Array<float> memory;
    if (memory.size() < size) memory.resize(size);
    return memory.data();
  }

  void few(ort::Context* context, const Io* from, Io* to, int m) {
    const int wanted = threads_.load();
    const size_t state = size_t(m) * pitch_ + 32, sums = size_t(m) * widest_ + 16;  // 16: no shared cache lines
    float *x = scratch(3 * state + size_t(wanted) * 3 * sums), *s = x + state, *t = s + state;
    float *products = t + state, *all_units = products + 2 * wanted * sums;
    Team team(wanted);
    auto member = [&] {
      const int me = team.join();
      if (me < 0) return;
      const int size = team.size(), parts = (width_ + unit_ - 1) / unit_;
      const int start = parts * me / size * unit_, end = std::min(width_, parts * (me + 1) / size * unit_);
      const int mine = std::min(end, hidden_);
      float* units_of_mine = all_units + me * sums;
      read(from, m, start, end, x, s, t);
      int round = 0;
      for (const Block<Format>& block : blocks_) {
        const int columns = block.rank * (gated_ ? 2 : 1);
        float* these = products + (round & 1) * wanted * sums;  // two sets: a fast thread may be a block ahead
        block.in.multiply(m, start, mine, 0, columns, block.in.rows(m, start, mine, t, pitch_), these + me * sums,
                          columns);
        ++round;
        if (size > 1) team.meet(round);
        units(block, m, these, sums, size, units_of_mine);
        block.out.multiply(m, 0, block.units, start, end, block.out.rows(m, 0, block.units, units_of_mine, block.rank),
                           s + start, pitch_, x + start, t + start);
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
    recount(wanted, team.size());
  }

  // In a session with fewer threads than the machine has, ask only for those that come, and now and
  // then for all: they may have been asleep.
  void recount(int wanted, int came) {
    if (came < wanted && (wanted < most_threads_ || ++missing_ >= 4))
      threads_ = came;
    else if (came == most_threads_)
      missing_ = 0;
    else if (++calls_ % 32 == 0)
      threads_ = most_threads_;
  }

  void many(ort::Context* context, const Io* from, Io* to, int64_t tokens) {
    const int64_t tiles = (tokens + TILE - 1) / TILE;
    const int64_t parts = std::max<int64_t>(tiles, std::min<int64_t>(most_threads_, tokens / FEW_TOKENS));
    auto part = [&](int64_t index) {
      const int64_t first = tokens * index / parts, m = tokens * (index + 1) / parts - first;
      const size_t state = size_t(m) * pitch_ + 32;
      float *x = scratch(3 * state + 2 * size_t(GROUP) * widest_), *s = x + state, *t = s + state;
      float *sums = t + state, *these_units = sums + GROUP * widest_;
      read(from + first * hidden_, int(m), 0, width_, x, s, t);
      for (const Block<Format>& block : blocks_) {
        const int columns = block.rank * (gated_ ? 2 : 1);
        for (int64_t row = 0; row < m; row += GROUP) {
          const int rows_now = int(std::min<int64_t>(GROUP, m - row));
          const size_t at = size_t(row) * pitch_;
          block.in.multiply(rows_now, 0, hidden_, 0, columns, block.in.rows(rows_now, 0, hidden_, t + at, pitch_), sums,
                            columns);
          units(block, rows_now, sums, 0, 1, these_units);
          const auto rows = block.out.rows(rows_now, 0, block.units, these_units, block.rank);
          block.out.multiply(rows_now, 0, block.units, 0, width_, rows, s + at, pitch_, x + at, t + at);
        }
      }
      write(to + first * hidden_, int(m), 0, width_, s);
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
  const int unit_;                           // threads own a multiple of so many channels
  int hidden_ = 0, width_ = 0, widest_ = 0;  // channels; in whole vectors; columns of the widest block
  int pitch_ = 0;  // from row to row: rows a power of two apart would compete for the same cache lines
  float gain_ = 1.f;
  Arena arena_;
  std::vector<Block<Format>> blocks_;
  Array<float> output_bias_;
  int most_threads_ = 1;
  std::atomic<int> threads_{1}, missing_{0}, calls_{0};
};

}  // namespace
