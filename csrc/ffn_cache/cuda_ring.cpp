#include "cuda_ring.hpp"

#include <algorithm>

#include "../atomics.hpp"
#include "../error.hpp"
#include "cuda_capture.hpp"

namespace sidp::cache {
namespace {

constexpr std::size_t kCapturesKept = 8;

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  SIDP_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  SIDP_REQUIRE(status != cudaStreamCaptureStatusInvalidated, Error, "the stream's capture was invalidated by an earlier error");
  return status == cudaStreamCaptureStatusActive;
}

void copy_to(std::uint8_t* slot, const DeviceCopy& copy, cudaStream_t stream) {
  if (copy.height == 1)
    SIDP_CUDA_CHECK(cudaMemcpyAsync(slot + copy.target, copy.source, copy.width, cudaMemcpyDefault, stream));
  else
    SIDP_CUDA_CHECK(cudaMemcpy2DAsync(slot + copy.target, copy.target_pitch, copy.source, copy.source_pitch, copy.width,
                                      copy.height, cudaMemcpyDefault, stream));
}

void copy_to(std::uint8_t* slot, const std::vector<OwnerCopies>& list, cudaStream_t stream) {
  for (const OwnerCopies& from : list) {
    if (from.turn.words != nullptr) launch_turn(TurnEdge::begin, from.turn, stream);
    for (const DeviceCopy& copy : from.copies) copy_to(slot, copy, stream);
    if (from.turn.words != nullptr) launch_turn(TurnEdge::end, from.turn, stream);
  }
}

}  // namespace

CudaRing::CudaRing(const Placement& placement, int rank, const std::vector<const std::uint8_t*>& sources,
                   const std::atomic<int>* dead_rank, const CudaRingOptions& options)
    : schedule_(placement, rank, options.slots, options.peak_shifting, options.local),
      options_(options),
      dead_rank_(dead_rank),
      sources_(sources),
      ready_(options.slots),
      used_(options.slots),
      plan_(schedule_),
      content_(options.slots, -1),
      ready_generation_(options.slots, 0),
      used_generation_(options.slots, 0),
      open_mark_(placement.num_layers(), -1) {
  const DeviceGuard guard(options_.device);
  host_ = MappedHostMemory(sizeof(HostWords));
  held_words_ = DeviceMemory(std::max<std::size_t>(1, sources_.size()) * sizeof(std::uint32_t));
  SIDP_CUDA_CHECK(cudaMemset(held_word(0), 0, sources_.size() * sizeof(std::uint32_t)));
  lay_out(placement);
  const auto slots = static_cast<std::size_t>(options_.slots);
  slots_ = DeviceMemory(bytes());
  words_ = DeviceMemory((2 + 2 * slots) * sizeof(std::uint64_t));
  arrivals_ = DeviceMemory(kMostEnsured * sizeof(std::uint32_t));
  content_words_ = DeviceMemory(slots * sizeof(std::int32_t));
  SIDP_CUDA_CHECK(cudaMemset(content_word(0), 0xff, slots * sizeof(std::int32_t)));
  index_words_ = MappedHostMemory(static_cast<std::size_t>(schedule_.num_remote()) * sizeof(std::int32_t));
  for (int index = 0; index < schedule_.num_remote(); ++index) index_words_.as<std::int32_t>()[index] = index;
  preload_ring_kernels();
  preload_turn_kernels();
  SIDP_CUDA_CHECK(cudaDeviceSynchronize());
  issue(nullptr);
}

CudaRing::~CudaRing() {
  try {
    stop();
  } catch (const std::exception&) {
    // The context is lost; there is nothing left to wait for.
  }
}

void CudaRing::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopped_) return;
    stopped_ = true;
  }
  store_release(&host_.as<HostWords>()->abort, 1);
  const DeviceGuard guard(options_.device);
  SIDP_CUDA_CHECK(cudaDeviceSynchronize());
}

void CudaRing::check_open() const {
  if (stopped_) throw PoolClosedError("the pool is closed: its weights are gone; make a new pool");
}

void CudaRing::check_usable() const {
  check_open();
  const int dead = dead_rank_ == nullptr ? -1 : dead_rank_->load(std::memory_order_acquire);
  if (dead >= 0)
    throw PeerError(dead, detail::concat("rank ", dead, " died: its weights are lost; close the pool and start the group again"));
  SIDP_REQUIRE(load_relaxed(&host_.as<HostWords>()->fault) == 0, Error, "a fetched layer did not arrive within ",
               options_.timeout_s, " s: results since then are wrong; raise timeout_s, or look for a device that is stopped");
}

