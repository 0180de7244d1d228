// The ring of one rank in simulated time. What is fetched next, and what that waits for, is the product's own FetchQueue; a
// slot that still holds the wanted unit is not fetched again, as in ffn_cache/ring.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../schedule.hpp"
#include "links.hpp"

namespace sidp::sim {

class RingModel {
 public:
  RingModel(const Placement& placement, int rank, int slots, bool peak_shifting, Links& links);

  // The next use of `layer`: true where its bytes are here. Otherwise copied() says when.
  bool claim(int layer);
  void release(int layer, double now);
  // The running copy has ended. True where the use that was claimed last can go on.
  bool copied(double now);
  void pause(bool paused, double now);
  // Begins what can begin.
  void pump(double now);

  std::uint64_t fetches() const { return fetches_; }
  std::uint64_t fetched_bytes() const { return fetched_bytes_; }
  double fetch_s() const { return fetch_s_; }

 private:
  struct Copy {
    int owner = 0;
    std::uint64_t bytes = 0;
    int pieces = 0;
  };

  bool next_may_start() const;
  void next_copy(double now);
  void filled();

  const int rank_;
  Links& links_;
  FetchSchedule schedule_;
  std::unique_ptr<FetchQueue> queue_;           // null: nothing to fetch
  std::vector<std::vector<Copy>> copies_;       // by remote index, one for each owner
  std::vector<int> content_;                    // by slot: remote index
  std::vector<std::uint64_t> ready_, released_;  // by slot: ticket + 1
  Fetch pending_;
  bool copying_ = false, paused_ = false;
  std::size_t copy_ = 0;
  double began_ = 0;
  std::uint64_t next_ticket_ = 0, fetches_ = 0, fetched_bytes_ = 0;
  double fetch_s_ = 0;
};

}  // namespace sidp::sim
