// The onnxruntime operators `lockkit::DLRChain` and `DLRChainNBits`: one call computes a whole chain.
//
// An export makes each chain a call of a function with one of these names. The function's body is ordinary operators.
// When this library is registered, onnxruntime calls the operator instead. For M tokens x [M, d]:
//
// 1. When the session is created, weights are packed. Gate and up of a block become one matrix [d, 2r], with r rounded
//    up to whole vectors. Down is [r, d], already multiplied by the gain, as in the graph. fp16, int8 and int4 weights
//    keep their format (plain.h, nbits.h). The session's own copy is released (constants.h). It is not used in place:
//    file mappings have small pages, which costs a tenth of the decode speed at d=1024, and the best layout depends on
//    the vector size. The channels are cut into slices, one per thread, and each has a stream of weights of its own:
//    what a thread reads is one run of memory, of all blocks.
// 2. A few tokens (decode): every thread owns a slice of the d channels. It multiplies its slice of t = x + s by its
//    rows of gate and up. After a barrier, every thread adds up the partial products, computes all units, and updates
//    its slice of s. So there is one barrier per block.
// 3. Many tokens (prefill): every thread takes a tile of tokens through all blocks, without barriers.
// 4. The output is s over the gain, plus the output bias.
//
// The threads are onnxruntime's own. It does not guarantee that two tasks run at the same time. So the threads that
// arrive in time form the team, and late ones return at once (`Team`): no thread waits for one that never starts.
// Everything is in anonymous namespaces, so that two versions of the library can be loaded into one process.
//
// That was the CPU. If the session's options have the entry `lockkit.provider` with the value `cuda`, the library
// registers the operator of cuda/operator.h instead, and none for the CPU: onnxruntime would move chains that the CUDA
// provider cannot run to the CPU, with all their data.

#include "chain.h"
#if defined(__linux__)
#include "cuda/operator.h"
#endif

namespace {

// Run `body` and turn an exception into a status.
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

// Common to all operators: the inputs are x, then all weights.
struct AnyOp : ort::Op {
  AnyOp() : ort::Op{} {
    release = ort::FIRST_RELEASE;
    output_count = [](const Op*) -> size_t { return 1; };
    output_arity = [](const Op*, size_t) { return int(ort::REQUIRED); };
    variadic_minimum = [](const Op*) { return 2; };
    variadic_output_minimum = [](const Op*) { return 1; };
    variadic_output_same_type = [](const Op*) { return 1; };
    first_version = [](const Op*) { return 1; };
    last_version = [](const Op*) { return 1; };
  }
};

struct ChainOp : AnyOp {
  ChainOp() {
    provider = [](const Op*) { return "CPUExecutionProvider"; };
    input_count = [](const Op*) -> size_t { return 2; };
    input_arity = [](const Op*, size_t index) { return int(index ? ort::VARIADIC : ort::REQUIRED); };
    input_memory = [](const Op*, size_t) { return int(ort::ON_DEVICE); };
    compute_checked = [](void* chain, ort::Context* context) {
      return guarded(*api_in_use, [&] { static_cast<AnyChain*>(chain)->compute(context); });
    };
    destroy = [](void* chain) { delete static_cast<AnyChain*>(chain); };
  }
};

template <class T>
struct PlainOp : ChainOp {
  PlainOp() {
    static constexpr int type = sizeof(T) == 4 ? ort::FLOAT : ort::FLOAT16;
    name = [](const Op*) { return "DLRChain"; };
    input_type = [](const Op*, size_t) { return int(type); };
    output_type = [](const Op*, size_t) { return int(type); };
    variadic_same_type = [](const Op*) { return 1; };
    create_checked = [](const Op*, const ort::Api* api, const ort::Info* info, void** out) {
      return guarded(*api, [&] { *out = static_cast<AnyChain*>(new Chain<Plain<T>>(*api, info)); });
    };
  }
};

struct NBitsOp : ChainOp {
  NBitsOp() {
    name = [](const Op*) { return "DLRChainNBits"; };
    input_type = [](const Op*, size_t index) { return int(index ? ort::ANY : ort::FLOAT); };
    output_type = [](const Op*, size_t) { return int(ort::FLOAT); };
    variadic_same_type = [](const Op*) { return 0; };
    create_checked = [](const Op*, const ort::Api* api, const ort::Info* info, void** out) {
      return guarded(*api, [&] { *out = create(*api, info); });
    };
  }

