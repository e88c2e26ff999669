// Where the kernel keeps weights and intermediate results.
#pragma once
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

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

}  // namespace
