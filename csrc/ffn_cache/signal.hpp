// Waiting between the ring's two threads: words say what has happened, the signal only wakes who sleeps.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>

#include "../deadline.hpp"

namespace sidp::cache {

// The waiter counts itself in before it looks at the word, the publisher writes the word before it looks at the count,
// all of it sequentially consistent: one of the two sees the other, so no wake-up is lost.
class Signal {
 public:
  // After the word that `predicate` looks at has been stored (seq_cst).
  void notify() {
    if (sleepers_.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
  }

  // Waits until `predicate` holds; false when the deadline passes first.
  template <typename Predicate>
  bool wait(const Deadline& deadline, Predicate predicate) {
    for (int spin = 0; spin < kSpins; ++spin)
      if (predicate()) return true;
    sleepers_.fetch_add(1);
    bool holds;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      holds = wake_.wait_until(lock, deadline.time_point(), predicate);
    }
    sleepers_.fetch_sub(1);
    return holds;
  }

 private:
  // About a microsecond: a hand-over that is just happening costs no system call.
  static constexpr int kSpins = 200;

  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace sidp::cache
