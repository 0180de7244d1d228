// The CPU's copy engine: memcpy in slices from peer arenas, with optional caps that stand for a link's limits.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../placement.hpp"

namespace sidp::cache {

// Bytes per second; 0 means no cap. `link` bounds what this reader takes in, `owner` what one owner gives out to all of
// its readers together.
struct CopyLimits {
  double link = 0;
  double owner = 0;
};

// Where an owner's extents lie here, and the word its readers share to take turns on its egress (null: no turns).
struct Source {
  const std::byte* extents = nullptr;
  std::uint64_t* egress_clock = nullptr;
};

class CopyEngine {
 public:
  CopyEngine(std::vector<Source> sources, int rank, CopyLimits limits);

  // Runs the copies into `slot`. Looks between slices whether `epoch` still is `expected`; false when it gave up, or was
  // interrupted.
  bool run(const std::vector<CopyOp>& ops, std::byte* slot, const std::atomic<std::uint64_t>& epoch,
           std::uint64_t expected);

  // While it holds, a run ends at its next slice.
  void interrupt(bool on) { interrupted_.store(on); }

 private:
  using Clock = std::chrono::steady_clock;

  void copy_slice(const CopyOp& op, std::uint64_t row, std::uint64_t rows, std::uint64_t begin, std::uint64_t bytes,
                  std::byte* slot);
  Clock::time_point reserve(int owner, std::uint64_t bytes);

  std::vector<Source> sources_;
  int rank_;
  CopyLimits limits_;
  std::uint64_t slice_bytes_;
  Clock::time_point link_free_at_{};
  std::atomic<bool> interrupted_{false};
};

}  // namespace sidp::cache
