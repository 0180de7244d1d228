// Where the copies of every unit read and write: the part of the CUDA ring that knows addresses.
#include <algorithm>
#include <utility>

#include "../atomics.hpp"
#include "../error.hpp"
#include "cuda_ring.hpp"

namespace sidp::cache {
namespace {

// A copy of many rows is cut between rows, one long row within it.
void add_slices(std::vector<DeviceCopy>& list, const DeviceCopy& copy, std::uint64_t slice_bytes) {
  if (slice_bytes == 0 || copy.width * copy.height <= slice_bytes) {
    list.push_back(copy);
    return;
  }
  const std::uint64_t rows = copy.height == 1 ? 1 : std::max<std::uint64_t>(1, slice_bytes / copy.width);
  const std::uint64_t span = copy.height == 1 ? slice_bytes : copy.width;
  for (std::uint64_t row = 0; row < copy.height; row += rows)
    for (std::uint64_t begin = 0; begin < copy.width; begin += span)
      list.push_back({copy.source + row * copy.source_pitch + begin, copy.target + row * copy.target_pitch + begin,
                      std::min(span, copy.width - begin), std::min(rows, copy.height - row), copy.source_pitch,
                      copy.target_pitch});
}

}  // namespace

void CudaRing::lay_out(const Placement& placement) {
  std::vector<DeviceUnit> units;
  for (int index = 0; index < schedule_.num_remote(); ++index) {
    const int layer = schedule_.layer(index);
    ops_.push_back(placement.copies(layer, schedule_.rank(), true));
    std::uint64_t total = 0, needed = 0;
    for (const CopyOp& op : ops_.back()) total += op.bytes();
    for (const TensorLayout& tensor : placement.unit(layer).tensors()) needed += tensor.bytes();
    SIDP_ASSERT(total >= needed, "the copies of layer ", layer, " bring ", total, " of ", needed, " bytes");
    const std::uint32_t first = units.empty() ? 0 : units.back().first_copy + units.back().copies;
    units.push_back({first, static_cast<std::uint32_t>(ops_.back().size())});
    slot_stride_ = std::max(slot_stride_, align_up(placement.unit(layer).bytes(), kSlotAlignment));
  }
  const std::vector<DeviceCopy> table = resolve();
  copy_table_ = DeviceMemory(table.size() * sizeof(DeviceCopy));
  unit_table_ = DeviceMemory(units.size() * sizeof(DeviceUnit));
  SIDP_CUDA_CHECK(cudaMemcpy(copy_table_.as<void>(), table.data(), table.size() * sizeof(DeviceCopy), cudaMemcpyHostToDevice));
  SIDP_CUDA_CHECK(cudaMemcpy(unit_table_.as<void>(), units.data(), units.size() * sizeof(DeviceUnit), cudaMemcpyHostToDevice));
}

Turn CudaRing::turn_at(int owner) const {
  const auto place = static_cast<std::size_t>(owner);
  if (place >= options_.turns.size() || options_.turns[place] == nullptr) return {};
  return {options_.turns[place], held_word(owner), host_.as<HostWords>()};
}

// The copies of every unit by address: sliced for the copy engine, and returned as one table for the repairing kernel.
std::vector<DeviceCopy> CudaRing::resolve() {
  std::vector<DeviceCopy> table;
  copies_.clear();
  remote_bytes_.clear();
  for (const std::vector<CopyOp>& ops : ops_) {
    UnitCopies unit;
    std::uint64_t remote = 0;
    for (const CopyOp& op : ops) {
      // No extent lies on both sides of its owner's cut.
      const bool spilled = !options_.cuts.empty() && op.source >= options_.cuts.at(op.owner);
      const std::uint8_t* source = spilled ? options_.host_sources.at(op.owner) + (op.source - options_.cuts[op.owner])
                                           : sources_.at(op.owner) + op.source;
      const DeviceCopy copy{source, op.target, op.width, op.height, op.source_pitch, op.target_pitch};
      table.push_back(copy);
      const bool own = op.owner == schedule_.rank() && !options_.own_is_remote && !spilled;
      std::vector<OwnerCopies>& list = own ? unit.own : unit.remote;
      const Turn turn = own || spilled ? Turn{} : turn_at(op.owner);
      if (list.empty() || list.back().owner != op.owner || list.back().turn.words != turn.words) list.push_back({op.owner, turn, {}});
      add_slices(list.back().copies, copy, options_.slice_bytes);
      if (!own) remote += op.bytes();
    }
    copies_.push_back(std::move(unit));
    remote_bytes_.push_back(remote);
  }
  return table;
}

void CudaRing::move_extents(int from, const std::vector<MovedExtent>& moved) {
  std::lock_guard<std::mutex> lock(mutex_);
  check_open();
  for (const MovedExtent& move : moved)
    SIDP_REQUIRE(move.to >= 0 && static_cast<std::size_t>(move.to) < sources_.size(), LayoutError, "layer ", move.layer,
                 " would be read from area ", move.to, " of ", sources_.size());
  const DeviceGuard guard(options_.device);
  store_release(&host_.as<HostWords>()->turns_off, 1);  // the lost rank may have been in its turn, or wait for one
  move_copies(schedule_, ops_, from, moved);
  const std::vector<DeviceCopy> table = resolve();
  // In place, for graphs that exist: a kernel that reads the table meanwhile finds the old address or the new one, whole, and
  // the same weights at both. The call has read `table`, which is pageable, when it returns.
  const RelaxedCapture relaxed;
  SIDP_CUDA_CHECK(cudaMemcpyAsync(copy_table_.as<void>(), table.data(), table.size() * sizeof(DeviceCopy),
                                  cudaMemcpyHostToDevice, copy_stream_.get()));
}

std::vector<int> CudaRing::owners(int layer) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return owners_of(schedule_, ops_, layer);
}

}  // namespace sidp::cache
