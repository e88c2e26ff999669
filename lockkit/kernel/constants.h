// The operator's attributes and constant inputs, read when the session is created.
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

// Release the pages at `data` if they are mapped from a file. A later access reads them from the file again.
//
// The session keeps its constants for its whole life, mapped from the export's file. Once they are packed, the kernel
// no longer reads them. Without this function the process would hold every weight twice. Bit 61 of a page's entry in
// the page map tells whether the page belongs to a file; other memory is left alone.
inline void release_file_pages(const void* data, size_t bytes) {
#if defined(__linux__)
  const size_t page_bytes = size_t(sysconf(_SC_PAGESIZE)), first = size_t(data) / page_bytes;
  std::vector<uint64_t> entries((size_t(data) + bytes + page_bytes - 1) / page_bytes - first);
  const ssize_t table_bytes = ssize_t(entries.size() * sizeof(uint64_t));
  const int table = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (table < 0) return;
  const ssize_t bytes_read = pread(table, entries.data(), table_bytes, off_t(first * sizeof(uint64_t)));
  close(table);
  if (bytes_read != table_bytes) return;
  constexpr uint64_t PRESENT = uint64_t{1} << 63, SWAPPED = uint64_t{1} << 62, OF_FILE = uint64_t{1} << 61;
  for (const uint64_t entry : entries)
    if (entry & (PRESENT | SWAPPED) && !(entry & OF_FILE)) return;
  madvise(reinterpret_cast<void*>(first * page_bytes), entries.size() * page_bytes, MADV_DONTNEED);
#else
  (void)data, (void)bytes;
#endif
}

// Reads the attributes, and the inputs after the first in order.
class Constants {
 public:
  Constants(const ort::Api& api, const ort::Info* info) : api_(api), info_(info) {
    check(api.input_count(info, &inputs_));
  }
  ~Constants() { release_all(); }

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

  // The next input, which must be a constant of this type.
  Tensor next(ort::Type type) {
    int is_constant = 0;
    const ort::Value* value;
    if (next_ >= inputs_) throw std::runtime_error("DLRChain: inputs do not match the attributes");
    check(api_.constant(info_, next_++, &is_constant, &value));
    if (!is_constant) throw std::runtime_error("DLRChain: weights must be constants");
    ort::Shape* shape;
    check(api_.shape(value, &shape));
    size_t rank = 0;
    int found_type = 0;
    Tensor tensor{};
    ort::Status* failed = api_.type(shape, &found_type);
    if (!failed) failed = api_.rank(shape, &rank);
    tensor.dims.resize(rank);
    if (!failed) failed = api_.dimensions(shape, tensor.dims.data(), rank);
    api_.release(shape);
    check(failed);
    if (found_type != type) throw std::runtime_error("DLRChain: a weight has an unexpected type");
    void* data;
    check(api_.data(value, &data));
    tensor.data = data;
    read_.emplace_back(data, size_t(tensor.count()) * (type == ort::FLOAT ? 4 : type == ort::UINT8 ? 1 : 2));
    return tensor;
  }
  bool at_end() const { return next_ == inputs_; }

  // Release the memory of all tensors that `next` has returned. Call it once they are packed.
  void release_all() {
    for (const auto& [data, bytes] : read_) release_file_pages(data, bytes);
    read_.clear();
  }

 private:
  const ort::Api& api_;
  const ort::Info* info_;
  size_t inputs_ = 0, next_ = 1;
  std::vector<std::pair<const void*, size_t>> read_;  // address and bytes of each tensor
};

}  // namespace
