// What the ring did and when, by timed events: for pictures and for tests. Off, it costs one branch.
#pragma once

#include <cstddef>
#include <vector>

#include "cuda_objects.hpp"
#include "trace.hpp"

namespace sidp::cache {

class CudaTrace {
 public:
  void start(std::size_t capacity, cudaStream_t stream) {
    marks_.clear();
    capacity_ = capacity;
    zero_.clear();
    zero_.emplace_back(true);
    zero_[0].record(stream);
  }
  bool on() const { return marks_.size() < capacity_; }

  // Opens an entry; close it with end() on the same stream. Returns its number.
  std::size_t begin(TraceEvent::Kind kind, int layer, int slot, cudaStream_t stream) {
    marks_.push_back({kind, layer, slot, Event(true), Event(true), false});
    marks_.back().begin.record(stream);
    return marks_.size() - 1;
  }
  void end(std::size_t number, cudaStream_t stream) {
    marks_[number].end.record(stream);
    marks_[number].closed = true;
  }

  // Waits until all that was recorded has happened.
  std::vector<TraceEvent> events() const {
    std::vector<TraceEvent> list;
    for (const Mark& mark : marks_) {
      if (!mark.closed) continue;
      SIDP_CUDA_CHECK(cudaEventSynchronize(mark.end.get()));
      list.push_back({mark.kind, mark.layer, mark.slot, since_zero(mark.begin), since_zero(mark.end)});
    }
    return list;
  }

 private:
  struct Mark {
    TraceEvent::Kind kind;
    int layer;
    int slot;
    Event begin, end;
    bool closed;
  };

  double since_zero(const Event& event) const {
    float ms = 0;
    SIDP_CUDA_CHECK(cudaEventElapsedTime(&ms, zero_[0].get(), event.get()));
    return ms * 1e-3;
  }

  std::vector<Mark> marks_;
  std::vector<Event> zero_;
  std::size_t capacity_ = 0;
};

}  // namespace sidp::cache
