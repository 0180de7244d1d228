#include "cuda_cas.hpp"

#include <algorithm>
#include <utility>

#include "../atomics.hpp"
#include "region.hpp"

namespace sidp {
namespace cas {

namespace {

// An SM takes 64 bytes a clock from the L2; half as many SMs again as the memory can feed at that rate were the best of the sweeps,
// rounded to 8: 40 on an H100, 56 on an H200 (bench/RESULTS.md, "The CaS kernel").
unsigned measured_sms(int device) {
  const double clock_hz = device_attribute(cudaDevAttrClockRate, device) * 1e3;
  const double memory_hz = device_attribute(cudaDevAttrMemoryClockRate, device) * 1e3;
  const double memory_bytes = 2 * memory_hz * device_attribute(cudaDevAttrGlobalMemoryBusWidth, device) / 8;
  if (clock_hz <= 0 || memory_bytes <= 0) return 40;  // not told by every driver
  return std::max(8u, 8 * static_cast<unsigned>(1.5 * memory_bytes / (64 * clock_hz) / 8 + 0.5));
}

// A launch needs all its CTAs at once, each a whole SM, beside the servers and the waiting CTAs of all ranks on the GPU: otherwise
// ranks that wait for each other hold the SMs that the answer needs.
unsigned choose_sms(const CudaCasOptions& options) {
  const auto all = static_cast<unsigned>(device_attribute(cudaDevAttrMultiProcessorCount, options.device));
  const unsigned each = all / options.ranks_here;
  const unsigned most = each > kMaxCopyCtas ? each - kMaxCopyCtas : 1;
  SIDP_REQUIRE(options.sms <= most, ConfigError, "cas_sms=", options.sms, ": ", options.ranks_here, " rank(s) on a GPU of ", all,
               " SMs can have ", most, " each, since all servers and ", kMaxCopyCtas, " waiting CTAs a rank must fit at once");
  return options.sms != 0 ? options.sms : std::min({measured_sms(options.device), std::max(all / 2, 1u), most});
}

// The kernel for sm_90a takes rows and slices of whole 16 bytes; one unit that is not sends all to the other kernel.
bool needs_plain(const std::vector<CudaCasUnit>& units) {
  return std::any_of(units.begin(), units.end(), [](const CudaCasUnit& unit) { return unit.shape.intermediate % 8 != 0; });
}

}  // namespace

void CudaCas::write_header(const Geometry& geometry, void* region, std::uint64_t pool_id, int device) {
  const DeviceGuard guard(device);
  alignas(128) std::byte line[sizeof(RegionHeader)] = {};
  cpu::Region(line, geometry).write_header(pool_id);
  SIDP_CUDA_CHECK(cudaMemcpy(region, line, sizeof(line), cudaMemcpyHostToDevice));
  SIDP_CUDA_CHECK(cudaDeviceSynchronize());
}

CudaCas::CudaCas(CudaCasOptions options) : options_(std::move(options)) {
  const DeviceGuard guard(options_.device);
  check_headers();
  CudaRequesterConfig asks;
  asks.device = options_.device;
  asks.pool_id = options_.pool_id;
  asks.rank = options_.rank;
  asks.hidden = options_.hidden;
  asks.dtype = options_.dtype;
  asks.timeout_s = options_.timeout_s;
  requester_ = std::make_unique<CudaRequester>(asks, options_.geometry, options_.regions[options_.rank], options_.regions,
                                               options_.bells);

  CudaServerConfig serves;
  serves.device = options_.device;
  serves.sms = choose_sms(options_);
  serves.layers = static_cast<std::uint32_t>(options_.owners.size());
  serves.hidden = options_.hidden;
  serves.dtype = options_.dtype;
  serves.reply_float32 = options_.striped;
  serves.pool_id = options_.pool_id;
  serves.rank = options_.rank;
  serves.plain = needs_plain(options_.units);
  serves.asks = requester_.get();
  serves.now_and_then = [this] { look_at_peers(); };
  for (const CudaCasUnit& unit : options_.units) serves.intermediate = std::max(serves.intermediate, unit.shape.intermediate);
  server_ = std::make_unique<CudaServer>(serves, options_.geometry, options_.regions[options_.rank], options_.regions,
                                         options_.own_bells);
  for (const CudaCasUnit& unit : options_.units) server_->register_unit(unit.layer, unit.pointers, unit.shape);
  server_->start();
}

void CudaCas::check_headers() const {
  for (std::size_t rank = 0; rank < options_.regions.size(); ++rank) {
    alignas(128) std::byte line[sizeof(RegionHeader)];
    SIDP_CUDA_CHECK(cudaMemcpy(line, options_.regions[rank], sizeof(line), cudaMemcpyDefault));
    cpu::Region(line, options_.geometry).check_header(static_cast<int>(rank), options_.pool_id);
  }
}

void CudaCas::forward(std::uint32_t layer, const void* x, void* y, std::uint64_t rows, cudaStream_t stream) {
  SIDP_REQUIRE(layer < options_.owners.size() && (options_.striped || options_.owners[layer] >= 0), ConfigError, "layer ", layer,
               " is not served to this rank");
  check();
  const auto world = static_cast<std::uint32_t>(options_.regions.size());
  const Target target = options_.striped ? Target{0, world, true}
                                         : Target{static_cast<std::uint32_t>(options_.owners[layer]), 1, false};
  run(layer, target, x, y, rows, stream);
}

void CudaCas::forward_here(std::uint32_t layer, const void* x, void* y, std::uint64_t rows, cudaStream_t stream) {
  check();
  run(layer, Target{options_.rank, 1, options_.striped}, x, y, rows, stream);
}

// At most `slots` pieces are in flight: a push beyond that would wait for a result that is only waited for behind it.
void CudaCas::run(std::uint32_t layer, const Target& target, const void* x, void* y, std::uint64_t rows, cudaStream_t stream) {
  const DeviceGuard guard(options_.device);
  if (options_.activity != nullptr) store_relaxed(options_.activity, ++calls_);
  const std::uint64_t pitch = std::uint64_t(options_.hidden) * 2, piece = options_.geometry.max_rows;
  const std::uint64_t pieces = (rows + piece - 1) / piece, ahead = options_.geometry.slots;
  const auto at = [&](const void* base, std::uint64_t i) {
    auto* first = static_cast<std::uint8_t*>(const_cast<void*>(base)) + i * piece * pitch;
    return RowsArgument{first,       pitch,         static_cast<std::uint32_t>(std::min(piece, rows - i * piece)), layer,
                        target.first_owner, target.owners};
  };
  for (std::uint64_t i = 0; i < pieces + ahead; ++i) {
    if (i >= ahead && i - ahead < pieces) requester_->wait(at(y, i - ahead), target.striped, stream);
    if (i < pieces) server_->push(*requester_, at(x, i), target.striped, stream);
  }
}

void CudaCas::check() const {
  if (options_.watch != nullptr) options_.watch->check("serving CaS requests");
  server_->throw_if_failed();  // the nearer cause first
  requester_->throw_if_failed();
}

void CudaCas::stop() {
  if (requester_ != nullptr) requester_->abort();  // whoever still waits waits in vain
  if (server_ != nullptr) server_->stop();
}

// A dead requester is forgotten; a dead owner ends every wait, for whoever waits for it would wait in vain.
void CudaCas::look_at_peers() {
  if (options_.watch == nullptr) return;
  for (std::uint32_t rank = 0; rank < options_.regions.size(); ++rank) {
    if (rank == options_.rank || (retired_ >> rank & 1) != 0) continue;
    if (options_.watch->state(static_cast<int>(rank)) != PeerState::dead) continue;
    retired_ |= 1u << rank;
    server_->retire(rank);
    requester_->abort();
  }
}

}  // namespace cas
}  // namespace sidp
