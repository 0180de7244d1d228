#include "placement.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

#include "error.hpp"

namespace sidp {

Placement::Placement(PlacementKind kind, std::vector<UnitLayout> units, int world_size, int resident_layers)
    : kind_(kind), units_(std::move(units)), world_size_(world_size) {
  SIDP_REQUIRE(!units_.empty(), ConfigError, "a pool needs at least one layer, got none");
  SIDP_REQUIRE(world_size >= 1, ConfigError, "world size must be 1 or more, got ", world_size);
  SIDP_REQUIRE(resident_layers >= 0 && resident_layers <= num_layers(), ConfigError, "resident_layers must be 0 ... ",
               num_layers(), " (the number of layers), got ", resident_layers);
  cycle_.assign(units_.size(), -1);
  owner_.assign(units_.size(), -1);
  choose_resident(resident_layers);
  if (kind_ == PlacementKind::layer) choose_owners();
  lay_out_shares();
}

std::size_t Placement::check(int layer) const {
  SIDP_REQUIRE(layer >= 0 && layer < num_layers(), ConfigError, "layer ", layer, " does not exist: the pool has layers 0 ... ",
               num_layers() - 1);
  return static_cast<std::size_t>(layer);
}

void Placement::choose_resident(int resident_layers) {
  const std::int64_t layers = num_layers();
  int pooled = 0;
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    const bool resident = (layer + 1) * resident_layers / layers > layer * resident_layers / layers;
    if (!resident) cycle_[layer] = pooled++ / world_size_;
  }
}

// In each cycle the largest unit goes to the owner that has least so far. Units of one size give owner = layer mod D.
void Placement::choose_owners() {
  std::vector<std::uint64_t> load(world_size_, 0);
  std::vector<int> pooled;
  for (int layer = 0; layer < num_layers(); ++layer)
    if (!resident(layer)) pooled.push_back(layer);
  for (std::size_t begin = 0; begin < pooled.size(); begin += world_size_) {
    const std::size_t end = std::min(pooled.size(), begin + world_size_);
    std::vector<int> layers(pooled.begin() + begin, pooled.begin() + end);
    std::stable_sort(layers.begin(), layers.end(),
                     [this](int a, int b) { return units_[a].bytes() > units_[b].bytes(); });
    std::vector<int> owners(world_size_);
    std::iota(owners.begin(), owners.end(), 0);
    std::stable_sort(owners.begin(), owners.end(), [&load](int a, int b) { return load[a] < load[b]; });
    for (std::size_t i = 0; i < layers.size(); ++i) {
      owner_[layers[i]] = owners[i];
      load[owners[i]] += units_[layers[i]].bytes();
    }
  }
}

void Placement::lay_out_shares() {
  arena_bytes_.assign(world_size_, 0);
  shares_.resize(units_.size());
  for (int layer = 0; layer < num_layers(); ++layer) {
    const UnitLayout& unit = units_[layer];
    for (int rank = 0; rank < world_size_; ++rank) {
      Extent extent;
      extent.owner = rank;
      extent.offset = arena_bytes_[rank];
      if (resident(layer) || owner_[layer] == rank || world_size_ == 1) {
        extent.pieces = unit.whole();
      } else if (kind_ == PlacementKind::striped) {
        extent.pieces = unit.share(rank, world_size_, layer % world_size_);
      }
      extent.bytes = unit.extent_bytes(extent.pieces);
      arena_bytes_[rank] += extent.bytes;
      shares_[layer].push_back(std::move(extent));
    }
  }
}

bool Placement::local(int layer, int rank) const {
  return world_size_ == 1 || resident(layer) || owner(layer) == rank;
}

const Extent& Placement::share(int layer, int rank) const { return shares_.at(check(layer)).at(rank); }

std::uint64_t Placement::replicated_bytes() const {
  std::uint64_t sum = 0;
  for (const UnitLayout& unit : units_) sum += unit.bytes();
  return sum;
}

std::uint64_t Placement::largest_unit_bytes() const {
  std::uint64_t largest = 0;
  for (const UnitLayout& unit : units_) largest = std::max(largest, unit.bytes());
  return largest;
}

namespace {

CopyOp copy_piece(const UnitLayout& unit, const Extent& extent, const Piece& piece) {
  const TensorLayout& tensor = unit.tensor(piece.tensor);
  const std::uint64_t row_bytes = tensor.cols * tensor.element_bytes;
  CopyOp op;
  op.owner = extent.owner;
  op.source = extent.offset + piece.offset;
  op.target = tensor.offset + piece.row * row_bytes + piece.col * tensor.element_bytes;
  op.width = piece.cols * tensor.element_bytes;
  op.height = piece.rows;
  op.source_pitch = op.width;
  op.target_pitch = row_bytes;
  if (op.width == row_bytes) {
    op.width *= op.height;
    op.height = 1;
    op.source_pitch = op.target_pitch = op.width;
  }
  return op;
}

}  // namespace

std::vector<CopyOp> Placement::copies(int layer, int rank, bool from_own) const {
  const UnitLayout& unit = this->unit(layer);
  if (local(layer, rank) && !from_own) return {};
  SIDP_REQUIRE(!resident(layer), ConfigError, "layer ", layer, " is resident: it is never copied into a slot");
  if (kind_ == PlacementKind::layer) {
    const Extent& extent = share(layer, owner(layer));
    return {{extent.owner, extent.offset, 0, extent.bytes, 1, extent.bytes, extent.bytes}};
  }
  std::vector<CopyOp> ops;
  for (int step = 1; step <= world_size_; ++step) {
    const Extent& extent = share(layer, (rank + step) % world_size_);
    for (const Piece& piece : extent.pieces) ops.push_back(copy_piece(unit, extent, piece));
  }
  return ops;
}

}  // namespace sidp
