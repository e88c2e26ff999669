// onnxruntime operator `lockkit::DLRChain` for the CPU: a whole chain of a locked model in one call.
//
// An export names each chain as a function `lockkit.DLRChain`, whose body is ordinary operators. With this
// library registered, onnxruntime calls it instead. For M tokens x [M, d]:
//
// 1. When the session is made, weights are packed: gate and up of a block side by side, [d, 2r], r
//    rounded up to whole vectors; down [r, d] (already times the gain, as in the graph). fp16 stays fp16.
// 2. A few tokens (decode): every thread owns a slice of the d channels. It multiplies its slice of
//    t = x + s by its rows of gate and up, the threads meet once and add up these 2r sums, each
//    computes all units, and updates its own slice of s. So a block costs one meeting of the threads.
// 3. Many tokens (prefill): every thread takes a tile of tokens through all blocks, without meetings.
// 4. The output is s over the gain, plus the output bias.
//
// Threads are onnxruntime's own. It does not promise to run two tasks at once, so those that have
// arrived form the team and the late ones do nothing (`Team`): nobody waits for a thread that never comes.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "onnxruntime_abi.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;  // floats in a vector; tokens in a tile of registers
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4;
#else
constexpr int LANES = 4, ROWS = 4;
#endif
constexpr int FEW_TOKENS = 8;    // at most this many are computed by all threads together
constexpr int TILE = 256;        // tokens that one thread takes through the chain
constexpr int GROUP = 4 * ROWS;   // of these, tokens whose channels stay in the first-level cache
constexpr int SLICE = 64;        // channels that a thread owns, at least
constexpr auto PATIENCE = std::chrono::microseconds(50);

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float AnyVector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef _Float16 Half;
typedef Half HalfVector __attribute__((vector_size(2 * LANES), aligned(2)));

inline Vector load(const float* at) { return *reinterpret_cast<const AnyVector*>(at); }
inline Vector load(const Half* at) {
#if defined(__AVX512F__)  // compilers turn the general form into 16 conversions
  return reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
#elif defined(__AVX__) && defined(__F16C__)
  return reinterpret_cast<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#else
  return __builtin_convertvector(*reinterpret_cast<const HalfVector*>(at), Vector);
#endif
}
inline void store(float* at, Vector value) { *reinterpret_cast<AnyVector*>(at) = value; }
inline int whole(int n) { return (n + LANES - 1) / LANES * LANES; }

// Memory that starts at a cache line: a vector that crosses two costs twice.
template <class T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* at, size_t) { ::operator delete(at, std::align_val_t{64}); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
template <class T>
using Array = std::vector<T, Aligned<T>>;

// Memory for weights, in large pages where the system has them: reading all of it for every token,
// the processor would else spend much of its time looking up pages.
class Arena {
 public:
  ~Arena() {
    for (char* chunk : chunks_) ::operator delete(chunk, std::align_val_t{PAGE});
  }
  // `bytes` of zeros, at a cache line.
  void* take(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > left_) {
      left_ = std::max(CHUNK, (bytes + PAGE - 1) / PAGE * PAGE);
      free_ = static_cast<char*>(::operator new(left_, std::align_val_t{PAGE}));
      chunks_.push_back(free_);
#if defined(__linux__)
      madvise(free_, left_, MADV_HUGEPAGE);
#endif
    }
    char* taken = free_;
    free_ += bytes, left_ -= bytes;
    std::memset(taken, 0, bytes);
    return taken;
  }

 private:
  static constexpr size_t PAGE = size_t{2} << 20, CHUNK = 4 * PAGE;
  std::vector<char*> chunks_;
  char* free_ = nullptr;
  size_t left_ = 0;
};

// ---- activations ----

// exp(x) by 2^n * 2^f with a polynomial for f; about 2 ulp. Arguments beyond +-87 are clamped.
inline Vector exponential(Vector x) {
  x = x < -87.f ? Vector{} - 87.f : x;
  x = x > 87.f ? Vector{} + 87.f : x;
  constexpr float magic = 12582912.f;  // adding it rounds to a whole number
  const Vector n = (x * 1.44269504f + magic) - magic;
  const Vector f = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.f;
  const Integers bits = (__builtin_convertvector(n, Integers) + 127) << 23;
  Vector power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}
