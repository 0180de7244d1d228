#include "moved_extent.hpp"

#include "../error.hpp"

namespace sidp::cache {

void move_copies(const FetchSchedule& schedule, std::vector<std::vector<CopyOp>>& copies, int from,
                 const std::vector<MovedExtent>& moved) {
  for (const MovedExtent& move : moved) {
    const int index = schedule.remote_index(move.layer);
    if (index < 0) continue;
    for (CopyOp& op : copies[index]) {
      if (op.owner != from) continue;
      SIDP_REQUIRE(op.source >= move.was, LayoutError, "layer ", move.layer, " is read at ", op.source,
                   " of its owner, before its extent at ", move.was);
      op.source = op.source - move.was + move.now;
      op.owner = move.to;
    }
  }
  for (int index = 0; index < schedule.num_remote(); ++index)
    for (const CopyOp& op : copies[index])
      SIDP_REQUIRE(op.owner != from, LayoutError, "layer ", schedule.layer(index), " is still read from rank ", from);
}

std::vector<int> owners_of(const FetchSchedule& schedule, const std::vector<std::vector<CopyOp>>& copies, int layer) {
  std::vector<int> found;
  const int index = schedule.remote_index(layer);
  if (index >= 0)
    for (const CopyOp& op : copies[index]) found.push_back(op.owner);
  return found;
}

}  // namespace sidp::cache
