// Which rank holds which bytes of every unit. Pure arithmetic, the same on every rank.
#pragma once

#include <cstdint>
#include <vector>

#include "unit_layout.hpp"

namespace sidp {

enum class PlacementKind {
  layer,    // a unit is one extent; every cycle of D layers has one layer of each owner
  striped,  // a unit is D extents, each 1/D of the intermediate dimension
};

// `bytes` of a unit at `offset` of the owner's extent area.
struct Extent {
  int owner = 0;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  std::vector<Piece> pieces;
};

// One copy from an owner's extent area into a slot: `height` rows of `width` bytes.
struct CopyOp {
  int owner = 0;
  std::uint64_t source = 0;
  std::uint64_t target = 0;
  std::uint64_t width = 0;
  std::uint64_t height = 1;
  std::uint64_t source_pitch = 0;
  std::uint64_t target_pitch = 0;

  std::uint64_t bytes() const { return width * height; }
};

class Placement {
 public:
  // `resident_layers` layers, spread evenly, are kept whole by every rank and take no part in the cycles.
  Placement(PlacementKind kind, std::vector<UnitLayout> units, int world_size, int resident_layers);

  PlacementKind kind() const { return kind_; }
  int world_size() const { return world_size_; }
  int num_layers() const { return static_cast<int>(units_.size()); }
  const UnitLayout& unit(int layer) const { return units_.at(check(layer)); }

  bool resident(int layer) const { return cycle_.at(check(layer)) < 0; }
  // Number of the cycle of D layers that `layer` belongs to, -1 for a resident layer.
  int cycle(int layer) const { return cycle_.at(check(layer)); }
  // Owner of a layer in `layer` placement; -1 where every rank holds a part or the whole.
  int owner(int layer) const { return owner_.at(check(layer)); }
  // Whether `rank` can compute the layer from its own arena, without a fetch.
  bool local(int layer, int rank) const;

  // What `rank` holds of `layer`: an extent without bytes where it holds nothing.
  const Extent& share(int layer, int rank) const;
  std::uint64_t arena_bytes(int rank) const { return arena_bytes_.at(rank); }
  std::uint64_t replicated_bytes() const;
  std::uint64_t largest_unit_bytes() const;

  // The copies that bring `layer` into a slot of `rank`, the extents walked from the rank's own offset, so that ranks
  // in step read from different owners. The rank's own extent comes last.
  // A layer that the rank holds whole takes none, unless `from_own` asks for the copy out of its own arena (host tier).
  std::vector<CopyOp> copies(int layer, int rank, bool from_own = false) const;

 private:
  std::size_t check(int layer) const;
  void choose_resident(int resident_layers);
  void choose_owners();
  void lay_out_shares();

  PlacementKind kind_;
  std::vector<UnitLayout> units_;
  int world_size_;
  std::vector<int> cycle_;
  std::vector<int> owner_;
  std::vector<std::vector<Extent>> shares_;  // [layer][rank]
  std::vector<std::uint64_t> arena_bytes_;
};

}  // namespace sidp
