// After a loss: what was read from the lost owner is read from where its second copies lie. For the rings of both backends.
#pragma once

#include <cstdint>
#include <vector>

#include "../placement.hpp"
#include "../schedule.hpp"

namespace sidp::cache {

// A lost owner's extent of `layer` lay at `was` of its extent area; a copy of it lies at `now` of the area numbered `to` among
// the ring's sources.
struct MovedExtent {
  int layer = 0;
  int to = 0;
  std::uint64_t was = 0;
  std::uint64_t now = 0;
};

// In `copies` (by remote index) nothing is read from owner `from` any more. LayoutError where `moved` leaves something out.
void move_copies(const FetchSchedule& schedule, std::vector<std::vector<CopyOp>>& copies, int from,
                 const std::vector<MovedExtent>& moved);

// The areas that the copies of `layer` read; none for a layer that is local.
std::vector<int> owners_of(const FetchSchedule& schedule, const std::vector<std::vector<CopyOp>>& copies, int layer);

}  // namespace sidp::cache