void CudaRing::acquire(int layer, cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  const int index = schedule_.remote_index(layer);
  const DeviceGuard guard(options_.device);
  if (is_capturing(stream)) {
    if (index >= 0) capture_of(stream, index)->acquire(index, stream);
    return;
  }
  const int slot = index < 0 ? -1 : schedule_.slot(index);
  if (index >= 0 && plan_.claim(index, [&] { issue(stream); })) {
    if (options_.activity != nullptr) store_relaxed(options_.activity, plan_.uses());
    await_ready(layer, slot, index, stream);
  }
  mark_use(layer, slot, stream);
}

void CudaRing::release(int layer, cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  const int index = schedule_.remote_index(layer);
  if (stopped_) return;
  const DeviceGuard guard(options_.device);
  if (is_capturing(stream)) {
    if (index >= 0) capture_of(stream, index)->release(index, stream);
    return;
  }
  mark_end(layer, stream);
  if (index < 0 || !plan_.release(index)) return;
  const int slot = schedule_.slot(index);
  if (options_.hand_over == HandOver::events)
    used_[slot].record(stream);
  else
    launch_post({used_word(slot), ++used_generation_[slot], nullptr, 0, nullptr, 0, nullptr}, stream);
  issue(stream);
}

// Enqueues every fetch whose slot is free. `stream` is where the caller computes; null at the start, before any use.
void CudaRing::issue(cudaStream_t stream) {
  std::optional<Fetch> fetch = plan_.next();
  if (!fetch) return;
  if (graphs_exist_) {
    // A replay may have used any slot since; all of it comes before `now` on the caller's stream.
    enter_.record(stream);
    SIDP_CUDA_CHECK(cudaStreamWaitEvent(copy_stream_.get(), enter_.get(), 0));
  }
  for (; fetch; fetch = plan_.next()) enqueue(*fetch);
  ++batches_;
  if (options_.hand_over == HandOver::events) {
    copy_tail_.record(copy_stream_.get());
    return;
  }
  launch_post({done_word(), batches_, nullptr, 0, nullptr, 0, nullptr}, copy_stream_.get());
  if (graphs_exist_) launch_post({issued_word(), batches_, nullptr, 0, nullptr, 0, nullptr}, stream);
}

void CudaRing::enqueue(const Fetch& fetch) {
  if (fetch.after != kNever) await_used(fetch.slot);
  const bool fill = content_[fetch.slot] != fetch.index;
  if (fill) {
    const bool tracing = trace_.on();
    const std::size_t mark = tracing ? trace_.begin(TraceEvent::Kind::fetch, schedule_.layer(fetch.index), fetch.slot, copy_stream_.get()) : 0;
    enqueue_copy(fetch.index, fetch.slot);
    if (tracing) trace_.end(mark, copy_stream_.get());
    content_[fetch.slot] = fetch.index;
    ++fetches_;
    fetched_bytes_ += remote_bytes_[fetch.index];
  }
  publish_ready(fetch.slot, fetch.index, fill);
}

void CudaRing::enqueue_copy(int index, int slot) {
  std::uint8_t* target = slot_address(slot);
  const cudaStream_t stream = copy_stream_.get();
  if (options_.poison) SIDP_CUDA_CHECK(cudaMemsetAsync(target, 0xff, slot_stride_, stream));
  const UnitCopies& unit = copies_[index];
  if (!unit.own.empty()) {
    begun_.record(stream);
    SIDP_CUDA_CHECK(cudaStreamWaitEvent(own_stream_.get(), begun_.get(), 0));
    copy_to(target, unit.own, own_stream_.get());
    own_done_.record(own_stream_.get());
  }
  copy_to(target, unit.remote, stream);
  if (!unit.own.empty()) SIDP_CUDA_CHECK(cudaStreamWaitEvent(stream, own_done_.get(), 0));
}

// WAR: the fetch comes after the slot's last reader.
void CudaRing::await_used(int slot) {
  if (options_.hand_over == HandOver::events) {
    SIDP_CUDA_CHECK(cudaStreamWaitEvent(copy_stream_.get(), used_[slot].get(), 0));
    return;
  }
  const auto timeout_ns = static_cast<std::uint64_t>(options_.timeout_s * 1e9);
  launch_wait({used_word(slot), used_generation_[slot], host_.as<HostWords>(), timeout_ns, false}, copy_stream_.get());
}

