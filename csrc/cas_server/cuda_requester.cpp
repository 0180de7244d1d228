#include "cuda_requester.hpp"

namespace sidp {
namespace cas {

CudaRequester::CudaRequester(const CudaRequesterConfig& config, const Geometry& geometry, void* region,
                             std::vector<void*> owner_regions)
    : config_(config), geometry_(geometry) {
  SIDP_REQUIRE(geometry.world >= 1 && geometry.world <= kMaxWorld, ConfigError, "world ", geometry.world,
               " is not in 1..", kMaxWorld);
  SIDP_REQUIRE(owner_regions.size() == geometry.world, ConfigError, owner_regions.size(), " owner regions for a world of ",
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
  arguments_.states = states_.as<RequesterState>();
  arguments_.host = host_memory_.as<RequesterHostWords>();
  arguments_.rank = config.rank;
  arguments_.hidden = config.hidden;
  arguments_.dtype = config.dtype;
  SIDP_CUDA_CHECK(preload_requester_kernels());
  SIDP_CUDA_CHECK(cudaDeviceSynchronize());  // the zeroed states; streams that wait for no other come next
}

void CudaRequester::check(std::uint32_t first_owner, std::uint32_t owners, const void* rows_pointer,
                          std::uint32_t rows) const {
  SIDP_REQUIRE(rows >= 1 && rows <= geometry_.max_rows, LayoutError, rows, " rows are not in 1..", geometry_.max_rows,
               "; send more in pieces, none not at all");
  SIDP_REQUIRE(rows_pointer != nullptr, LayoutError, "the rows are a null pointer");
  for (std::uint32_t owner = first_owner; owner < first_owner + owners; ++owner)
    SIDP_REQUIRE(owner < geometry_.world && arguments_.owner_region[owner] != nullptr, ConfigError, "owner ", owner,
                 " has no region here");
}

void CudaRequester::push(std::uint32_t owner, std::uint32_t layer, const void* x, std::uint32_t rows,
                         std::uint64_t pitch_bytes, cudaStream_t stream) {
  check(owner, 1, x, rows);
  SIDP_CUDA_CHECK(
      launch_push(arguments_, RowsArgument{const_cast<void*>(x), pitch_bytes, rows, layer, owner, 1}, false, stream));
}

void CudaRequester::wait(std::uint32_t owner, void* y, std::uint32_t rows, std::uint64_t pitch_bytes,
                         cudaStream_t stream) {
  check(owner, 1, y, rows);
  SIDP_CUDA_CHECK(launch_wait(arguments_, RowsArgument{y, pitch_bytes, rows, 0, owner, 1}, false, stream));
}

void CudaRequester::push_all(std::uint32_t layer, const void* x, std::uint32_t rows, std::uint64_t pitch_bytes,
                             cudaStream_t stream) {
  check(0, geometry_.world, x, rows);
  SIDP_CUDA_CHECK(launch_push(
      arguments_, RowsArgument{const_cast<void*>(x), pitch_bytes, rows, layer, 0, geometry_.world}, true, stream));
}

void CudaRequester::wait_all(void* y, std::uint32_t rows, std::uint64_t pitch_bytes, cudaStream_t stream) {
  check(0, geometry_.world, y, rows);
  SIDP_CUDA_CHECK(launch_wait(arguments_, RowsArgument{y, pitch_bytes, rows, 0, 0, geometry_.world}, true, stream));
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