inline Vector silu(Vector x) { return x / (1.f + exponential(-x)); }

enum class Activation { silu, gelu, gelu_tanh, relu, relu_squared };

Activation activation_of(const std::string& name) {
  if (name == "silu" || name == "swish") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_new" || name == "gelu_fast" || name == "gelu_pytorch_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "relu2") return Activation::relu_squared;
  throw std::runtime_error("DLRChain: no activation " + name);
}

inline Vector activate(Activation which, Vector x) {
  switch (which) {
    case Activation::silu: return silu(x);
    case Activation::gelu_tanh: {  // x * sigmoid(2 u), which is x * (1 + tanh(u)) / 2
      const Vector twice_u = 1.5957691216f * (x + 0.044715f * x * x * x);
      return x / (1.f + exponential(-twice_u));
    }
    case Activation::gelu: {
      Vector y;
      for (int lane = 0; lane < LANES; ++lane) y[lane] = 0.5f * x[lane] * (1.f + std::erf(x[lane] * 0.70710678f));
      return y;
    }
    default: {
      const Vector y = x > 0.f ? x : Vector{};
      return which == Activation::relu ? y : y * y;
    }
  }
}

// ---- products ----

// C [R, W * LANES] = A [R, K] B [K, W * LANES], held in registers; row-major, with strides.
// With `x`, C is the stream: the product is added to it, and x + C goes to `t`.
template <int R, int W, class T>
inline void tile(const float* a, int lda, const T* b, int ldb, float* c, int ldc, int k, const float* x, float* t) {
  Vector sum[R][W] = {};
  for (int i = 0; i < k; ++i, b += ldb) {
    Vector row[W];
    for (int w = 0; w < W; ++w) row[w] = load(b + w * LANES);
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < W; ++w) sum[r][w] += a[r * lda + i] * row[w];
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) {
      const int at = r * ldc + w * LANES;
      if (!x) {
        store(c + at, sum[r][w]);
        continue;
      }
      const Vector s = load(c + at) + sum[r][w];
      store(c + at, s);
      store(t + at, load(x + at) + s);
    }
}

// A matrix [k, n] cut into panels of W vectors' columns, [n / panel][k][panel], so that a product reads
// it in one direction. n is in whole vectors; the last panel may be narrower.
template <class T, int W>
class Matrix {
 public:
  static constexpr int PANEL = W * LANES;
  Matrix(Arena& arena, int k, int n) : k_(k), n_(n), data_(static_cast<T*>(arena.take(sizeof(T) * k * n))) {}

  T& at(int row, int column) {
    const int from = column / PANEL * PANEL;
    return data_[size_t(from) * k_ + size_t(row) * std::min(PANEL, n_ - from) + column - from];
  }

  // C [m, to - from] = A [m, k_to - k_from] times rows and columns of this matrix, or the update of the
  // stream, see `tile`; `from` starts a panel.
  void multiply(int m, int k_from, int k_to, int from, int to, const float* a, int lda, float* c, int ldc,
                const float* x = nullptr, float* t = nullptr) const {
    int row = 0;
    const auto rows = [&](auto count) {
      constexpr int R = decltype(count)::value;
      for (; row + R <= m; row += R)
        for (int column = from; column < to; column += PANEL) {
          const int width = std::min(PANEL, n_ - column), at = row * ldc + column - from;
          const T* b = &data_[size_t(column) * k_ + size_t(k_from) * width];
          const auto run = [&](auto vectors) {
            tile<R, decltype(vectors)::value>(a + row * lda, lda, b, width, c + at, ldc, k_to - k_from,
                                              x ? x + at : x, x ? t + at : t);
          };
          if (width == PANEL) run(std::integral_constant<int, W>{});
          else if (width == LANES) run(std::integral_constant<int, 1>{});
          else run(std::integral_constant<int, 2>{});
        }
    };
    rows(std::integral_constant<int, ROWS>{});
    if constexpr (ROWS > 4) rows(std::integral_constant<int, 4>{});
    rows(std::integral_constant<int, 2>{});
    rows(std::integral_constant<int, 1>{});
  }

 private:
  int k_, n_;
  T* data_;
};

// ---- threads ----

