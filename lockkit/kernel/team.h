// The threads that share the work of one call.
#pragma once
#include <atomic>
#include <chrono>

namespace {

// How long the first thread waits for the others to join.
constexpr auto JOIN_TIMEOUT = std::chrono::microseconds(50);

// The threads that joined in time. The size is fixed once `join` returns.
class Team {
 public:
  explicit Team(int wanted) : wanted_(wanted) {}

  // Join the team. Returns the caller's number in it, or -1 if the team is already closed.
  int join() {
    int state = state_.load();
    do {
      if (state & CLOSED) return -1;
    } while (!state_.compare_exchange_weak(state, state + 1));
    const int number = state;
    if (number == 0) {
      const auto deadline = std::chrono::steady_clock::now() + JOIN_TIMEOUT;
      while (state_.load() < wanted_ && std::chrono::steady_clock::now() < deadline) pause();
      state_.fetch_or(CLOSED);
    }
    while (!(state_.load() & CLOSED)) pause();
    return number;
  }
  int size() const { return state_.load() & ~CLOSED; }

  // Wait until all threads have reached this barrier. `count`: barriers so far, this one included.
  void barrier(int count) {
    arrivals_.fetch_add(1, std::memory_order_acq_rel);
    while (arrivals_.load(std::memory_order_acquire) < count * size()) pause();
  }

 private:
  static constexpr int CLOSED = 1 << 30;
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  const int wanted_;
  alignas(64) std::atomic<int> state_{0};     // number of threads that joined, plus the flag CLOSED
  alignas(64) std::atomic<int> arrivals_{0};  // at all barriers so far
};

}  // namespace
