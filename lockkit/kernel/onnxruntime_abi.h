// The part of onnxruntime's C API that the kernel calls, declared by position.
//
// onnxruntime passes a library one table of function pointers. Releases only append to it, so a position means the same
// function in every release from FIRST_RELEASE on. With these declarations a C++ compiler is enough to build the
// kernel: the Python packages do not contain onnxruntime's headers.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t FIRST_RELEASE = 17;  // 1.17, the first with KernelContext_ParallelFor

struct Status;
struct Value;
struct Shape;
struct Context;
struct Info;
struct Domain;
struct Options;

enum Type : int { ANY = 0, FLOAT = 1, UINT8 = 2, FLOAT16 = 10, BFLOAT16 = 16 };
enum Arity : int { REQUIRED = 0, OPTIONAL = 1, VARIADIC = 2 };
enum Memory : int { ON_DEVICE = 0, ON_HOST = -2 };  // where an operator takes an input

struct Api {
  void* functions[275];

  template <class R = Status*, class... A>
  R call(int position, A... arguments) const {
    return reinterpret_cast<R (*)(A...)>(functions[position])(arguments...);
  }
  Status* error(const char* message) const { return call(0, 1, message); }  // 1: ORT_FAIL
  void release(Status* status) const { call<void>(93, status); }
  Status* create_domain(const char* name, Domain** out) const { return call(26, name, out); }
  Status* add_op(Domain* domain, const void* op) const { return call(27, domain, op); }
  Status* add_domain(Options* options, Domain* domain) const { return call(28, options, domain); }
  Status* data(const Value* value, void** out) const { return call(51, const_cast<Value*>(value), out); }
  Status* type(const Shape* shape, int* out) const { return call(60, shape, out); }
  Status* rank(const Shape* shape, size_t* out) const { return call(61, shape, out); }
  Status* dimensions(const Shape* shape, int64_t* out, size_t size) const { return call(62, shape, out, size); }
  Status* shape(const Value* value, Shape** out) const { return call(65, value, out); }
  void release(Shape* shape) const { call<void>(99, shape); }
  Status* attribute(const Info* info, const char* name, int64_t* out) const { return call(86, info, name, out); }
  Status* attribute(const Info* info, const char* name, char* out, size_t* size) const {
    return call(87, info, name, out, size);
  }
  Status* input(const Context* context, size_t index, const Value** out) const { return call(90, context, index, out); }
  Status* output(Context* context, size_t index, const int64_t* dims, size_t rank, Value** out) const {
    return call(91, context, index, dims, rank, out);
  }
  Status* stream(const Context* context, void** out) const { return call(193, context, out); }
  Status* setting(const Options* options, const char* name, int* exists) const { return call(237, options, name, exists); }
  Status* setting(const Options* options, const char* name, char* out, size_t* size) const {
    return call(238, options, name, out, size);
  }
  Status* input_count(const Info* info, size_t* out) const { return call(230, info, out); }
  Status* constant(const Info* info, size_t index, int* is_constant, const Value** out) const {
    return call(249, info, index, is_constant, out);
  }
  Status* parallel_for(const Context* context, void (*body)(void*, size_t), size_t total, void* data) const {
    return call(274, context, body, total, size_t{0}, data);
  }
};

struct ApiBase {
  const Api* (*get_api)(uint32_t release);
  const char* (*version)();
};

// One custom operator. onnxruntime reads the members by position, and only those that `release` defined.
struct Op {
  uint32_t release;
  void* (*create)(const Op*, const Api*, const Info*);
  const char* (*name)(const Op*);
  const char* (*provider)(const Op*);
  int (*input_type)(const Op*, size_t);
  size_t (*input_count)(const Op*);
  int (*output_type)(const Op*, size_t);
  size_t (*output_count)(const Op*);
  void (*compute)(void*, Context*);
  void (*destroy)(void*);
  int (*input_arity)(const Op*, size_t);
  int (*output_arity)(const Op*, size_t);
  int (*input_memory)(const Op*, size_t);
  int (*variadic_minimum)(const Op*);
  int (*variadic_same_type)(const Op*);
  int (*variadic_output_minimum)(const Op*);
  int (*variadic_output_same_type)(const Op*);
  Status* (*create_checked)(const Op*, const Api*, const Info*, void**);
  Status* (*compute_checked)(void*, Context*);
  void* infer_shape;
  int (*first_version)(const Op*);
  int (*last_version)(const Op*);
  void* unused[4];  // aliases between inputs and outputs: none
};

}  // namespace ort