// By events, no kernel stands between two fetches: beside a large GEMM it would wait for an SM, and the link with it.
void CudaRing::publish_ready(int slot, int index, bool filled) {
  std::int32_t* content = filled && graphs_exist_ ? content_word(slot) : nullptr;
  if (options_.hand_over == HandOver::words) {
    launch_post({ready_word(slot), ++ready_generation_[slot], content, index, nullptr, 0, nullptr}, copy_stream_.get());
    return;
  }
  if (content != nullptr)
    SIDP_CUDA_CHECK(cudaMemcpyAsync(content, index_word(index), sizeof(*content), cudaMemcpyHostToDevice, copy_stream_.get()));
  ready_[slot].record(copy_stream_.get());
}

// RAW: the use comes after the slot's fetch. Once graphs exist a replay may have put another unit there since.
void CudaRing::await_ready(int layer, int slot, int index, cudaStream_t stream) {
  const bool tracing = trace_.on();
  const std::size_t mark = tracing ? trace_.begin(TraceEvent::Kind::stall, layer, slot, stream) : 0;
  if (options_.hand_over == HandOver::events) {
    SIDP_CUDA_CHECK(cudaStreamWaitEvent(stream, ready_[slot].get(), 0));
  } else {
    const auto timeout_ns = static_cast<std::uint64_t>(options_.timeout_s * 1e9);
    launch_wait({ready_word(slot), ready_generation_[slot], host_.as<HostWords>(), timeout_ns, true}, stream);
  }
  if (tracing) trace_.end(mark, stream);
  if (!graphs_exist_) return;
  EnsureArguments arguments = ensure_arguments();
  arguments.count = 1;
  arguments.slot[0] = static_cast<std::int16_t>(slot);
  arguments.index[0] = index;
  launch_ensure(arguments, stream);
}

void CudaRing::mark_use(int layer, int slot, cudaStream_t stream) {
  if (trace_.on() && open_mark_[layer] < 0)
    open_mark_[layer] = static_cast<std::ptrdiff_t>(trace_.begin(TraceEvent::Kind::compute, layer, slot, stream));
}

void CudaRing::mark_end(int layer, cudaStream_t stream) {
  if (open_mark_[layer] < 0) return;
  trace_.end(static_cast<std::size_t>(open_mark_[layer]), stream);
  open_mark_[layer] = -1;
}

void CudaRing::start_trace(std::size_t capacity) {
  std::lock_guard<std::mutex> lock(mutex_);
  const DeviceGuard guard(options_.device);
  std::fill(open_mark_.begin(), open_mark_.end(), -1);
  trace_.start(capacity, copy_stream_.get());
}

EnsureArguments CudaRing::ensure_arguments() const {
  EnsureArguments a{};
  a.slots = slots_.as<std::uint8_t>();
  a.slot_stride = slot_stride_;
  a.content = content_words_.as<std::int32_t>();
  a.arrivals = arrivals_.as<std::uint32_t>();
  a.copies = copy_table_.as<DeviceCopy>();
  a.units = unit_table_.as<DeviceUnit>();
  a.host = host_.as<HostWords>();
  a.timeout_ns = static_cast<std::uint64_t>(options_.timeout_s * 1e9);
  return a;
}

// From now on the device keeps account of what each slot holds, beginning with what the host knows.
void CudaRing::prepare_for_graphs() {
  if (graphs_exist_) return;
  graphs_exist_ = true;
  for (int slot = 0; slot < schedule_.slots(); ++slot)
    launch_post({nullptr, 0, content_word(slot), content_[slot], nullptr, 0, nullptr}, copy_stream_.get());
  ++batches_;
  if (options_.hand_over == HandOver::events)
    copy_tail_.record(copy_stream_.get());
  else
    launch_post({done_word(), batches_, nullptr, 0, nullptr, 0, nullptr}, copy_stream_.get());
}

// The graph that `stream` is building; a new one begins with `index` as its first use.
CudaCapture* CudaRing::capture_of(cudaStream_t stream, int index) {
  const CaptureView view = view_capture(stream);
  for (const auto& capture : captures_)
    if (capture->id() == view.id) return capture.get();
  prepare_for_graphs();
  if (captures_.size() == kCapturesKept) captures_.pop_front();
  captures_.push_back(std::make_unique<CudaCapture>(*this, view.id, index, stream));
  return captures_.back().get();
}

CudaRingStats CudaRing::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  const HostWords* host = host_.as<HostWords>();
  CudaRingStats stats;
  stats.fetches = fetches_ + load_relaxed(&host->graph_fetches);
  stats.fetched_bytes = fetched_bytes_ + load_relaxed(&host->graph_bytes);
  stats.stalls = load_relaxed(&host->stalls);
  stats.stall_seconds = static_cast<double>(load_relaxed(&host->stall_ns)) * 1e-9;
  stats.restarts = plan_.restarts();
  stats.repairs = load_relaxed(&host->repairs);
  return stats;
}

}  // namespace sidp::cache
