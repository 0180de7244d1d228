// Owners' egress and readers' ingress as a fluid. A reader copies one thing at a time, as its copy engine does; an owner
// divides its egress evenly among those that read from it, or lets them take turns. Or in slices, as the CPU backend's copy
// engine works: each waits for its turn at the owner, and its reader sleeps a little longer than it had to.
#pragma once

#include <cstdint>
#include <vector>

#include "events.hpp"
#include "jitter.hpp"
#include "model.hpp"

namespace sidp::sim {

class Links {
 public:
  Links(const Fabric& fabric, int world, EventQueue& events, Jitter& jitter);

  // `reader` begins to copy `bytes` in `copies` pieces from `owner`; a copy_done event with its version() tells the end.
  void start(int reader, int owner, std::uint64_t bytes, int copies, double now);
  bool current(int reader, std::uint64_t version) const { return flows_[reader].version == version; }
  // At a copy_done event: true where that was a slice, and the next one has begun.
  bool goes_on(int reader, double now);
  void finish(int reader, double now);

  const std::vector<std::vector<std::uint64_t>>& read() const { return read_; }
  const std::vector<double>& feeding_s() const { return feeding_s_; }
  const std::vector<double>& crowded_s() const { return crowded_s_; }

 private:
  struct Flow {
    int owner = -1;
    double left = 0;
    double rate = 0;
    double since = 0;
    double piece = 0, of_piece_left = 0, pause = 0;  // in slices
    std::uint64_t version = 0;
  };

  void count(int owner, double now);
  void share_again(int owner, double now);
  void next_slice(int reader, double now);

  const Fabric fabric_;
  EventQueue& events_;
  Jitter& jitter_;
  std::vector<Flow> flows_;                // by reader
  std::vector<std::vector<int>> readers_;  // by owner
  std::vector<double> egress_free_at_;
  std::vector<double> counted_to_;
  std::vector<std::vector<std::uint64_t>> read_;
  std::vector<double> feeding_s_, crowded_s_;
};

}  // namespace sidp::sim
