#include "cuda_requester.hpp"

namespace sidp {
namespace cas {

CudaRequester::CudaRequester(const CudaRequesterConfig& config, const Geometry& geometry, void* region,
                             std::vector<void*> owner_regions, const std::vector<void*>& owner_bells)
    : config_(config), geometry_(geometry) {
  SIDP_REQUIRE(geometry.world >= 1 && geometry.world <= kMaxWorld, ConfigError, "world ", geometry.world,
               " is not in 1..", kMaxWorld);
  SIDP_REQUIRE(owner_regions.size() == geometry.world, ConfigError, owner_regions.size(), " owner regions for a world of ",
               geometry.world);
  SIDP_REQUIRE(owner_bells.size() == geometry.world, ConfigError, owner_bells.size(), " pages of bells for a world of ",
               geometry.world);
  SIDP_REQUIRE(std::size_t(config.hidden) * 2 <= geometry.row_bytes, LayoutError, "rows of ", config.hidden,
               " elements do not fit the mailboxes' ", geometry.row_bytes, " bytes");
  DeviceGuard guard(config.device);
  states_ = DeviceMemory(sizeof(RequesterState) * geometry.world);
  host_memory_ = MappedHostMemory(sizeof(RequesterHostWords));
  arguments_.geometry = geometry;
  arguments_.pool_id = config.pool_id;
  arguments_.deadline_ns = static_cast<std::uint64_t>(config.timeout_s * 1e9);
  arguments_.region = static_cast<std::uint8_t*>(region);
  for (std::size_t o = 0; o < owner_regions.size(); ++o)
    arguments_.owner_region[o] = static_cast<std::uint8_t*>(owner_regions[o]);
  for (std::size_t o = 0; o < owner_bells.size(); ++o)
    if (owner_bells[o] != nullptr) arguments_.bell[o] = &static_cast<BellLine*>(owner_bells[o])[config.rank].sequence;
  arguments_.states = states_.as<RequesterState>();
  arguments_.host = host_memory_.as<RequesterHostWords>();
  arguments_.rank = config.rank;
  arguments_.hidden = config.hidden;
  arguments_.dtype = config.dtype;
  SIDP_CUDA_CHECK(preload_requester_kernels());
  SIDP_CUDA_CHECK(cudaStreamCreateWithFlags(&counter_stream_, cudaStreamNonBlocking));
  SIDP_CUDA_CHECK(cudaDeviceSynchronize());  // the zeroed states; streams that wait for no other come next
}

CudaRequester::~CudaRequester() {
  if (counter_stream_ != nullptr) cudaStreamDestroy(counter_stream_);
}

void CudaRequester::check(const RowsArgument& rows) const {
  SIDP_REQUIRE(rows.count >= 1 && rows.count <= geometry_.max_rows, LayoutError, rows.count, " rows are not in 1..",
               geometry_.max_rows, "; send more in pieces, none not at all");
  SIDP_REQUIRE(rows.rows != nullptr, LayoutError, "the rows are a null pointer");
  for (std::uint32_t owner = rows.first_owner; owner < rows.first_owner + rows.owners; ++owner)
    SIDP_REQUIRE(owner < geometry_.world && arguments_.owner_region[owner] != nullptr && arguments_.bell[owner] != nullptr,
                 ConfigError, "owner ", owner, " has no region or no bells here");
}

void CudaRequester::announce() {
  __atomic_fetch_add(&host_memory_.as<RequesterHostWords>()->announced, 1, __ATOMIC_SEQ_CST);
}

void CudaRequester::push(const RowsArgument& rows, bool striped, cudaStream_t stream) {
  check(rows);
  SIDP_CUDA_CHECK(launch_push(arguments_, rows, striped, stream));
}

void CudaRequester::wait(const RowsArgument& rows, bool striped, cudaStream_t stream) {
  check(rows);
  SIDP_CUDA_CHECK(launch_wait(arguments_, rows, striped, stream));
}

RequesterCounters CudaRequester::counters() const {
  const DeviceGuard guard(config_.device);
  const RelaxedCapture relaxed;
  std::vector<RequesterState> states(geometry_.world);
  const cudaError_t copied = cudaMemcpyAsync(states.data(), states_.as<void>(), sizeof(RequesterState) * states.size(),
                                             cudaMemcpyDeviceToHost, counter_stream_);
  SIDP_CUDA_CHECK(cudaStreamSynchronize(counter_stream_));
  SIDP_CUDA_CHECK(copied);
  RequesterCounters sum = {};
  for (const RequesterState& state : states) {
    sum.requests += state.counters.requests;
    sum.rows += state.counters.rows;
    sum.batch_rows += state.counters.batch_rows;
    sum.service_ns += state.counters.service_ns;
  }
  return sum;
}

void CudaRequester::abort() { __atomic_store_n(&host_memory_.as<RequesterHostWords>()->abort, 1u, __ATOMIC_RELEASE); }

std::uint64_t CudaRequester::error() const {
  return __atomic_load_n(&host_memory_.as<RequesterHostWords>()->error, __ATOMIC_ACQUIRE);
}

void CudaRequester::throw_if_failed() const {
  const std::uint64_t word = error();
  const int owner = static_cast<int>(error_owner(word));
  switch (error_fault(word)) {
    case Fault::kNone: return;
    case Fault::kTimeout:
      throw PeerError(owner, detail::concat("rank ", owner, " did not answer CaS request ", error_sequence(word), " within ",
                                            config_.timeout_s, " s"));
    case Fault::kAborted:
      throw PeerError(owner, detail::concat("the wait for CaS request ", error_sequence(word), " to rank ", owner,
                                            " was aborted because a rank died or the pool failed"));
    case Fault::kRefused:
      throw LayoutError(detail::concat("rank ", owner, " refused CaS request ", error_sequence(word), " with status ",
                                       error_status(word)));
    case Fault::kSequence:
    case Fault::kInternal: break;
  }
  throw Error(detail::concat("CaS request ", error_sequence(word), " to rank ", owner, " got a reply that does not fit"));
}

}  // namespace cas
}  // namespace sidp
