#include "cpu_requester.hpp"

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "futex.hpp"

namespace sidp::cas::cpu {

namespace {

using Clock = std::chrono::steady_clock;

constexpr double kSpinSeconds = 20e-6;
// A sleeping requester looks this often whether the owner still lives.
constexpr double kLookAroundSeconds = 0.02;

const char* status_text(std::uint32_t status) {
  switch (static_cast<Status>(status)) {
    case Status::kOk: return "ok";
    case Status::kBadSequence: return "a sequence number out of order";
    case Status::kBadPool: return "another pool's request";
    case Status::kBadLayer: return "a layer that it does not hold";
    case Status::kBadRows: return "a number of rows out of range";
    case Status::kBadHidden: return "another hidden size";
    case Status::kBadDtype: return "another dtype or unknown flags";
    case Status::kServerError: return "a failure of its server";
  }
  return "an unknown status";
}

}  // namespace

CpuRequester::CpuRequester(RequesterOptions options) : options_(std::move(options)) {
  const Geometry& geometry = options_.geometry;
  check_geometry(geometry, options_.rank);
  SIDP_REQUIRE(options_.regions.size() == geometry.world, ConfigError, "the requester needs ", geometry.world,
               " mailbox regions, got ", options_.regions.size());
  for (const RemoteLayer& layer : options_.layers) {
    check_row(geometry, layer.hidden, element_bytes(layer.dtype), options_.striped);
    SIDP_REQUIRE(layer.hidden == 0 || options_.striped ||
                     (layer.owner >= 0 && static_cast<std::uint32_t>(layer.owner) < geometry.world),
                 ConfigError, "owner ", layer.owner, " of a remote layer is no rank of the group");
  }
  for (std::uint32_t rank = 0; rank < geometry.world; ++rank) {
    regions_.emplace_back(options_.regions[rank], geometry);
    if (static_cast<int>(rank) != options_.rank) regions_[rank].check_header(static_cast<int>(rank), options_.pool_id);
    if (options_.striped && rank > 0) {
      channels_[0]->owners.push_back(static_cast<int>(rank));
    } else {
      channels_.push_back(std::make_unique<Channel>());
      channels_.back()->owners.push_back(static_cast<int>(rank));
    }
  }
}

const RemoteLayer& CpuRequester::layer_at(int layer) const {
  SIDP_REQUIRE(layer >= 0 && static_cast<std::size_t>(layer) < options_.layers.size() && options_.layers[layer].hidden > 0,
               ConfigError, "layer ", layer, " cannot be reached by CaS");
  return options_.layers[layer];
}

CpuRequester::Ticket CpuRequester::submit(int layer, const std::byte* x, std::byte* y, std::uint64_t rows,
                                          double timeout_s) {
  const RemoteLayer& remote = layer_at(layer);
  const int number = options_.striped ? 0 : remote.owner;
  Channel& channel = *channels_[number];
  const std::lock_guard<std::mutex> lock(channel.mutex);
  if (channel.fault_rank >= 0) throw PeerError(channel.fault_rank, channel.fault);
  const Deadline deadline = Deadline::after(timeout_s);
  const std::uint64_t row_bytes = remote.hidden * element_bytes(remote.dtype);
  ++channel.submits;
  for (std::uint64_t row = 0; row < rows; row += options_.geometry.max_rows) {
    while (!slot_is_free(channel.pushed + 1, channel.consumed, options_.geometry.slots))  // R1
      drain(channel, deadline, timeout_s);
    const auto count = static_cast<std::uint32_t>(std::min<std::uint64_t>(options_.geometry.max_rows, rows - row));
    push(channel, layer, x + row * row_bytes, y + row * row_bytes, count);
  }
  return {number, rows == 0 ? 0 : channel.pushed};
}

void CpuRequester::push(Channel& channel, int layer, const std::byte* x, std::byte* y, std::uint32_t rows) {
  const std::uint64_t sequence = channel.pushed + 1;
  for (int owner : channel.owners) check_owner(channel, owner);
  bool woke = false;
  for (int owner : channel.owners) {  // R1b
    DoorbellLine* line = regions_[owner].doorbell();
    woke = wake_ahead(&line->bell, &line->sleeping) || woke;
  }
  for (int owner : channel.owners) write_request(owner, sequence, layer, x, rows);
  channel.pushed = sequence;
  channel.pieces.push_back({sequence, channel.submits, static_cast<std::uint32_t>(layer), rows, y, woke});
  if (options_.activity != nullptr) fetch_add(options_.activity, 1);
  const std::lock_guard<std::mutex> lock(stats_mutex_);
  stats_.requests += channel.owners.size();
  stats_.rows += rows;
}

void CpuRequester::write_request(int owner, std::uint64_t sequence, int layer, const std::byte* x, std::uint32_t rows) {
  const RemoteLayer& remote = options_.layers[layer];
  const Region& region = regions_[owner];
  const auto self = static_cast<std::uint32_t>(options_.rank);
  const std::uint32_t slot = slot_of(sequence, options_.geometry.slots);
  const std::uint64_t row_bytes = remote.hidden * element_bytes(remote.dtype);
  if (owner != options_.rank) take_turn(rows * row_bytes);
  for (std::uint32_t row = 0; row < rows; ++row)  // R2
    std::memcpy(region.request_row(self, slot, row), x + row * row_bytes, row_bytes);
  RequestRecord record{};  // R3
  record.sequence = sequence;
  record.pool_id = options_.pool_id;
  record.layer = static_cast<std::uint32_t>(layer);
  record.rows = rows;
  record.hidden = remote.hidden;
  record.dtype = static_cast<std::uint16_t>(remote.dtype);
  record.flags = options_.striped ? kReplyFloat32 : std::uint16_t{0};
  std::memcpy(region.request(self, slot), &record, sizeof(record));
  store_release(&region.tail(self)->sequence, sequence);  // R4
  ring_bell(&region.doorbell()->bell, &region.doorbell()->sleeping);  // R4b
}

void CpuRequester::finish(const Ticket& ticket, double timeout_s) {
  Channel& channel = *channels_.at(static_cast<std::size_t>(ticket.channel));
  const std::lock_guard<std::mutex> lock(channel.mutex);
  const Deadline deadline = Deadline::after(timeout_s);
  while (channel.consumed < ticket.sequence) {
    if (channel.fault_rank >= 0) throw PeerError(channel.fault_rank, channel.fault);
    drain(channel, deadline, timeout_s);
  }
}

// R5 to R7 for the oldest piece of the channel.
void CpuRequester::drain(Channel& channel, const Deadline& deadline, double timeout_s) {
  const Piece piece = channel.pieces.front();
  const auto begin = Clock::now();
  for (int owner : channel.owners) wait_for_reply(channel, owner, piece, deadline, timeout_s);
  const std::uint32_t slot = slot_of(piece.sequence, options_.geometry.slots);
  int refusing = -1;
  std::uint32_t status = 0;
  {
    const std::lock_guard<std::mutex> lock(stats_mutex_);
    stats_.wait_seconds += std::chrono::duration<double>(Clock::now() - begin).count();
    for (int owner : channel.owners) {
      const ReplyRecord& reply = *regions_[options_.rank].reply(owner, slot);
      note(reply, owner == channel.owners.front());
      if (refusing < 0 && (reply.status != 0 || reply.rows != piece.rows)) refusing = owner, status = reply.status;
    }
  }
  if (refusing < 0 && piece.target != nullptr) read_rows(channel, piece);  // R6
  channel.pieces.pop_front();
  channel.consumed = piece.sequence;  // R7
  if (refusing < 0 || piece.target == nullptr) return;
  for (Piece& later : channel.pieces)
    if (later.submit == piece.submit) later.target = nullptr;
  const std::string text = detail::concat("rank ", refusing, " refused request ", piece.sequence, " for layer ", piece.layer,
                                          " because of ", status_text(status));
  if (static_cast<Status>(status) == Status::kServerError) throw PeerError(refusing, text);
  throw LayoutError(text);
}

void CpuRequester::note(const ReplyRecord& reply, bool first) {
  stats_.refused += reply.status != 0;
  if (first) stats_.fused_rows += reply.batch_rows;
  stats_.service_seconds += static_cast<double>(reply.service_ns) * 1e-9;
}

// R5.
void CpuRequester::wait_for_reply(Channel& channel, int owner, const Piece& piece, const Deadline& deadline, double timeout_s) {
  const std::uint64_t sequence = piece.sequence;
  const Region& own = regions_[options_.rank];
  const std::uint64_t* word = &own.reply(owner, slot_of(sequence, options_.geometry.slots))->sequence;
  const auto spin_end = Clock::now() + std::chrono::duration<double>(kSpinSeconds);
  bool spinning = !piece.woke;  // an owner that wakes may want this very core
  for (;;) {
    const std::uint64_t seen = load_acquire(word);
    if (seen == sequence) return;
    if (seen > sequence) fail(channel, owner, detail::concat("answered request ", seen, " where ", sequence, " was due"));
    if (spinning) {
      for (int i = 0; i < 16; ++i) relax();
      spinning = Clock::now() < spin_end;
      continue;
    }
    check_owner(channel, owner);
    if (deadline.expired()) fail(channel, owner, detail::concat("did not answer within ", timeout_s, " s"));
    DoorbellLine* line = own.doorbell();
    sleep_on_bell(&line->reply_bell, &line->waiting, std::min(kLookAroundSeconds, deadline.remaining()),
                  [&] { return load_acquire(word) >= sequence; });
  }
}

void CpuRequester::check_owner(Channel& channel, int owner) {
  if (owner == options_.rank) return;
  if (static_cast<std::size_t>(owner) < options_.phases.size() && options_.phases[owner] != nullptr &&
      load_acquire(options_.phases[owner]) == static_cast<std::uint32_t>(ArenaPhase::failed))
    fail(channel, owner, "raised an error and left");
  if (options_.watch == nullptr) return;
  const PeerState state = options_.watch->state(owner);
  if (state == PeerState::dead) fail(channel, owner, "died");
  if (state == PeerState::closed) fail(channel, owner, "closed the pool");
}

// The channel ends here: what is under way may still arrive and must not be taken for something else.
void CpuRequester::fail(Channel& channel, int owner, const std::string& why) {
  channel.pieces.clear();
  channel.fault_rank = owner;
  channel.fault = detail::concat("rank ", owner, " ", why, " while this rank asked it to compute (CaS): its share of the "
                                 "weights is out of reach; close the pool and start the group again");
  throw PeerError(owner, channel.fault);
}

// R6. In `striped` the partial sums are added in the order of the owners, so that the result does not depend on who
// answered first.
void CpuRequester::read_rows(const Channel& channel, const Piece& piece) {
  const RemoteLayer& remote = options_.layers[piece.layer];
  const Region& own = regions_[options_.rank];
  const std::uint32_t slot = slot_of(piece.sequence, options_.geometry.slots);
  const std::uint64_t row_bytes = remote.hidden * element_bytes(remote.dtype);
  if (!options_.striped) {
    const int owner = channel.owners.front();
    if (owner != options_.rank) take_turn(piece.rows * row_bytes);
    for (std::uint32_t row = 0; row < piece.rows; ++row)
      std::memcpy(piece.target + row * row_bytes, own.reply_row(owner, slot, row), row_bytes);
    return;
  }
  take_turn((channel.owners.size() - 1) * piece.rows * remote.hidden * sizeof(float));
  std::vector<float> sum(remote.hidden);
  for (std::uint32_t row = 0; row < piece.rows; ++row) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int owner : channel.owners) {
      const auto* part = reinterpret_cast<const float*>(own.reply_row(owner, slot, row));
      for (std::uint32_t i = 0; i < remote.hidden; ++i) sum[i] += part[i];
    }
    from_float(sum.data(), remote.dtype, remote.hidden, piece.target + row * row_bytes);
  }
}

// Waits as long as `bytes` take on the capped link.
void CpuRequester::take_turn(std::uint64_t bytes) {
  if (options_.link_bytes_per_s <= 0) return;
  Clock::time_point done;
  {
    const std::lock_guard<std::mutex> lock(link_mutex_);
    const auto turn = std::chrono::duration<double>(static_cast<double>(bytes) / options_.link_bytes_per_s);
    link_free_at_ = std::max(Clock::now(), link_free_at_) + std::chrono::duration_cast<Clock::duration>(turn);
    done = link_free_at_;
  }
  // The system wakes sleepers some 50 us late: short turns are spent looking at the clock.
  constexpr auto kLate = std::chrono::microseconds(100);
  if (done - Clock::now() > kLate) std::this_thread::sleep_until(done - kLate);
  while (Clock::now() < done) relax();
}

RequesterStats CpuRequester::stats() const {
  const std::lock_guard<std::mutex> lock(stats_mutex_);
  return stats_;
}

}  // namespace sidp::cas::cpu
