// What a call of the operator is given when the session is made: attributes and constant inputs.
#pragma once
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "onnxruntime_abi.h"

namespace {

struct Failure {
  ort::Status* status;
};
inline void check(ort::Status* status) {
  if (status) throw Failure{status};
}

struct Tensor {
  const void* data;
  std::vector<int64_t> dims;

  int64_t count() const {
    int64_t product = 1;
    for (const int64_t size : dims) product *= size;
    return product;
  }
};

// Let go of the memory at `data` if it is pages of a file, which come back when somebody looks again.
//
// The session keeps its constants for as long as it lives. It maps them from the export's file, so once they
// are packed their pages are of no use, and without this a process would hold every weight twice. Whether a
// page is a file's the system tells (bit 61 of its entry); memory of another kind is left alone.
inline void let_go(const void* data, size_t bytes) {
#if defined(__linux__)
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), first = size_t(data) / page;
  std::vector<uint64_t> entries((size_t(data) + bytes + page - 1) / page - first);
  const ssize_t length = ssize_t(entries.size() * sizeof(uint64_t));
  const int table = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (table < 0) return;
  const ssize_t got = pread(table, entries.data(), length, off_t(first * sizeof(uint64_t)));
  close(table);
  if (got != length) return;
  constexpr uint64_t PRESENT = uint64_t{1} << 63, SWAPPED = uint64_t{1} << 62, OF_FILE = uint64_t{1} << 61;
  for (const uint64_t entry : entries)
    if (entry & (PRESENT | SWAPPED) && !(entry & OF_FILE)) return;
  madvise(reinterpret_cast<void*>(first * page), entries.size() * page, MADV_DONTNEED);
#else
  (void)data, (void)bytes;
#endif
}

// Reads the inputs after the first, in order.
class Constants {
 public:
  Constants(const ort::Api& api, const ort::Info* info) : api_(api), info_(info) {
    check(api.input_count(info, &inputs_));
  }
  ~Constants() { let_go_of_all(); }

  int64_t number(const char* name) const {
    int64_t value;
    check(api_.attribute(info_, name, &value));
    return value;
  }
  std::string text(const char* name) const {
    char value[64] = {};
    size_t size = sizeof(value);
    check(api_.attribute(info_, name, value, &size));
    return value;
  }

  Tensor next(ort::Type type) {
    int is_constant = 0;
    const ort::Value* value;
    if (next_ >= inputs_) throw std::runtime_error("DLRChain: inputs and attributes do not go together");
    check(api_.constant(info_, next_++, &is_constant, &value));
    if (!is_constant) throw std::runtime_error("DLRChain: weights must be constants");
    ort::Shape* shape;
    check(api_.shape(value, &shape));
    size_t rank = 0;
    int found = 0;
    Tensor tensor{};
    ort::Status* failed = api_.type(shape, &found);
    if (!failed) failed = api_.rank(shape, &rank);
    tensor.dims.resize(rank);
    if (!failed) failed = api_.dimensions(shape, tensor.dims.data(), rank);
    api_.release(shape);
    check(failed);
    if (found != type) throw std::runtime_error("DLRChain: a weight has another type");
    void* data;
    check(api_.data(value, &data));
    tensor.data = data;
    used_.emplace_back(data, size_t(tensor.count()) * (type == ort::FLOAT ? 4 : type == ort::FLOAT16 ? 2 : 1));
    return tensor;
  }
  bool at_end() const { return next_ == inputs_; }

  // To be called when what `next` has returned so far is packed.
  void let_go_of_all() {
    for (const auto& [data, bytes] : used_) let_go(data, bytes);
    used_.clear();
  }

 private:
  const ort::Api& api_;
  const ort::Info* info_;
  size_t inputs_ = 0, next_ = 1;
  std::vector<std::pair<const void*, size_t>> used_;
};

}  // namespace
