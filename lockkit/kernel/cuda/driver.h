// The CUDA driver, loaded when it is needed: neither a CUDA toolkit nor its headers are. Constants and structs are those
// of cuda.h, which keeps them from release to release.
#pragma once
#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan.h"

#if defined(LOCKKIT_CUBINS)  // the file with the kernels for all GPUs, which the build puts into the library
asm(".section .rodata\n"
    ".balign 16\n"
    ".globl lockkit_cubins\n"
    ".hidden lockkit_cubins\n"
    "lockkit_cubins:\n"
    ".incbin \"" LOCKKIT_CUBINS "\"\n"
    ".previous\n");
extern "C" const unsigned char lockkit_cubins[] __attribute__((visibility("hidden")));
#endif

namespace {
namespace cuda {

using Address = uint64_t;
typedef struct Context_* Context;
typedef struct Module_* Module;
typedef struct Function_* Function;
typedef struct Stream_* Stream;

enum Attribute {
  MULTIPROCESSORS = 16,
  MAJOR = 75,
  MINOR = 76,
  COOPERATIVE = 95,
  SHARED_BYTES = 97
};
enum FunctionAttribute { DYNAMIC_SHARED_BYTES = 8, SHARED_PERCENT = 9, LARGE_CLUSTERS = 14 };
enum LaunchAttribute { LAUNCH_COOPERATIVE = 2, LAUNCH_CLUSTER = 4, LAUNCH_EARLY = 6 };
constexpr int MIN_MAJOR = 8;

struct alignas(8) LaunchOption {
  int id;
  int unused;
  int value[16];
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared_bytes;
  Stream stream;
  LaunchOption* options;
  unsigned option_count;
};

class Driver {
 public:
  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  // Call a function of the driver. Throws if it does not exist, or fails.
  template <class... A>
  void call(const char* name, A... arguments) const {
    const int code = try_call(name, arguments...);
    if (code) throw std::runtime_error(std::string("DLRChain: ") + name + " failed: " + error_name(code));
  }
  template <class... A>
  int try_call(const char* name, A... arguments) const {
    if (!library_) throw std::runtime_error("DLRChain: there is no CUDA driver (libcuda.so.1)");
    const auto function = reinterpret_cast<int (*)(A...)>(dlsym(library_, name));
    if (!function) throw std::runtime_error(std::string("DLRChain: the CUDA driver is too old, it has no ") + name);
    return function(arguments...);
  }
  // Launch a kernel, by a function that is looked up once.
  template <class P>
  void launch(const LaunchConfig& config, Function kernel, P& parameters) const {
    void* all[] = {&parameters};
    if (!launch_) return call("cuLaunchKernelEx", &config, kernel, static_cast<void**>(all), static_cast<void**>(nullptr));
    const int code = launch_(&config, kernel, all, nullptr);
    if (code) throw std::runtime_error("DLRChain: cuLaunchKernelEx failed: " + error_name(code));
  }

 private:
  using Launch = int (*)(const LaunchConfig*, Function, void**, void**);

  Driver()
      : library_(dlopen("libcuda.so.1", RTLD_NOW)),
        launch_(library_ ? reinterpret_cast<Launch>(dlsym(library_, "cuLaunchKernelEx")) : nullptr) {}

  std::string error_name(int code) const {
    const char* name = nullptr;
    const auto function = reinterpret_cast<int (*)(int, const char**)>(dlsym(library_, "cuGetErrorName"));
    return function && !function(code, &name) && name ? name : "error " + std::to_string(code);
  }

