// A bounded record of what the ring did and when, for pictures and for tests.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <mutex>
#include <vector>

namespace sidp::cache {

struct TraceEvent {
  enum class Kind { fetch, compute, stall };
  Kind kind;
  int layer;
  int slot;      // -1 for a layer that is local
  double begin;  // seconds since the trace's clock was set
  double end;
};

class Trace {
 public:
  using Clock = std::chrono::steady_clock;

  void start(std::size_t capacity) {
    std::lock_guard<std::mutex> lock(mutex_);
    events_.clear();
    events_.reserve(capacity);
    capacity_ = capacity;
    zero_ = Clock::now();
    on_.store(true, std::memory_order_release);
  }

  bool on() const { return on_.load(std::memory_order_acquire); }

  // Drops what does not fit: a trace never grows without bound.
  void add(TraceEvent::Kind kind, int layer, int slot, Clock::time_point begin, Clock::time_point end) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (events_.size() >= capacity_ || begin < zero_) return;
    events_.push_back({kind, layer, slot, seconds(begin), seconds(end)});
  }

  std::vector<TraceEvent> events() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return events_;
  }

 private:
  double seconds(Clock::time_point time) const { return std::chrono::duration<double>(time - zero_).count(); }

  std::atomic<bool> on_{false};
  mutable std::mutex mutex_;
  std::vector<TraceEvent> events_;
  std::size_t capacity_ = 0;
  Clock::time_point zero_{};
};

}  // namespace sidp::cache
