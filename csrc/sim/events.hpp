// The queue of what happens next. Equal times keep the order in which they were scheduled, so that a run repeats exactly.
#pragma once

#include <cstdint>
#include <queue>
#include <vector>

namespace sidp::sim {

enum class What { own_done, serve_done, copy_done, arrives, reply, wake, woken, segment, start };

struct Event {
  double time = 0;
  std::uint64_t number = 0;
  What what = What::wake;
  int who = 0;
  std::uint64_t tag = 0;  // a version, that tells an event that was overtaken; or what it is about

  bool operator>(const Event& other) const {
    return time != other.time ? time > other.time : number > other.number;
  }
};

class EventQueue {
 public:
  void at(double time, What what, int who, std::uint64_t tag = 0) { heap_.push({time, number_++, what, who, tag}); }
  bool empty() const { return heap_.empty(); }
  std::uint64_t scheduled() const { return number_; }

  Event next() {
    const Event event = heap_.top();
    heap_.pop();
    return event;
  }

 private:
  std::priority_queue<Event, std::vector<Event>, std::greater<Event>> heap_;
  std::uint64_t number_ = 0;
};

}  // namespace sidp::sim