// The threads that have arrived in time; after `join` its size is fixed.
class Team {
 public:
  explicit Team(int wanted) : wanted_(wanted) {}

  // The caller's number in the team, or -1 for one who came too late.
  int join() {
    int state = state_.load();
    do {
      if (state & CLOSED) return -1;
    } while (!state_.compare_exchange_weak(state, state + 1));
    const int me = state;
    if (me == 0) {
      const auto deadline = std::chrono::steady_clock::now() + PATIENCE;
      while (state_.load() < wanted_ && std::chrono::steady_clock::now() < deadline) pause();
      state_.fetch_or(CLOSED);
    }
    while (!(state_.load() & CLOSED)) pause();
    return me;
  }
  int size() const { return state_.load() & ~CLOSED; }

  // Return once all have called it as often as the caller has, `round` times.
  void meet(int round) {
    met_.fetch_add(1, std::memory_order_acq_rel);
    while (met_.load(std::memory_order_acquire) < round * size()) pause();
  }

 private:
  static constexpr int CLOSED = 1 << 30;
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  const int wanted_;
  alignas(64) std::atomic<int> state_{0};
  alignas(64) std::atomic<int> met_{0};
};

// ---- the chain ----

struct Failure {
  ort::Status* status;
};
inline void check(ort::Status* status) {
  if (status) throw Failure{status};
}

template <class T>
struct Block {
  int rank;           // in whole vectors
  Matrix<T, 3> in;    // [d, columns]: gate and up, or up alone
  Matrix<T, 2> out;   // [rank, d]
  Array<float> bias;  // [columns], or empty
};

template <class T>
class Chain {
 public:
  Chain(const ort::Api& api, const ort::Info* info) : api_(api) {
    const bool bias = number(info, "bias"), output_bias = number(info, "output_bias");
    gated_ = number(info, "gated");
    char name[64] = {};
    size_t size = sizeof(name);
    check(api.attribute(info, "activation", name, &size));
    activation_ = activation_of(name);
    size_t input = 1, inputs = 0;
    check(api.input_count(info, &inputs));
    for (int64_t left = number(info, "depth"); left > 0; --left) {
      const Constant up = constant(info, input++), up_bias = bias ? constant(info, input++) : Constant{};
      const Constant gate = gated_ ? constant(info, input++) : Constant{};
      const Constant gate_bias = gated_ && bias ? constant(info, input++) : Constant{};
      pack(up, up_bias, gate, gate_bias, constant(info, input++));
    }
    gain_ = float(constant(info, input++).data[0]);
    if (output_bias) {
      const Constant values = constant(info, input++);
      output_bias_.assign(values.data, values.data + hidden_);
    }
    if (input != inputs) throw std::runtime_error("DLRChain: inputs and attributes do not go together");
    most_threads_ = std::max(1, std::min<int>(std::thread::hardware_concurrency(), hidden_ / SLICE));
    threads_ = most_threads_;
  }

  void compute(ort::Context* context) {
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
      many(context, static_cast<const T*>(from), static_cast<T*>(to), tokens);
    else if (tokens > 0)
      few(context, static_cast<const T*>(from), static_cast<T*>(to), int(tokens));
  }

 private:
  static constexpr int PANEL = Matrix<T, 2>::PANEL;  // channels, as the threads share them out

  struct Constant {
    const T* data = nullptr;
    std::vector<int64_t> dims;
  };

  int64_t number(const ort::Info* info, const char* name) const {
    int64_t value;
    check(api_.attribute(info, name, &value));
    return value;
  }

  Constant constant(const ort::Info* info, size_t index) const {
    int is_constant = 0;
    const ort::Value* value;
    check(api_.constant(info, index, &is_constant, &value));
    if (!is_constant) throw std::runtime_error("DLRChain: weights must be constants");
    ort::Shape* shape;
    check(api_.shape(value, &shape));
    size_t rank = 0;
    ort::Status* failed = api_.rank(shape, &rank);
    Constant found{nullptr, std::vector<int64_t>(rank)};
    if (!failed) failed = api_.dimensions(shape, found.dims.data(), rank);
    api_.release(shape);
    check(failed);
    void* data;
    check(api_.data(value, &data));
    found.data = static_cast<const T*>(data);
    return found;
  }

