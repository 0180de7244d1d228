// move_extents() of either ring, as Python calls it: (layer, to, was, now) for each extent.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "moved_extent.hpp"

namespace sidp::cache {

template <typename Ring>
void move_extents_of(Ring& ring, int from, const std::vector<std::tuple<int, int, std::uint64_t, std::uint64_t>>& moved) {
  std::vector<MovedExtent> list;
  for (const auto& [layer, to, was, now] : moved) list.push_back({layer, to, was, now});
  const pybind11::gil_scoped_release released;
  ring.move_extents(from, list);
}

}  // namespace sidp::cache
