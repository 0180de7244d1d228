#include "copy_engine.hpp"

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "../atomics.hpp"

namespace sidp::cache {

namespace {

constexpr std::uint64_t kSliceBytes = std::uint64_t{4} << 20;
constexpr std::uint64_t kSmallestSlice = std::uint64_t{16} << 10;
// A capped copy sleeps once a slice: a millisecond is coarse enough for the scheduler and fine enough to share fairly.
constexpr double kCappedSliceSeconds = 1e-3;
constexpr std::chrono::milliseconds kNap{5};

std::uint64_t slice_for(const CopyLimits& limits) {
  double slowest = 0;
  for (double rate : {limits.link, limits.owner})
    if (rate > 0 && (slowest == 0 || rate < slowest)) slowest = rate;
  if (slowest == 0) return kSliceBytes;
  return std::clamp(static_cast<std::uint64_t>(slowest * kCappedSliceSeconds), kSmallestSlice, kSliceBytes);
}

}  // namespace

CopyEngine::CopyEngine(std::vector<Source> sources, int rank, CopyLimits limits)
    : sources_(std::move(sources)), rank_(rank), limits_(limits), slice_bytes_(slice_for(limits)) {}

// Takes the next free turn of `bytes` on this reader's link and on the owner's egress; returns when the turn is over.
CopyEngine::Clock::time_point CopyEngine::reserve(int owner, std::uint64_t bytes) {
  const Clock::time_point now = Clock::now();
  Clock::time_point done = now;
  if (owner == rank_) return done;
  if (limits_.link > 0) {
    const auto turn = std::chrono::duration<double>(static_cast<double>(bytes) / limits_.link);
    link_free_at_ = std::max(now, link_free_at_) + std::chrono::duration_cast<Clock::duration>(turn);
    done = link_free_at_;
  }
  std::uint64_t* clock = sources_[owner].egress_clock;
  if (limits_.owner > 0 && clock != nullptr) {
    const auto turn = static_cast<std::uint64_t>(static_cast<double>(bytes) / limits_.owner * 1e9);
    const auto now_ns = static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(now.time_since_epoch()).count());
    std::uint64_t free_at = load_acquire(clock);
    std::uint64_t end = 0;
    do {
      end = std::max(now_ns, free_at) + turn;
    } while (!compare_exchange(clock, free_at, end));
    done = std::max(done, Clock::time_point(std::chrono::nanoseconds(end)));
  }
  return done;
}

void CopyEngine::copy_slice(const CopyOp& op, std::uint64_t row, std::uint64_t rows, std::uint64_t begin,
                            std::uint64_t bytes, std::byte* slot) {
  const std::byte* source = sources_[op.owner].extents + op.source + begin;
  std::byte* target = slot + op.target + begin;
  for (std::uint64_t r = row; r < row + rows; ++r)
    std::memcpy(target + r * op.target_pitch, source + r * op.source_pitch, bytes);
}

bool CopyEngine::run(const std::vector<CopyOp>& ops, std::byte* slot, const std::atomic<std::uint64_t>& epoch,
                     std::uint64_t expected) {
  const auto goes_on = [&] { return epoch.load() == expected && !interrupted_.load(); };
  for (const CopyOp& op : ops) {
    const std::uint64_t rows = op.height == 1 ? 1 : std::max<std::uint64_t>(1, slice_bytes_ / op.width);
    const std::uint64_t span = op.height == 1 ? slice_bytes_ : op.width;
    for (std::uint64_t row = 0; row < op.height; row += rows) {
      for (std::uint64_t begin = 0; begin < op.width; begin += span) {
        if (!goes_on()) return false;
        const std::uint64_t count = std::min(rows, op.height - row);
        const std::uint64_t bytes = std::min(span, op.width - begin);
        const Clock::time_point done = reserve(op.owner, count * bytes);
        copy_slice(op, row, count, begin, bytes, slot);
        // In short naps, so that a slow link does not keep a stop or a new plan waiting.
        while (done > Clock::now() && goes_on())
          std::this_thread::sleep_until(std::min(done, Clock::now() + kNap));
      }
    }
  }
  return goes_on();
}

}  // namespace sidp::cache
