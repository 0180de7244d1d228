// The CaS server of one owner: requests wait in the order of arrival; the oldest one's unit is served, with all that wait for
// the same unit where requests are fused.
#pragma once

#include <deque>
#include <vector>

#include "device.hpp"

namespace sidp::sim {

struct CasRequest {
  int requester = 0;
  int layer = 0;
  int rows = 0;
};

class ServerModel {
 public:
  ServerModel(const TimeTable& serve, double share, bool fuse) : serve_(&serve), share_(share), fuse_(fuse) {}

  void arrives(const CasRequest& request, Device& device, double now) {
    waiting_.push_back(request);
    if (batch_.empty()) begin(device, now);
  }

  // The batch that has ended.
  std::vector<CasRequest> ended(Device& device, double now) {
    std::vector<CasRequest> done;
    done.swap(batch_);
    device.end(What::serve_done, now);
    if (!waiting_.empty()) begin(device, now);
    return done;
  }

 private:
  void begin(Device& device, double now) {
    const int layer = waiting_.front().layer;
    int rows = 0;
    for (auto request = waiting_.begin(); request != waiting_.end();) {
      if (request->layer != layer || (!fuse_ && !batch_.empty())) {
        ++request;
        continue;
      }
      rows += request->rows;
      batch_.push_back(*request);
      request = waiting_.erase(request);
    }
    device.begin(What::serve_done, serve_->at(rows) * share_, now);
  }

  const TimeTable* serve_;
  double share_;
  bool fuse_;
  std::deque<CasRequest> waiting_;
  std::vector<CasRequest> batch_;
};

}  // namespace sidp::sim
