#include "ring.hpp"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "../atomics.hpp"
#include "../error.hpp"

namespace sidp::cache {

namespace {

// A wait wakes this often to see whether a peer died.
constexpr double kLookAroundSeconds = 0.02;

std::byte* map_memory(std::uint64_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  SIDP_REQUIRE(memory != MAP_FAILED, Error, "cannot map ", bytes, " bytes for the ring: ", std::strerror(errno),
               "; lower `slots` or free memory");
  return static_cast<std::byte*>(memory);
}

}  // namespace

Ring::Ring(const Placement& placement, int rank, std::vector<Source> sources, const std::atomic<int>* dead_rank,
           RingOptions options)
    : schedule_(placement, rank, options.slots, options.peak_shifting),
      engine_(std::move(sources), rank, options.limits),
      rank_(rank),
      dead_rank_(dead_rank),
      poison_(options.poison),
      activity_(options.activity),
      slot_stride_(0),
      words_(options.slots),
      queue_(schedule_),
      last_use_(options.slots, kNever),
      holds_(placement.num_layers()),
      user_of_slot_(options.slots, -1),
      content_(options.slots, -1) {
  for (int index = 0; index < schedule_.num_remote(); ++index) {
    const int layer = schedule_.layer(index);
    copies_.push_back(placement.copies(layer, rank));
    remote_bytes_.push_back(remote_bytes(index));
    slot_stride_ = std::max(slot_stride_, align_up(placement.unit(layer).bytes(), kSlotAlignment));
  }
  memory_ = map_memory(bytes());
  if (options.paused) pause();
  copy_thread_ = std::thread([this] { copy_loop(); });
}

Ring::~Ring() {
  stop();
  munmap(memory_, bytes());
}

void Ring::stop() {
  if (guard_.in_child()) {
    // Threads do not survive a fork: there is nothing to join.
    if (copy_thread_.joinable()) copy_thread_.detach();
    return;
  }
  if (!stopped_.exchange(true)) {
    epoch_.fetch_add(1);
    filled_.notify();
    emptied_.notify();
  }
  if (copy_thread_.joinable()) copy_thread_.join();
}

void Ring::pause() {
  if (!paused_.exchange(true)) pauses_.fetch_add(1, std::memory_order_relaxed);
}

void Ring::resume() {
  if (paused_.load(std::memory_order_relaxed) && paused_.exchange(false)) emptied_.notify();
}

std::uint64_t Ring::remote_bytes(int index) const {
  std::uint64_t remote = 0;
  for (const CopyOp& op : copies_[index]) remote += op.owner == rank_ ? 0 : op.bytes();
  return remote;
}

void Ring::move_extents(int from, const std::vector<MovedExtent>& moved) {
  check_open();
  engine_.interrupt(true);  // the copy thread lets go of the mutex at its next slice
  const std::lock_guard<std::mutex> lock(copies_mutex_);
  engine_.interrupt(false);
  move_copies(schedule_, copies_, from, moved);
  for (int index = 0; index < schedule_.num_remote(); ++index) remote_bytes_[index] = remote_bytes(index);
}

std::vector<int> Ring::owners(int layer) const {
  const std::lock_guard<std::mutex> lock(copies_mutex_);
  return owners_of(schedule_, copies_, layer);
}

void Ring::check_open() const {
  guard_.require("the weight pool");
  if (stopped_.load(std::memory_order_relaxed))
    throw PoolClosedError("the pool is closed: its weights are gone; make a new pool");
}

void Ring::check_usable() const {
  check_open();
  const int dead = dead_rank_ == nullptr ? -1 : dead_rank_->load(std::memory_order_acquire);
  if (dead >= 0)
    throw PeerError(dead, detail::concat("rank ", dead, " died: its weights are lost; close the pool and start the group again"));
}

void Ring::acquire(int layer, double timeout_s) {
  check_open();
  const bool tracing = trace_.on();
  const int index = schedule_.remote_index(layer);
  if (index >= 0) {  // a layer that is here needs nobody, whoever has died
    check_usable();
    resume();
    std::uint64_t ticket = 0;
    if (!claim(index, ticket)) return;
    wait_ready(layer, schedule_.slot(index), ticket, timeout_s);
  }
  if (tracing) holds_[layer].since = Trace::Clock::now();
}

// Numbers this use and makes the plan fit it. False when the layer is in use already, so nothing has to be waited for.
bool Ring::claim(int index, std::uint64_t& ticket) {
  std::lock_guard<std::mutex> lock(plan_mutex_);
  const int layer = schedule_.layer(index);
  const int slot = schedule_.slot(index);
  Hold& hold = holds_[layer];
  if (hold.count > 0) {
    ++hold.count;
    return false;
  }
  SIDP_REQUIRE(user_of_slot_[slot] < 0, ConfigError, "layer ", layer, " shares slot ", slot, " with layer ",
               user_of_slot_[slot], ", which is still in use: release it first, or use more than ", schedule_.slots(),
               " slots");
  if (queue_.expected_index(next_ticket_) != index) {
    next_ticket_ = queue_.restart(index, last_use_);
    epoch_.fetch_add(1);
    restarts_.fetch_add(1, std::memory_order_relaxed);
    emptied_.notify();
  }
  ticket = next_ticket_++;
  if (activity_ != nullptr) store_relaxed(activity_, next_ticket_);
  hold.count = 1;
  hold.ticket = ticket;
  last_use_[slot] = ticket;
  user_of_slot_[slot] = layer;
  return true;
}

void Ring::wait_ready(int layer, int slot, std::uint64_t ticket, double timeout_s) {
  std::atomic<std::uint64_t>& ready = words_[slot].ready;
  if (ready.load(std::memory_order_acquire) > ticket) return;
  const auto begin = Trace::Clock::now();
  const Deadline deadline = Deadline::after(timeout_s);
  try {
    while (ready.load() <= ticket) {
      check_usable();
      SIDP_REQUIRE(!deadline.expired(), Error, "layer ", layer, " did not arrive within ", timeout_s,
                   " s: the copy thread is stalled; raise timeout_s or the link's cap");
      filled_.wait(Deadline::after(std::min(kLookAroundSeconds, deadline.remaining())),
                   [&] { return ready.load() > ticket || stopped_.load(); });
    }
  } catch (...) {
    release_slot(schedule_.remote_index(layer));
    throw;
  }
  const auto end = Trace::Clock::now();
  stalls_.fetch_add(1, std::memory_order_relaxed);
  stall_ns_.fetch_add(std::chrono::duration_cast<std::chrono::nanoseconds>(end - begin).count(),
                      std::memory_order_relaxed);
  if (trace_.on()) trace_.add(TraceEvent::Kind::stall, layer, slot, begin, end);
}

void Ring::release(int layer) {
  const int index = schedule_.remote_index(layer);
  if (trace_.on())
    trace_.add(TraceEvent::Kind::compute, layer, index < 0 ? -1 : schedule_.slot(index), holds_[layer].since,
               Trace::Clock::now());
  if (index >= 0) release_slot(index);
}

void Ring::release_slot(int index) {
  const int slot = schedule_.slot(index);
  const int layer = schedule_.layer(index);
  {
    std::lock_guard<std::mutex> lock(plan_mutex_);
    Hold& hold = holds_[layer];
    SIDP_REQUIRE(hold.count > 0, ConfigError, "layer ", layer, " was released without being acquired");
    if (--hold.count > 0) return;
    user_of_slot_[slot] = -1;
    words_[slot].released.store(hold.ticket + 1);
  }
  emptied_.notify();
}

void Ring::copy_loop() {
  while (!stopped_.load()) {
    Fetch fetch;
    std::uint64_t epoch;
    {
      std::lock_guard<std::mutex> lock(plan_mutex_);
      fetch = queue_.next();
      epoch = epoch_.load();
    }
    if (!wait_released(fetch, epoch)) continue;
    wait_resumed();
    bool there = content_[fetch.slot] == fetch.index;
    // An interrupted copy is done again, from where the bytes lie now.
    while (!there && epoch_.load() == epoch && !(there = fill(fetch, epoch))) std::this_thread::yield();
    if (!there) continue;
    words_[fetch.slot].ready.store(fetch.ticket + 1);
    filled_.notify();
  }
}

void Ring::wait_resumed() {
  while (paused_.load() && !stopped_.load())
    emptied_.wait(Deadline::after(1.0), [&] { return !paused_.load() || stopped_.load(); });
}

// False when the plan was made anew, or the ring stopped, before the slot was free.
bool Ring::wait_released(const Fetch& fetch, std::uint64_t epoch) {
  if (fetch.after == kNever) return true;
  const std::atomic<std::uint64_t>& released = words_[fetch.slot].released;
  for (;;) {
    // A stop may have come before `epoch` was read: the epoch alone would not tell of it.
    if (epoch_.load() != epoch || stopped_.load()) return false;
    if (released.load() > fetch.after) return true;
    emptied_.wait(Deadline::after(1.0),
                  [&] { return released.load() > fetch.after || epoch_.load() != epoch || stopped_.load(); });
  }
}

bool Ring::fill(const Fetch& fetch, std::uint64_t epoch) {
  std::byte* slot = slot_address(fetch.slot);
  const auto begin = Trace::Clock::now();
  content_[fetch.slot] = -1;
  const std::lock_guard<std::mutex> lock(copies_mutex_);
  if (poison_) std::memset(slot, 0xff, slot_stride_);
  if (!engine_.run(copies_[fetch.index], slot, epoch_, epoch)) return false;
  content_[fetch.slot] = fetch.index;
  fetches_.fetch_add(1, std::memory_order_relaxed);
  fetch_ns_.fetch_add(
      std::chrono::duration_cast<std::chrono::nanoseconds>(Trace::Clock::now() - begin).count(),
      std::memory_order_relaxed);
  fetched_bytes_.fetch_add(remote_bytes_[fetch.index], std::memory_order_relaxed);
  if (trace_.on())
    trace_.add(TraceEvent::Kind::fetch, schedule_.layer(fetch.index), fetch.slot, begin, Trace::Clock::now());
  return true;
}

RingStats Ring::stats() const {
  RingStats stats;
  stats.fetches = fetches_.load(std::memory_order_relaxed);
  stats.fetched_bytes = fetched_bytes_.load(std::memory_order_relaxed);
  stats.stalls = stalls_.load(std::memory_order_relaxed);
  stats.stall_seconds = static_cast<double>(stall_ns_.load(std::memory_order_relaxed)) * 1e-9;
  stats.restarts = restarts_.load(std::memory_order_relaxed);
  stats.fetch_seconds = static_cast<double>(fetch_ns_.load(std::memory_order_relaxed)) * 1e-9;
  stats.pauses = pauses_.load(std::memory_order_relaxed);
  return stats;
}

}  // namespace sidp::cache
