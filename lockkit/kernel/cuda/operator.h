// The operators `lockkit::DLRChain`, in fp16 and bf16, and `DLRChainNBitsFloat`, with weights of 8 or 4 bits and
// everything else in fp16, for onnxruntime's CUDA provider.
//
// 1. When the session is created, the weights are packed (pack.h) and copied to the GPU. They are inputs in the CPU's
//    memory: onnxruntime keeps no copy of its own on the GPU.
// 2. A call chooses a plan for its number of tokens (plan.h) and launches the kernel on onnxruntime's stream, once, or
//    several times for more tokens than the GPU takes at once. Where that is faster, for many tokens, it launches other
//    kernels: one, and then two for each DLR block (prompt.h). The host waits for nothing, so a CUDA graph can hold it.
#pragma once
#include "../constants.h"
#include "launch.h"

namespace {
namespace cuda {

using lockkit_cuda::Matrix;
using lockkit_cuda::QuantisedMatrix;

inline float from_half(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return float(value);
}
inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline lockkit_cuda::Activation activation_of(const std::string& name) {
  using lockkit_cuda::Activation;
  if (name == "silu" || name == "swish") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_new" || name == "gelu_fast" || name == "gelu_pytorch_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "relu2") return Activation::relu_squared;
  throw std::runtime_error("DLRChain: unknown activation " + name);
}

// Memory of the device, freed with this object.
class Buffer {
 public:
  // A copy of `bytes` at `from`; only the memory, if that is null.
  Buffer(Device& device, const void* from, size_t bytes)
      : device_(device), address_(!bytes ? 0 : from ? device.upload(from, bytes) : device.allocate(bytes)) {}
  ~Buffer() {
    if (address_) device_.free(address_);
  }
  Buffer(const Buffer&) = delete;
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(address_);
  }

 private:
  Device& device_;
  const Address address_;
};

// The next weight among an operator's inputs, [k, n].
inline void read(Constants& constants, ort::Type type, Matrix& matrix) {
  const Tensor tensor = constants.next(type);
  if (tensor.dims.size() != 2) throw std::runtime_error("DLRChain: a weight is not a matrix");
  matrix.data = static_cast<const uint16_t*>(tensor.data), matrix.k = tensor.dims[0], matrix.n = tensor.dims[1];
}
inline void read(Constants& constants, ort::Type type, QuantisedMatrix& matrix) {
  const int64_t bits = constants.number("bits"), block_size = constants.number("block_size");
  if (bits != 8 && bits != 4) throw std::runtime_error("DLRChain: weights must have 4 or 8 bits");
  if (block_size < 16 || block_size > 256 || block_size & (block_size - 1))
    throw std::runtime_error("DLRChain: the block size must be a power of two from 16 to 256");
  const Tensor q = constants.next(ort::UINT8), scales = constants.next(type);
  if (q.dims.size() != 3 || q.dims[2] * 8 != block_size * bits || scales.count() != q.dims[0] * q.dims[1])
    throw std::runtime_error("DLRChain: the shapes of a quantised weight and its scales do not match");
  matrix.data = static_cast<const uint8_t*>(q.data), matrix.scales = static_cast<const uint16_t*>(scales.data);
  matrix.n = q.dims[0], matrix.blocks = q.dims[1], matrix.block_size = int(block_size), matrix.bits = int(bits);
}

// A chain on the GPU. `TYPE` is FLOAT16 or BFLOAT16; `M` is the form of its weights, Matrix or QuantisedMatrix.
template <ort::Type TYPE, class M>
class Chain {
  using BlockWeights = lockkit_cuda::BlockWeights<M>;

 public:
  static constexpr bool MIXED_INPUTS = std::is_same<M, QuantisedMatrix>::value;
  static constexpr const char* NAME = MIXED_INPUTS ? "DLRChainNBitsFloat" : "DLRChain";
  static constexpr ort::Type IO_TYPE = TYPE;

  Chain(const ort::Api& api, const ort::Info* info)
      : api_(api), device_(Device::current()), activation_(activation_of(Constants(api, info).text("activation"))) {
    Constants constants(api, info);
    const bool gated = constants.number("gated"), bias = constants.number("bias");
    const bool output_bias = constants.number("output_bias");
    std::vector<BlockWeights> blocks;
    for (int64_t left = constants.number("depth"); left > 0; --left) {
      BlockWeights block{};
      read(constants, TYPE, block.up);
      if (bias) block.up_bias = vector(constants, block.up.n);
      if (gated) read(constants, TYPE, block.gate);
      if (gated && bias) block.gate_bias = vector(constants, block.up.n);
      read(constants, TYPE, block.down);
      blocks.push_back(block);
    }
    shape_ = lockkit_cuda::shape_of(blocks);
    inverse_gain_ = 1 / number(*vector(constants, 1));
    std::vector<float> last;
    if (output_bias) {
      const uint16_t* values = vector(constants, shape_.hidden);
      for (int i = 0; i < shape_.hidden; ++i) last.push_back(number(values[i]));
    }
    if (!constants.at_end()) throw std::runtime_error("DLRChain: inputs do not match the attributes");
    if (!plan(1).team) throw std::runtime_error("DLRChain: this GPU is too small for a chain of these sizes");
    weights_.reset(upload(lockkit_cuda::pack_weights(shape_, blocks)));
    bias_.reset(upload(lockkit_cuda::pack_bias(shape_, blocks, number)));
    output_bias_.reset(upload(last));
  }

