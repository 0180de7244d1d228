#include "cpu_server.hpp"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <utility>

#include "futex.hpp"

namespace sidp::cas::cpu {

namespace {

using Clock = std::chrono::steady_clock;

// A sleeping server looks around this often even if nobody rings: a requester that writes nonsense into the doorbell
// line can make it late, never deaf.
constexpr double kLookAroundSeconds = 0.5;

std::uint64_t nanoseconds_since(Clock::time_point begin) {
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count());
}

void count(std::atomic<std::uint64_t>& counter, std::uint64_t by = 1) { counter.fetch_add(by, std::memory_order_relaxed); }

}  // namespace

CpuServer::CpuServer(ServerOptions options, std::shared_ptr<const Blas> blas)
    : options_(std::move(options)), ffn_(blas), blas_(std::move(blas)), mailboxes_(options_.geometry.world) {
  const Geometry& geometry = options_.geometry;
  check_geometry(geometry, options_.rank);
  SIDP_REQUIRE(options_.regions.size() == geometry.world, ConfigError, "the server needs ", geometry.world,
               " mailbox regions, got ", options_.regions.size());
  std::uint32_t widest = 0;
  for (const FfnSlice& slice : options_.layers) {
    check_row(geometry, slice.hidden, element_bytes(slice.dtype), options_.striped);
    widest = std::max(widest, slice.hidden);
  }
  for (std::byte* region : options_.regions) regions_.emplace_back(region, geometry);
  x_.resize(std::size_t{kMaxBatchRows} * widest);
  y_.resize(x_.size());
  batch_.reserve(kMaxBatchRequests);

  // Signals are for the application's own threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { loop(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

CpuServer::~CpuServer() { stop(); }

void CpuServer::stop() {
  if (!stopping_.exchange(true)) {
    DoorbellLine* line = regions_[options_.rank].doorbell();
    __atomic_fetch_add(&line->bell, 1, __ATOMIC_SEQ_CST);
    futex_wake_all(&line->bell);
  }
  if (thread_.joinable()) thread_.join();
}

void CpuServer::loop() {
  pthread_setname_np(pthread_self(), "sidp-cas");
  blas_->use_threads(options_.blas_threads);
  while (!stopping_.load(std::memory_order_acquire)) {
    if (!look()) {
      wait_for_work();
    } else if (elect()) {
      serve();
    }
  }
}

// O1 for everybody; whether anything waits.
bool CpuServer::look() {
  bool waiting = false;
  for (std::uint32_t requester = 0; requester < mailboxes_.size(); ++requester) {
    Mailbox& box = mailboxes_[requester];
    if (!box.out) look_at(requester);
    waiting = waiting || (!box.out && box.served < box.tail);
  }
  return waiting;
}

void CpuServer::look_at(std::uint32_t requester) {
  Mailbox& box = mailboxes_[requester];
  const bool self = static_cast<int>(requester) == options_.rank;
  if (!self && options_.watch != nullptr && options_.watch->state(static_cast<int>(requester)) == PeerState::dead) {
    box.out = true;
    count(counters_.retired);
    return;
  }
  const std::uint64_t tail = load_acquire(&regions_[options_.rank].tail(requester)->sequence);
  if (tail < box.tail || tail - box.served > options_.geometry.slots) {
    box.out = true;
    count(counters_.broken);
    return;
  }
  box.tail = tail;
}

void CpuServer::wait_for_work() {
  const auto spin_end = Clock::now() + std::chrono::duration<double>(options_.spin_s);
  while (Clock::now() < spin_end) {
    if (stopping_.load(std::memory_order_acquire) || look()) return;
    for (int i = 0; i < 16; ++i) relax();
  }
  DoorbellLine* line = regions_[options_.rank].doorbell();
  // Set rather than counted: this thread alone sleeps here, and what a peer may have written there is mended.
  __atomic_store_n(&line->sleeping, 1, __ATOMIC_SEQ_CST);
  const std::uint32_t seen = __atomic_load_n(&line->bell, __ATOMIC_SEQ_CST);
  if (!stopping_.load() && !look()) {
    count(counters_.sleeps);
    futex_wait(&line->bell, seen, kLookAroundSeconds);
  }
  __atomic_store_n(&line->sleeping, 0, __ATOMIC_SEQ_CST);
}

// O3. False where there was nothing but malformed requests, which are answered then.
bool CpuServer::elect() {
  batch_.clear();
  rows_ = 0;
  const auto world = static_cast<std::uint32_t>(mailboxes_.size());
  for (std::uint32_t step = 0; step < world; ++step) {
    if (!batch_.empty() && !options_.fuse) break;
    gather((first_ + step) % world);
  }
  if (batch_.empty()) return false;
  first_ = (batch_.front().requester + 1) % world;
  return true;
}

// Takes what fits of one requester's waiting requests, in order. The first valid one of all chooses the unit.
void CpuServer::gather(std::uint32_t requester) {
  Mailbox& box = mailboxes_[requester];
  if (box.out) return;
  bool taken = false;  // answers of one requester stay in order: behind a taken request nothing is refused
  for (std::uint64_t sequence = box.served + 1; sequence <= box.tail; ++sequence) {
    const std::uint32_t slot = slot_of(sequence, options_.geometry.slots);
    const RequestRecord record = copy_record(requester, slot);
    const Status status = check(record, sequence);
    if (status != Status::kOk) {
      if (taken) return;
      refuse(requester, sequence, status);
      continue;
    }
    const bool first = batch_.empty();
    if (!first && (record.layer != layer_ || rows_ + record.rows > kMaxBatchRows || !options_.fuse ||
                   batch_.size() == kMaxBatchRequests))
      return;
    layer_ = record.layer;
    batch_.push_back({requester, slot, sequence, record.rows});
    rows_ += record.rows;
    taken = true;
  }
}

// O2: word by word, so that a requester that writes on meanwhile changes nothing after the check.
RequestRecord CpuServer::copy_record(std::uint32_t requester, std::uint32_t slot) const {
  const auto* words = reinterpret_cast<const std::uint64_t*>(regions_[options_.rank].request(requester, slot));
  std::uint64_t copy[sizeof(RequestRecord) / sizeof(std::uint64_t)];
  for (std::size_t i = 0; i < sizeof(RequestRecord) / sizeof(std::uint64_t); ++i) copy[i] = load_relaxed(words + i);
  RequestRecord record;
  std::memcpy(&record, copy, sizeof(record));
  return record;
}

Status CpuServer::check(const RequestRecord& record, std::uint64_t sequence) const {
  const bool known = record.layer < options_.layers.size();
  const FfnSlice none;
  const FfnSlice& slice = known ? options_.layers[record.layer] : none;
  return check_request(record, sequence, options_.pool_id, options_.geometry.max_rows, slice.hidden,
                       static_cast<std::uint16_t>(slice.dtype), options_.striped ? kReplyFloat32 : std::uint16_t{0});
}

void CpuServer::refuse(std::uint32_t requester, std::uint64_t sequence, Status status) {
  count(counters_.refused);
  answer({requester, slot_of(sequence, options_.geometry.slots), sequence, 0}, status, 0);
}

// O4 to O7 for the elected batch.
void CpuServer::serve() {
  const auto begin = Clock::now();
  const Status status = compute(options_.layers[layer_]);
  const std::uint64_t busy = nanoseconds_since(begin);
  // Counted before the answers go out: whoever has an answer finds it in the statistics.
  count(counters_.busy_ns, busy);
  count(counters_.batches);
  count(counters_.fused, batch_.size() > 1);
  count(counters_.requests, batch_.size());
  count(counters_.rows, rows_);
  for (const Item& item : batch_) answer(item, status, busy);
}

Status CpuServer::compute(const FfnSlice& slice) {
  const Region& own = regions_[options_.rank];
  const std::size_t hidden = slice.hidden;
  float* x = x_.data();
  for (const Item& item : batch_)  // O4
    for (std::uint32_t row = 0; row < item.rows; ++row, x += hidden)
      to_float(own.request_row(item.requester, item.slot, row), slice.dtype, hidden, x);
  try {
    ffn_.run(slice, x_.data(), rows_, y_.data());
  } catch (const std::exception& error) {  // out of memory for the scratch: the requesters learn of it, the server lives
    count(counters_.failures);
    const std::lock_guard<std::mutex> lock(failure_mutex_);
    last_failure_ = error.what();
    return Status::kServerError;
  }
  const float* y = y_.data();
  const Dtype dtype = options_.striped ? Dtype::kFloat32 : slice.dtype;
  for (const Item& item : batch_)  // O5
    for (std::uint32_t row = 0; row < item.rows; ++row, y += hidden)
      from_float(y, dtype, hidden, regions_[item.requester].reply_row(options_.rank, item.slot, row));
  return Status::kOk;
}

void CpuServer::answer(const Item& item, Status status, std::uint64_t service_ns) {
  const Region& region = regions_[item.requester];
  ReplyRecord* reply = region.reply(options_.rank, item.slot);
  reply->status = static_cast<std::uint32_t>(status);  // O6
  reply->rows = item.rows;
  reply->batch_rows = item.rows == 0 ? 0 : rows_;
  reply->batch_requests = item.rows == 0 ? 0 : static_cast<std::uint32_t>(batch_.size());
  reply->service_ns = service_ns;
  store_release(&reply->sequence, item.sequence);  // O7
  mailboxes_[item.requester].served = item.sequence;
  DoorbellLine* line = region.doorbell();
  ring_bell(&line->reply_bell, &line->waiting);  // O7b
}

ServerStats CpuServer::stats() const {
  const auto read = [](const std::atomic<std::uint64_t>& counter) { return counter.load(std::memory_order_relaxed); };
  ServerStats stats;
  stats.requests = read(counters_.requests);
  stats.rows = read(counters_.rows);
  stats.batches = read(counters_.batches);
  stats.fused_batches = read(counters_.fused);
  stats.refused = read(counters_.refused);
  stats.broken = read(counters_.broken);
  stats.retired = read(counters_.retired);
  stats.failures = read(counters_.failures);
  stats.sleeps = read(counters_.sleeps);
  stats.busy_seconds = static_cast<double>(read(counters_.busy_ns)) * 1e-9;
  const std::lock_guard<std::mutex> lock(failure_mutex_);
  stats.last_failure = last_failure_;
  return stats;
}

}  // namespace sidp::cas::cpu