  void* const library_;
  const Launch launch_;
};

// One GPU, in the context that onnxruntime uses, with the kernels loaded into it. It lives as long as the process.
class Device {
 public:
  // The device of the calling thread's context, or else the first.
  static Device& current() {
    static std::mutex mutex;
    static std::map<Context, std::unique_ptr<Device>> devices;
    const Driver& driver = Driver::get();
    driver.call("cuInit", 0u);
    Context context = nullptr;
    driver.call("cuCtxGetCurrent", &context);
    if (!context) {
      int first;
      driver.call("cuDeviceGet", &first, 0);
      driver.call("cuDevicePrimaryCtxRetain", &context, first);
      driver.call("cuCtxSetCurrent", context);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    auto& device = devices[context];
    if (!device) device.reset(new Device(context));
    return *device;
  }

  const lockkit_cuda::Gpu& gpu() const { return gpu_; }

  Function function(const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return loaded(name);
  }

  Address allocate(size_t bytes) {
    Address found = 0;
    driver_.call("cuMemAlloc_v2", &found, bytes);
    return found;
  }
  // Copy `bytes` to memory of the device.
  Address upload(const void* from, size_t bytes) {
    const Address to = allocate(bytes);
    driver_.call("cuMemcpyHtoD_v2", to, from, bytes);
    synchronise();  // the copy may return before its end, and onnxruntime's streams do not wait for it
    return to;
  }
  void synchronise() { driver_.call("cuCtxSynchronize"); }
  void free(Address address) noexcept {
    try {
      driver_.try_call("cuCtxPushCurrent_v2", context_);
      driver_.try_call("cuMemFree_v2", address);
      Context popped;
      driver_.try_call("cuCtxPopCurrent_v2", &popped);
    } catch (const std::exception&) {  // the driver is gone at the end of the process
    }
  }

  // At least `bytes` of memory that only kernels on `stream` use, one after the other.
  Address scratch(Stream stream, size_t bytes) { return kept(scratch_, stream, bytes); }
  // Such memory, which holds zeros. Every kernel leaves it so.
  Address zeros(Stream stream, size_t bytes) { return kept(zeros_, stream, bytes); }

 private:
  explicit Device(Context context) : driver_(Driver::get()), context_(context) {
#if defined(LOCKKIT_CUBINS)
    const int major = attribute(MAJOR), minor = attribute(MINOR);
    if (major < MIN_MAJOR)
      throw std::runtime_error("DLRChain: this GPU (compute capability " + std::to_string(major) + "." +
                               std::to_string(minor) + ") is older than 8.0");
    if (!attribute(COOPERATIVE)) throw std::runtime_error("DLRChain: this GPU has no cooperative launch");
    driver_.call("cuModuleLoadData", &module_, static_cast<const void*>(lockkit_cubins));
    gpu_ = {attribute(MULTIPROCESSORS), attribute(SHARED_BYTES), 0};
    find_clusters(major);
#else
    throw std::runtime_error("DLRChain: the library was built without kernels for CUDA");
#endif
  }

  using Kept = std::map<Stream, std::pair<Address, size_t>>;

  // When more is needed, the old memory stays: captured graphs may use it.
  Address kept(Kept& all, Stream stream, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& [address, size] = all[stream];
    if (size < bytes) {
      size_t wanted = size_t{1} << 20;
      while (wanted < bytes) wanted *= 2;
      const Address grown = allocate(wanted);
      driver_.call("cuMemsetD8Async", grown, static_cast<unsigned char>(0), wanted, stream);
      address = grown, size = wanted;
    }
    return address;
  }

  int attribute(Attribute which) const {
    int device, value;
    driver_.call("cuCtxGetDevice", &device);
    driver_.call("cuDeviceGetAttribute", &value, int(which), device);
    return value;
  }

  Function loaded(const std::string& name) {
    Function& function = functions_[name];
    if (!function) {
      Function found;
      driver_.call("cuModuleGetFunction", &found, module_, name.c_str());
      driver_.call("cuFuncSetAttribute", found, int(DYNAMIC_SHARED_BYTES), gpu_.shared_bytes);
      if (name.find("_CLUSTER") != std::string::npos)
        driver_.try_call("cuFuncSetAttribute", found, int(LARGE_CLUSTERS), 1);
      if (name.rfind("prompt_", 0) == 0)  // so that two thread blocks fit on a multiprocessor
        driver_.try_call("cuFuncSetAttribute", found, int(SHARED_PERCENT), 100);
      function = found;
    }
    return function;
  }

  // Find the largest clusters that the GPU can hold with all of its shared memory, and how many of them.
  void find_clusters(int major) {
    if (major < 9) return;
    Function function;
    const char* kernel = "chain_Half_Plain_CLUSTER";
    if (driver_.try_call("cuModuleGetFunction", &function, module_, kernel)) return;
    function = loaded(kernel);
    for (const int size : {16, 8}) {
      LaunchOption option{LAUNCH_CLUSTER, 0, {size, 1, 1}};
      LaunchConfig config{{unsigned(size), 1, 1}, {lockkit_cuda::THREADS, 1, 1}, unsigned(gpu_.shared_bytes), nullptr,
                          &option, 1};
      int clusters = 0;
      if (driver_.try_call("cuOccupancyMaxActiveClusters", &clusters, function, &config) || clusters <= 0) continue;
      gpu_.max_cluster = size, gpu_.clusters = clusters;
      return;
    }
  }

  const Driver& driver_;
  const Context context_;
  lockkit_cuda::Gpu gpu_{};
  Module module_ = nullptr;
  std::mutex mutex_;  // guards what follows
  std::map<std::string, Function> functions_;
  Kept scratch_, zeros_;
};

}  // namespace cuda
}  // namespace