  void compute(ort::Context* context) {
    const ort::Value* input;
    check(api_.input(context, 0, &input));
    const std::vector<int64_t> dims = api_dims(input);
    if (dims.empty() || dims.back() != shape_.hidden)
      throw std::runtime_error("DLRChain: the input's hidden size is not that of the weights");
    int64_t tokens = 1;
    for (size_t i = 0; i + 1 < dims.size(); ++i) tokens *= dims[i];
    ort::Value* output;
    check(api_.output(context, 0, dims.data(), dims.size(), &output));
    void *from, *to, *stream;
    check(api_.data(input, &from));
    check(api_.data(output, &to));
    check(api_.stream(context, &stream));
    if (tokens > 0) launch(static_cast<const uint16_t*>(from), static_cast<uint16_t*>(to), tokens, Stream(stream));
  }

 private:
  static float number(uint16_t bits) { return TYPE == ort::BFLOAT16 ? from_bfloat16(bits) : from_half(bits); }

  static const uint16_t* vector(Constants& constants, int64_t count) {
    const Tensor tensor = constants.next(TYPE);
    if (tensor.count() != count) throw std::runtime_error("DLRChain: inputs do not match the attributes");
    return static_cast<const uint16_t*>(tensor.data);
  }
  template <class V>
  Buffer* upload(const std::vector<V>& values) const {
    return new Buffer(device_, values.data(), values.size() * sizeof(V));
  }

  std::vector<int64_t> api_dims(const ort::Value* value) const {
    ort::Shape* shape;
    check(api_.shape(value, &shape));
    size_t rank = 0;
    ort::Status* failed = api_.rank(shape, &rank);
    std::vector<int64_t> dims(rank);
    if (!failed) failed = api_.dimensions(shape, dims.data(), rank);
    api_.release(shape);
    check(failed);
    return dims;
  }

  // The plan for this many tokens, made once. Without a team: the kernels for many tokens are faster.
  Plan plan(int tokens) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(tokens);
    if (found != plans_.end()) return found->second;
    const bool prompt = lockkit_cuda::prefers_prompt(device_.gpu(), shape_, tokens);
    return plans_[tokens] = prompt ? Plan() : lockkit_cuda::make_plan(device_.gpu(), shape_, tokens);
  }

  // What kernels of both kinds are told of the chain.
  template <class A>
  void describe(A& args, const uint16_t* x, uint16_t* y, int tokens) const {
    args.x = x, args.y = y, args.tokens = tokens;
    args.weights = weights_->template as<unsigned char>();
    args.bias = bias_->template as<float>(), args.output_bias = output_bias_->template as<float>();
    args.inverse_gain = inverse_gain_, args.activation = activation_;
  }

  void launch(const uint16_t* x, uint16_t* y, int64_t tokens, Stream stream) {
    constexpr int64_t MOST = 1 << 20;  // tokens in a plan
    constexpr const char* TYPE_NAME = TYPE == ort::BFLOAT16 ? "BFloat16" : "Half";
    for (; tokens > MOST; x += MOST * shape_.hidden, y += MOST * shape_.hidden, tokens -= MOST)
      launch(x, y, MOST, stream);
    const Plan plan = this->plan(int(tokens));
    if (plan.team) {
      Args args = plan.args(shape_);
      describe(args, x, y, int(tokens));
      cuda::launch(device_, plan, shape_, TYPE_NAME, args, stream);
    } else {
      PromptArgs args = lockkit_cuda::prompt_args(shape_);
      describe(args, x, y, int(tokens));
      cuda::launch(device_, prompt_plan(int(tokens)), shape_, TYPE_NAME, args, stream);
    }
  }

  // The plan for this many tokens, made once.
  PromptPlan prompt_plan(int tokens) {
    const std::lock_guard<std::mutex> lock(mutex_);
    PromptPlan& plan = prompt_plans_[tokens];
    if (!plan.rows) plan = lockkit_cuda::make_prompt_plan(device_.gpu(), shape_, tokens);
    return plan;
  }

  const ort::Api& api_;
  Device& device_;
  const lockkit_cuda::Activation activation_;
  Shape shape_;
  float inverse_gain_ = 1;
  std::unique_ptr<Buffer> weights_, bias_, output_bias_;
  std::mutex mutex_;  // guards what follows
  std::map<int, Plan> plans_;
  std::map<int, PromptPlan> prompt_plans_;
};

}  // namespace cuda
}  // namespace