  // up and gate [d, r], down [r, d], biases [r].
  void pack(const Constant& up, const Constant& up_bias, const Constant& gate, const Constant& gate_bias,
            const Constant& down) {
    const int64_t d = up.dims.at(0), r = up.dims.at(1);
    if (blocks_.empty()) hidden_ = int(d), width_ = whole(hidden_), pitch_ = width_ + 16;
    if (d != hidden_ || down.dims != std::vector<int64_t>{r, d} || (gated_ && gate.dims != up.dims))
      throw std::runtime_error("DLRChain: shapes of weights do not go together");
    const int rank = whole(int(r)), columns = rank * (gated_ ? 2 : 1), up_at = gated_ ? rank : 0;
    Block<T> block{rank, {arena_, hidden_, columns}, {arena_, rank, width_}, {}};
    for (int row = 0; row < d; ++row)
      for (int i = 0; i < r; ++i) {
        block.in.at(row, up_at + i) = up.data[row * r + i];
        if (gated_) block.in.at(row, i) = gate.data[row * r + i];
        block.out.at(i, row) = down.data[i * d + row];
      }
    if (up_bias.data) {
      block.bias.assign(columns, 0.f);
      std::copy_n(up_bias.data, r, &block.bias[up_at]);
      if (gated_) std::copy_n(gate_bias.data, r, &block.bias[0]);
    }
    widest_ = std::max(widest_, columns);
    blocks_.push_back(std::move(block));
  }

