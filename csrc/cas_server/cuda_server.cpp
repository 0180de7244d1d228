#include "cuda_server.hpp"

#include <algorithm>

#include "tensor_maps.hpp"

namespace sidp {
namespace cas {

namespace {

std::uint64_t nanoseconds(double milliseconds) { return static_cast<std::uint64_t>(milliseconds * 1e6); }

std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

ServePath path_for(const CudaServerConfig& config) {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor, config.device);
  const int minor = device_attribute(cudaDevAttrComputeCapabilityMinor, config.device);
  SIDP_REQUIRE(major >= 8, ConfigError, "CaS needs compute capability 8.0, device ", config.device, " has ", major, ".",
               minor, "; use mode=\"was\"");
  const bool aligned = config.hidden % 8 == 0 && config.intermediate % 8 == 0;
  return major == 9 && minor == 0 && sm90_path_built() && aligned && !config.plain ? ServePath::kSm90 : ServePath::kPlain;
}

const char* fault_text(std::uint32_t fault) {
  switch (static_cast<ServerFault>(fault)) {
    case ServerFault::kNone: return "none";
    case ServerFault::kRing: return "a stage of the weight ring never changed hands";
    case ServerFault::kBoard: return "a batch never reached a CTA (are all CTAs of the server running?)";
    case ServerFault::kGather: return "the rows of a batch were never all gathered";
    case ServerFault::kInner: return "the intermediate of a batch was never completed";
    case ServerFault::kPartial: return "a partial sum never came";
    case ServerFault::kComplete: return "a batch never completed";
    case ServerFault::kLife: return "a launch never decided, or never ended";
  }
  return "unknown";
}

}  // namespace

CudaServer::CudaServer(const CudaServerConfig& config, const Geometry& geometry, void* region,
                       std::vector<void*> peer_regions, const void* bells)
    : config_(config), geometry_(geometry), bells_(static_cast<const BellLine*>(bells)) {
  SIDP_REQUIRE(geometry.world >= 1 && geometry.world <= kMaxWorld, ConfigError, "world ", geometry.world,
               " is not in 1..", kMaxWorld);
  SIDP_REQUIRE(geometry.max_rows >= 1 && geometry.max_rows <= kMaxBatchRows, ConfigError, "max_rows ",
               geometry.max_rows, " is not in 1..", kMaxBatchRows);
  SIDP_REQUIRE(peer_regions.size() == geometry.world, ConfigError, peer_regions.size(), " peer regions for a world of ",
               geometry.world);
  SIDP_REQUIRE(bells != nullptr, ConfigError, "this rank's bells are a null pointer");
  SIDP_REQUIRE(config.dtype != Dtype::kFloat32, ConfigError, "the CUDA server computes in bfloat16 or float16");
  SIDP_REQUIRE(config.layers <= kMaxLayers, ConfigError, config.layers, " layers are more than ", kMaxLayers);
  SIDP_REQUIRE(config.hidden >= 1 && std::size_t(config.hidden) * 2 <= geometry.row_bytes &&
                   std::size_t(config.hidden) * (config.reply_float32 ? 4 : 2) <= geometry.reply_row_bytes,
               LayoutError, "rows of ", config.hidden, " elements do not fit the mailboxes' ", geometry.row_bytes, " and ",
               geometry.reply_row_bytes, " bytes");
  DeviceGuard guard(config.device);
  path_ = path_for(config);
  const int sms = device_attribute(cudaDevAttrMultiProcessorCount, config.device);
  SIDP_REQUIRE(config.sms >= 1 && config.sms <= unsigned(sms), ConfigError, "cas_sms=", config.sms,
               " is not in 1..", sms, ", the SMs of device ", config.device);

  const std::size_t inner_stride = round_up(std::size_t(config.intermediate) * 2, 128);
  const std::size_t gathered_bytes = round_up(std::size_t(config.hidden) * 2 * kMaxBatchRows, 256);
  const auto take = [this](DeviceMemory& memory, std::size_t bytes) {
    memory = DeviceMemory(bytes);
    workspace_bytes_ += bytes;
  };
  const std::size_t partial_rows = path_ == ServePath::kSm90 ? std::size_t(5) * config.sms * kTileRows * kMaxBatchRows : 1;
  take(unit_memory_, sizeof(UnitRecord) * std::max(config.layers, 1u));
  take(state_, sizeof(ServerState));
  take(gathered_, 2 * gathered_bytes);
  take(inner_, std::max<std::size_t>(2 * inner_stride * kMaxBatchRows, 1));
  take(partials_, partial_rows * sizeof(float));
  take(flags_, std::size_t(4) * config.sms * 2 * sizeof(std::uint32_t));
  host_memory_ = MappedHostMemory(sizeof(ServerHostWords));
  units_.resize(config.layers);

  arguments_.geometry = geometry;
  arguments_.pool_id = config.pool_id;
  arguments_.region = static_cast<std::uint8_t*>(region);
  for (std::size_t r = 0; r < peer_regions.size(); ++r)
    arguments_.peer_region[r] = static_cast<std::uint8_t*>(peer_regions[r]);
  arguments_.units = unit_memory_.as<UnitRecord>();
  arguments_.layers = config.layers;
  arguments_.hidden = config.hidden;
  arguments_.dtype = static_cast<std::uint16_t>(config.dtype);
  arguments_.reply_flags = config.reply_float32 ? kReplyFloat32 : 0;
  arguments_.rank = config.rank;
  arguments_.row_limit = kMaxBatchRows;
  arguments_.state = state_.as<ServerState>();
  arguments_.host = host_memory_.as<ServerHostWords>();
  for (int parity = 0; parity < 2; ++parity) {
    arguments_.gathered[parity] = gathered_.as<std::uint8_t>() + parity * gathered_bytes;
    arguments_.inner[parity] = inner_.as<std::uint8_t>() + parity * inner_stride * kMaxBatchRows;
  }
  arguments_.inner_stride = inner_stride;
  arguments_.partials = partials_.as<float>();
  arguments_.partial_flags = flags_.as<std::uint32_t>();
  if (config.asks != nullptr) {
    arguments_.asks = config.asks->states();
    arguments_.asks_host = config.asks->host_words();
  }
  arguments_.idle_ns = nanoseconds(config.idle_ms);
  arguments_.run_ns = nanoseconds(config.run_ms);
  arguments_.stall_ns = nanoseconds(config.stall_s * 1e3);

  SIDP_CUDA_CHECK(preload_serve_kernels(path_, config.dtype));
  int least = 0, greatest = 0;
  SIDP_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  for (Stream& stream : streams_)
    SIDP_CUDA_CHECK(cudaStreamCreateWithPriority(&stream.stream, cudaStreamNonBlocking, greatest));
}

CudaServer::~CudaServer() {
  stop();
  for (const Stream& stream : streams_)
    if (stream.stream != nullptr) cudaStreamDestroy(stream.stream);
}

void CudaServer::make_maps(UnitRecord& unit) const {
  const Dtype dtype = config_.dtype;
  const std::uint64_t hidden = unit.hidden, inner = unit.intermediate;
  const auto* gate = static_cast<const std::uint8_t*>(unit.gate_weights);
  const auto* up = static_cast<const std::uint8_t*>(unit.up_weights);
  const std::uint64_t whole = hidden * inner * 2;
  if (gate == nullptr) {
    unit.weights[0] = weight_map(dtype, up, hidden, inner, 1, whole);
  } else {
    unit.gate_box = gate < up ? 0 : 1;
    const std::uint64_t distance = gate < up ? up - gate : gate - up;
    unit.weights[0] = weight_map(dtype, std::min(gate, up), hidden, inner, 2, distance);
  }
  unit.weights[1] = weight_map(dtype, unit.down_weights, inner, hidden, 1, whole);
  const std::uint64_t mailbox_rows = std::uint64_t(geometry_.world) * geometry_.slots * geometry_.max_rows;
  for (std::uint32_t i = 0; i < kWidths; ++i) {
    const std::uint32_t width = width_of(i);
    unit.mailbox[i] = matrix_map(dtype, arguments_.region + geometry_.rows_start(), hidden, mailbox_rows,
                                 geometry_.row_bytes, width);
    for (int parity = 0; parity < 2; ++parity) {
      unit.gathered[parity][i] =
          matrix_map(dtype, arguments_.gathered[parity], hidden, kMaxBatchRows, hidden * 2, width);
      unit.inner[parity][i] =
          matrix_map(dtype, arguments_.inner[parity], inner, kMaxBatchRows, arguments_.inner_stride, width);
    }
  }
}

void CudaServer::register_unit(std::uint32_t layer, const UnitPointers& pointers, const UnitShape& shape) {
  SIDP_REQUIRE(!thread_.joinable(), ConfigError, "register_unit(", layer, ") after start()");
  SIDP_REQUIRE(layer < config_.layers, ConfigError, "layer ", layer, " of ", config_.layers);
  SIDP_REQUIRE(shape.hidden == config_.hidden && shape.intermediate >= 1 && shape.intermediate <= config_.intermediate,
               LayoutError, "unit ", layer, " of ", shape.hidden, " x ", shape.intermediate, " does not fit ", config_.hidden,
               " x at most ", config_.intermediate);
  SIDP_REQUIRE(pointers.up != nullptr && pointers.down != nullptr, LayoutError, "unit ", layer, " lacks up or down");
  SIDP_REQUIRE(path_ == ServePath::kPlain || (shape.hidden % 8 == 0 && shape.intermediate % 8 == 0), LayoutError, "unit ",
               layer, " of ", shape.hidden, " x ", shape.intermediate, ": both must be multiples of 8");
  UnitRecord& unit = units_[layer];
  unit.gate_weights = pointers.gate;
  unit.up_weights = pointers.up;
  unit.down_weights = pointers.down;
  unit.gate_bias = pointers.gate_bias;
  unit.up_bias = pointers.up_bias;
  unit.down_bias = pointers.down_bias;
  unit.hidden = shape.hidden;
  unit.intermediate = shape.intermediate;
  unit.activation = shape.activation;
  unit.reply_flags = arguments_.reply_flags;
  arguments_.held[layer / 32] |= 1u << layer % 32;
  if (path_ == ServePath::kSm90) make_maps(unit);
}

void CudaServer::retire(std::uint32_t requester) {
  __atomic_fetch_or(&host_memory_.as<ServerHostWords>()->retired, 1u << requester, __ATOMIC_ACQ_REL);
}

void CudaServer::throw_if_failed() const {
  const auto* host = host_memory_.as<ServerHostWords>();
  const std::uint32_t fault = __atomic_load_n(&host->fault, __ATOMIC_ACQUIRE);
  SIDP_REQUIRE(fault == 0, Error, "the CaS server of rank ", config_.rank, " failed: ", fault_text(fault), " (detail ",
               host->fault_detail, ")");
  SIDP_REQUIRE(!failed_.load(std::memory_order_acquire), Error, "the CaS server of rank ", config_.rank, " failed: ", failure_);
}

ServerCounters CudaServer::counters() const {
  throw_if_failed();
  return host_memory_.as<ServerHostWords>()->counters;
}

}  // namespace cas
}  // namespace sidp
