// Every wait of the library goes through a Deadline: no call blocks for ever.
#pragma once

#include <algorithm>
#include <chrono>

namespace sidp {

class Deadline {
 public:
  using Clock = std::chrono::steady_clock;

  static Deadline after(double seconds) {
    const double bounded = std::clamp(seconds, 0.0, 1e9);
    return Deadline(Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bounded)));
  }

  bool expired() const { return Clock::now() >= end_; }

  // Seconds left, never negative.
  double remaining() const { return std::max(0.0, std::chrono::duration<double>(end_ - Clock::now()).count()); }

  Clock::time_point time_point() const { return end_; }

 private:
  explicit Deadline(Clock::time_point end) : end_(end) {}

  Clock::time_point end_;
};

}  // namespace sidp