 private:
  static AnyChain* create(const ort::Api& api, const ort::Info* info) {
    const int64_t bits = Constants(api, info).number("bits");
    if (bits == 8) return new Chain<NBits<8>>(api, info);
    if (bits == 4) return new Chain<NBits<4>>(api, info);
    throw std::runtime_error("DLRChainNBits: weights must have 4 or 8 bits");
  }
};

#if defined(__linux__)
// `C` is a cuda::Chain.
template <class C>
struct CudaOp : AnyOp {
  // Inputs at most. onnxruntime takes all inputs of a variadic parameter but the first from the device; so the weights
  // are optional parameters.
  static constexpr size_t MOST_INPUTS = 2048;

  CudaOp() {
    name = [](const Op*) { return C::NAME; };
    provider = [](const Op*) { return "CUDAExecutionProvider"; };
    input_count = [](const Op*) { return MOST_INPUTS; };
    input_arity = [](const Op*, size_t index) { return int(index ? ort::OPTIONAL : ort::REQUIRED); };
    input_memory = [](const Op*, size_t index) { return int(index ? ort::ON_HOST : ort::ON_DEVICE); };
    input_type = [](const Op*, size_t index) { return int(index && C::MIXED_INPUTS ? ort::ANY : C::IO_TYPE); };
    output_type = [](const Op*, size_t) { return int(C::IO_TYPE); };
    variadic_same_type = [](const Op*) { return 1; };
    create_checked = [](const Op*, const ort::Api* api, const ort::Info* info, void** out) {
      return guarded(*api, [&] { *out = new C(*api, info); });
    };
    compute_checked = [](void* chain, ort::Context* context) {
      return guarded(*api_in_use, [&] { static_cast<C*>(chain)->compute(context); });
    };
    destroy = [](void* chain) { delete static_cast<C*>(chain); };
  }
};
#endif

// The value of an entry of the session's options, or nothing.
std::string setting(const ort::Api& api, const ort::Options* options, const char* name) {
  int exists = 0;
  check(api.setting(options, name, &exists));
  char value[64] = {};
  size_t size = sizeof(value);
  if (exists) check(api.setting(options, name, value, &size));
  return value;
}

}  // namespace

extern "C" ort::Status* RegisterCustomOps(ort::Options* options, const ort::ApiBase* base) {
  const ort::Api* api = base->get_api(ort::FIRST_RELEASE);
  if (!api) return base->get_api(1)->error("DLRChain: onnxruntime is older than 1.17");
  api_in_use = api;
  return guarded(*api, [&] {
    ort::Domain* domain;
    check(api->create_domain("lockkit", &domain));  // never freed, like the operators
    const auto add = [&](const ort::Op& op) { check(api->add_op(domain, &op)); };
    if (setting(*api, options, "lockkit.provider") == "cuda") {
#if defined(__linux__)
      static const CudaOp<cuda::Chain<ort::FLOAT16, cuda::Matrix>> half;
      static const CudaOp<cuda::Chain<ort::BFLOAT16, cuda::Matrix>> bfloat;
      static const CudaOp<cuda::Chain<ort::FLOAT16, cuda::QuantisedMatrix>> integers;
      add(half), add(bfloat), add(integers);
#else
      throw std::runtime_error("DLRChain: there is an operator for CUDA on Linux only");
#endif
    } else {
      static const PlainOp<float> single;
      static const PlainOp<Half> half;
      static const NBitsOp nbits;
      add(single), add(half), add(nbits);
    }
    check(api->add_domain(options, domain));
  });
}

#if defined(__linux__)
// Write to `problem` why the operator for CUDA cannot run on this machine, or nothing, and a description of the GPU
// to `found`. Both have room for `size` characters.
extern "C" void lockkit_find_gpu(char* found, char* problem, size_t size) {
  found[0] = problem[0] = 0;
  try {
    const lockkit_cuda::Gpu& gpu = cuda::Device::current().gpu();
    std::snprintf(found, size, "%d multiprocessors, %d KiB of shared memory, clusters of %d", gpu.multiprocessors,
                  gpu.shared_bytes / 1024, gpu.max_cluster);
  } catch (const std::exception& error) {
    std::snprintf(problem, size, "%s", error.what());
  }
}
#endif
