// One rank's GPU: its own computing and its CaS server. Where both run, each gets half of what the GPU can do, which is
// right where both are bound by the same thing, HBM or arithmetic; the sum is conserved.
#pragma once

#include <algorithm>
#include <cstdint>

#include "events.hpp"

namespace sidp::sim {

class Device {
 public:
  Device(EventQueue& events, int rank) : events_(&events), rank_(rank) {}

  // `seconds` of work for the whole GPU; an own_done or serve_done event with version() tells the end.
  void begin(What part, double seconds, double now) {
    advance(now);
    Part& mine = of(part);
    mine.on = true;
    mine.left = seconds;
    schedule(now, part);
  }
  bool current(What part, std::uint64_t version) { return of(part).on && of(part).version == version; }
  void end(What part, double now) {
    advance(now);
    of(part).on = false;
    schedule(now, part == What::own_done ? What::serve_done : What::own_done);
  }

 private:
  struct Part {
    bool on = false;
    double left = 0;
    std::uint64_t version = 0;
  };

  Part& of(What part) { return part == What::own_done ? own_ : serve_; }
  double rate() const { return own_.on && serve_.on ? 0.5 : 1.0; }

  void advance(double now) {
    for (Part* part : {&own_, &serve_})
      if (part->on) part->left = std::max(0.0, part->left - (now - since_) * rate());
    since_ = now;
  }

  // `changed` has just begun, or is what goes on after the other's end.
  void schedule(double now, What changed) {
    for (What part : {What::own_done, What::serve_done}) {
      Part& p = of(part);
      if (p.on && (part == changed || rate() < 1)) events_->at(now + p.left / rate(), part, rank_, ++p.version);
    }
  }

  EventQueue* events_;
  int rank_;
  Part own_, serve_;
  double since_ = 0;
};

}  // namespace sidp::sim
