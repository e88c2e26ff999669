// Memory for weights and intermediate results.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// Allocator that aligns to cache lines: a vector that straddles two lines costs twice.
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

// Memory for weights, in huge pages where the system has them. Every token reads all weights; with small pages,
// address translation would take much of the time.
class Arena {
 public:
  ~Arena() {
    for (char* chunk : chunks_) ::operator delete(chunk, std::align_val_t{PAGE_BYTES});
  }
  // Allocate `bytes`, aligned to a cache line.
  void* allocate(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > bytes_left_) {
      bytes_left_ = std::max(CHUNK_BYTES, (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES);
      free_ = static_cast<char*>(::operator new(bytes_left_, std::align_val_t{PAGE_BYTES}));
      chunks_.push_back(free_);
#if defined(__linux__)
      madvise(free_, bytes_left_, MADV_HUGEPAGE);
#endif
    }
    char* allocated = free_;
    free_ += bytes, bytes_left_ -= bytes;
    return allocated;
  }

 private:
  static constexpr size_t PAGE_BYTES = size_t{2} << 20, CHUNK_BYTES = 4 * PAGE_BYTES;
  std::vector<char*> chunks_;
  char* free_ = nullptr;
  size_t bytes_left_ = 0;
};

// The packed matrices of one slice of a chain, one after the other. They are packed into memory that grows, and move
// to their place once all are there.
class Stream {
 public:
  // Add zeros for a matrix, and return where they are.
  size_t append(size_t bytes) {
    const size_t at = packed_.size();
    packed_.resize(at + (bytes + 63) / 64 * 64);
    return at;
  }
  // The address changes with the next `append` and with `move_into`.
  uint8_t* at(size_t offset) { return (data_ ? data_ : packed_.data()) + offset; }

  void move_into(Arena& arena) {
    data_ = static_cast<uint8_t*>(arena.allocate(packed_.size()));
    std::memcpy(data_, packed_.data(), packed_.size());
    Array<uint8_t>().swap(packed_);
  }

 private:
  Array<uint8_t> packed_;
  uint8_t* data_ = nullptr;
};

}  // namespace