  // Units [m, rank] from the sums of `parts` products [parts][m, columns], `stride` apart.
  void units(const Block<T>& block, int m, const float* sums, size_t stride, int parts, float* to) const {
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

  void read(const T* from, int m, int start, int end, float* x, float* s, float* t) const {
    for (int row = 0; row < m; ++row)
      for (int i = start; i < end; ++i) {
        const size_t at = size_t(row) * pitch_ + i;
        x[at] = t[at] = i < hidden_ ? float(from[size_t(row) * hidden_ + i]) : 0.f;
        s[at] = 0.f;
      }
  }

  void write(T* to, int m, int start, int end, const float* s) const {
    for (int row = 0; row < m; ++row)
      for (int i = start; i < std::min(end, hidden_); ++i) {
        const float value = s[size_t(row) * pitch_ + i] / gain_;
        to[size_t(row) * hidden_ + i] = T(output_bias_.empty() ? value : value + output_bias_[i]);
      }
  }

  // A thread's own memory, kept between calls: fresh pages would cost as much as some blocks.
  static float* scratch(size_t size) {
    thread_local Array<float> memory;
    if (memory.size() < size) memory.resize(size);
    return memory.data();
  }

  void few(ort::Context* context, const T* from, T* to, int m) {
    const int wanted = threads_.load();
    const size_t state = size_t(m) * pitch_ + 32, sums = size_t(m) * widest_ + 16;  // 16: no shared cache lines
    float *x = scratch(3 * state + size_t(wanted) * 3 * sums), *s = x + state, *t = s + state;
    float *products = t + state, *all_units = products + 2 * wanted * sums;
    Team team(wanted);
    auto member = [&] {
      const int me = team.join();
      if (me < 0) return;
      const int size = team.size(), panels = (width_ + PANEL - 1) / PANEL;
      const int start = panels * me / size * PANEL, end = std::min(width_, panels * (me + 1) / size * PANEL);
      float* units_of_mine = all_units + me * sums;
      read(from, m, start, end, x, s, t);
      int round = 0;
      for (const Block<T>& block : blocks_) {
        const int columns = block.rank * (gated_ ? 2 : 1);
        float* these = products + (round & 1) * wanted * sums;  // two sets: a fast thread may be a block ahead
        block.in.multiply(m, start, std::min(end, hidden_), 0, columns, t + start, pitch_, these + me * sums, columns);
        ++round;
        if (size > 1) team.meet(round);
        units(block, m, these, sums, size, units_of_mine);
        block.out.multiply(m, 0, block.rank, start, end, units_of_mine, block.rank, s + start, pitch_, x + start,
                           t + start);
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

  void many(ort::Context* context, const T* from, T* to, int64_t tokens) {
    const int64_t tiles = (tokens + TILE - 1) / TILE;
    const int64_t parts = std::max<int64_t>(tiles, std::min<int64_t>(most_threads_, tokens / FEW_TOKENS));
    auto part = [&](int64_t index) {
      const int64_t first = tokens * index / parts, m = tokens * (index + 1) / parts - first;
      const size_t state = size_t(m) * pitch_ + 32;
      float *x = scratch(3 * state + 2 * size_t(GROUP) * widest_), *s = x + state, *t = s + state;
      float *sums = t + state, *these_units = sums + GROUP * widest_;
      read(from + first * hidden_, int(m), 0, width_, x, s, t);
      for (const Block<T>& block : blocks_) {
        const int columns = block.rank * (gated_ ? 2 : 1);
        for (int64_t row = 0; row < m; row += GROUP) {
          const int rows_now = int(std::min<int64_t>(GROUP, m - row));
          const size_t at = size_t(row) * pitch_;
          block.in.multiply(rows_now, 0, hidden_, 0, columns, t + at, pitch_, sums, columns);
          units(block, rows_now, sums, 0, 1, these_units);
          block.out.multiply(rows_now, 0, block.rank, 0, width_, these_units, block.rank, s + at, pitch_, x + at,
                             t + at);
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
  bool gated_ = false;
  Activation activation_ = Activation::silu;
  int hidden_ = 0, width_ = 0, widest_ = 0;  // channels; in whole vectors; columns of the widest block
  int pitch_ = 0;  // from row to row: rows a power of two apart would compete for the same cache lines
  float gain_ = 1.f;
  Arena arena_;
  std::vector<Block<T>> blocks_;
  std::vector<float> output_bias_;
  int most_threads_ = 1;
  std::atomic<int> threads_{1}, missing_{0}, calls_{0};
};

// ---- registration ----

template <class F>
ort::Status* guarded(const ort::Api& api, F body) {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return api.error(error.what());
  }
}

const ort::Api* api_in_use = nullptr;

template <class T>
struct ChainOp : ort::Op {
  ChainOp() : ort::Op{} {
    static constexpr int type = sizeof(T) == 4 ? ort::FLOAT : ort::FLOAT16;
    release = ort::FIRST_RELEASE;
    name = [](const Op*) { return "DLRChain"; };
    provider = [](const Op*) { return "CPUExecutionProvider"; };
    input_count = [](const Op*) -> size_t { return 2; };  // x, and all weights
    input_type = [](const Op*, size_t) { return int(type); };
    output_count = [](const Op*) -> size_t { return 1; };
    output_type = [](const Op*, size_t) { return int(type); };
    input_arity = [](const Op*, size_t index) { return int(index ? ort::VARIADIC : ort::REQUIRED); };
    output_arity = [](const Op*, size_t) { return int(ort::REQUIRED); };
    input_memory = [](const Op*, size_t) { return 0; };
    variadic_minimum = [](const Op*) { return 2; };
    variadic_same_type = [](const Op*) { return 1; };
    variadic_output_minimum = [](const Op*) { return 1; };
    variadic_output_same_type = [](const Op*) { return 1; };
    first_version = [](const Op*) { return 1; };
    last_version = [](const Op*) { return 1; };
    create_checked = [](const Op*, const ort::Api* api, const ort::Info* info, void** out) {
      return guarded(*api, [&] { *out = new Chain<T>(*api, info); });
    };
    compute_checked = [](void* chain, ort::Context* context) {
      return guarded(*api_in_use, [&] { static_cast<Chain<T>*>(chain)->compute(context); });
    };
    destroy = [](void* chain) { delete static_cast<Chain<T>*>(chain); };
  }
};

}  // namespace

extern "C" ort::Status* RegisterCustomOps(ort::Options* options, const ort::ApiBase* base) {
  static const ChainOp<float> single;
  static const ChainOp<Half> half;
  const ort::Api* api = base->get_api(ort::FIRST_RELEASE);
  if (!api) return base->get_api(1)->error("DLRChain: onnxruntime is older than 1.17");
  api_in_use = api;
  return guarded(*api, [&] {
    ort::Domain* domain;
    check(api->create_domain("lockkit", &domain));  // lives as long as the process, like the operators
    check(api->add_op(domain, &single));
    check(api->add_op(domain, &half));
    check(api->add_domain(options, domain));
  });
}
