// The threads that work on one call together.
#pragma once
#include <atomic>
#include <chrono>

namespace {

constexpr auto PATIENCE = std::chrono::microseconds(50);

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

}  // namespace
