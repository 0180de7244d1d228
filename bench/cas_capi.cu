// C functions around CudaServer and CudaRequester for bench/cas_kernel.py, and the bare reads that are its floor. Pointers
// are integers of the caller (torch tensors there). Functions return 0, or -1 with the reason in sidp_cas_error().
#include <exception>
#include <string>
#include <vector>

#include "../csrc/cas_server/cuda_requester.hpp"
#include "../csrc/cas_server/cuda_server.hpp"
#include "../csrc/cas_server/sm90_shared.cuh"
#include "../csrc/cas_server/tensor_maps.hpp"

using namespace sidp;
using namespace sidp::cas;

namespace {

std::string last_error;

template <typename Function>
int guarded(Function function) {
  try {
    function();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}

std::vector<void*> pointers(const std::uint64_t* values, std::uint32_t count) {
  std::vector<void*> result;
  for (std::uint32_t i = 0; i < count; ++i) result.push_back(reinterpret_cast<void*>(values[i]));
  return result;
}

RowsArgument rows_of(const CudaRequester& requester, int owner, u32 layer, std::uint64_t address, u32 rows, std::uint64_t pitch) {
  const bool all = owner < 0;
  return {reinterpret_cast<void*>(address), pitch, rows, layer, all ? 0 : u32(owner), all ? requester.world() : 1};
}

constexpr u32 kReadBytes = 16384, kReadStages = 12;

// One thread of each CTA keeps `kReadStages` copies of 16 KB in flight; nothing reads them.
__global__ void __launch_bounds__(32) read_bulk(const std::uint8_t* start, u64 blocks) {
#if defined(SIDP_SM90A)
  extern __shared__ std::uint8_t raw[];
  __shared__ u64 full[kReadStages];
  if (threadIdx.x != 0) return;
  std::uint8_t* ring = raw + (128 - shared_address(raw) % 128) % 128;
  for (u32 i = 0; i < kReadStages; ++i) barrier_init(&full[i], 1);
  barrier_init_fence();
  const u64 begin = blocks * blockIdx.x / gridDim.x, end = blocks * (blockIdx.x + 1) / gridDim.x;
  for (u64 at = begin; at < end + kReadStages; ++at) {
    const u32 use = u32(at - begin), stage = use % kReadStages;
    if (use >= kReadStages && at - kReadStages < end)
      while (!barrier_try_wait(&full[stage], (use / kReadStages - 1) & 1)) {
      }
    if (at >= end) continue;
    barrier_arrive_expect(&full[stage], kReadBytes);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(ring + stage * kReadBytes)),
        "l"(start + at * kReadBytes), "n"(kReadBytes), "r"(shared_address(&full[stage]))
        : "memory");
  }
#endif
}

// The same with the boxes of the serving kernel (128 rows x 64 columns), in its order.
__global__ void __launch_bounds__(32) read_boxes(const __grid_constant__ CUtensorMap map, u32 tiles, u32 depth) {
#if defined(SIDP_SM90A)
  extern __shared__ std::uint8_t raw[];
  __shared__ u64 full[kReadStages];
  if (threadIdx.x != 0) return;
  std::uint8_t* ring = raw + (1024 - shared_address(raw) % 1024) % 1024;
  for (u32 i = 0; i < kReadStages; ++i) barrier_init(&full[i], 1);
  barrier_init_fence();
  const u64 all = u64(tiles) * depth;
  const u64 begin = all * blockIdx.x / gridDim.x, end = all * (blockIdx.x + 1) / gridDim.x;
  for (u64 at = begin; at < end + kReadStages; ++at) {
    const u32 use = u32(at - begin), stage = use % kReadStages;
    if (use >= kReadStages && at - kReadStages < end)
      while (!barrier_try_wait(&full[stage], (use / kReadStages - 1) & 1)) {
      }
    if (at >= end) continue;
    barrier_arrive_expect(&full[stage], kBoxBytes);
    copy_box(&map, &full[stage], ring + stage * kBoxBytes, u32(at % depth) * kBoxColumns, u32(at / depth) * kBoxRows,
             kEvictFirst);
  }
#endif
}

}  // namespace

extern "C" {

const char* sidp_cas_error() { return last_error.c_str(); }

std::uint64_t sidp_cas_region_bytes(u32 world, u32 slots, u32 max_rows, u32 hidden, u32 reply_element_bytes) {
  return Geometry::make(world, slots, max_rows, hidden, 2, reply_element_bytes).bytes();
}

std::uint64_t sidp_cas_reply_offset(u32 world, u32 slots, u32 max_rows, u32 hidden, u32 reply_element_bytes, u32 owner,
                                    std::uint64_t sequence) {
  return Geometry::make(world, slots, max_rows, hidden, 2, reply_element_bytes).reply(owner, slot_of(sequence, slots));
}

struct ServerShape {
  u32 world, slots, max_rows, hidden, intermediate, layers, sms, rank, dtype, reply_float32, plain;
  double idle_ms, run_ms, stall_s;
};

// A page of bells in pinned host memory, one for each rank; 0 where there is none to be had.
std::uint64_t sidp_cas_bells() {
  MappedHostMemory* page = nullptr;
  guarded([&] { page = new MappedHostMemory(kMaxWorld * sizeof(BellLine)); });
  return reinterpret_cast<std::uint64_t>(page);
}
void sidp_cas_bells_free(std::uint64_t page) { delete reinterpret_cast<MappedHostMemory*>(page); }

// `requester` of the same rank; `bells` from sidp_cas_bells().
void* sidp_cas_server(const ServerShape* shape, std::uint64_t region, const std::uint64_t* peers, std::uint64_t bells,
                      void* requester) {
  CudaServer* server = nullptr;
  guarded([&] {
    CudaServerConfig config;
    config.sms = shape->sms;
    config.layers = shape->layers;
    config.hidden = shape->hidden;
    config.intermediate = shape->intermediate;
    config.dtype = static_cast<Dtype>(shape->dtype);
    config.reply_float32 = shape->reply_float32 != 0;
    config.pool_id = 77;
    config.rank = shape->rank;
    config.idle_ms = shape->idle_ms;
    config.run_ms = shape->run_ms;
    config.stall_s = shape->stall_s;
    config.plain = shape->plain != 0;
    config.asks = static_cast<const CudaRequester*>(requester);
    const Geometry geometry = Geometry::make(shape->world, shape->slots, shape->max_rows, shape->hidden, 2,
                                             shape->reply_float32 ? 4 : 2);
    server = new CudaServer(config, geometry, reinterpret_cast<void*>(region), pointers(peers, shape->world),
                            reinterpret_cast<MappedHostMemory*>(bells)->as<void>());
  });
  return server;
}

// units: gate, up, down, gate_bias, up_bias, down_bias
int sidp_cas_register(void* server, u32 layer, const std::uint64_t* unit, u32 hidden, u32 intermediate, u32 activation) {
  return guarded([&] {
    const std::vector<void*> p = pointers(unit, 6);
    static_cast<CudaServer*>(server)->register_unit(
        layer, UnitPointers{p[0], p[1], p[2], p[3], p[4], p[5]},
        UnitShape{hidden, intermediate, static_cast<Activation>(activation)});
  });
}

int sidp_cas_start(void* server) {
  return guarded([&] { static_cast<CudaServer*>(server)->start(); });
}
int sidp_cas_stop(void* server) {
  return guarded([&] { static_cast<CudaServer*>(server)->stop(); });
}
void sidp_cas_server_free(void* server) { delete static_cast<CudaServer*>(server); }

// Why the server has failed, or nothing.
int sidp_cas_fault(void* server) {
  return guarded([&] { static_cast<CudaServer*>(server)->throw_if_failed(); });
}

// batches, requests, rows, refused, busy_ns, launches
int sidp_cas_counters(void* server, std::uint64_t* out) {
  return guarded([&] {
    const ServerCounters c = static_cast<CudaServer*>(server)->counters();
    const std::uint64_t values[6] = {c.batches, c.requests, c.rows, c.refused, c.busy_ns, c.launches};
    for (int i = 0; i < 6; ++i) out[i] = values[i];
  });
}

// `bells` of every owner, from sidp_cas_bells().
void* sidp_cas_requester(const ServerShape* shape, std::uint64_t region, const std::uint64_t* owners,
                         const std::uint64_t* bells, double timeout_s) {
  CudaRequester* requester = nullptr;
  guarded([&] {
    CudaRequesterConfig config;
    config.pool_id = 77;
    config.rank = shape->rank;
    config.hidden = shape->hidden;
    config.dtype = static_cast<Dtype>(shape->dtype);
    config.timeout_s = timeout_s;
    const Geometry geometry = Geometry::make(shape->world, shape->slots, shape->max_rows, shape->hidden, 2,
                                             shape->reply_float32 ? 4 : 2);
    std::vector<void*> pages;
    for (u32 o = 0; o < shape->world; ++o) pages.push_back(reinterpret_cast<MappedHostMemory*>(bells[o])->as<void>());
    requester = new CudaRequester(config, geometry, reinterpret_cast<void*>(region), pointers(owners, shape->world), pages);
  });
  return requester;
}

// owner < 0: all of them (`striped`). Not announced: captured and not captured pushes are the same here.
int sidp_cas_push(void* requester, int owner, u32 layer, std::uint64_t x, u32 rows, std::uint64_t pitch,
                  std::uint64_t stream) {
  return guarded([&] {
    auto* r = static_cast<CudaRequester*>(requester);
    r->push(rows_of(*r, owner, layer, x, rows, pitch), owner < 0, reinterpret_cast<cudaStream_t>(stream));
  });
}
int sidp_cas_wait(void* requester, int owner, std::uint64_t y, u32 rows, std::uint64_t pitch, std::uint64_t stream) {
  return guarded([&] {
    auto* r = static_cast<CudaRequester*>(requester);
    r->wait(rows_of(*r, owner, 0, y, rows, pitch), owner < 0, reinterpret_cast<cudaStream_t>(stream));
  });
}
int sidp_cas_check(void* requester) {
  return guarded([&] { static_cast<CudaRequester*>(requester)->throw_if_failed(); });
}
void sidp_cas_requester_free(void* requester) { delete static_cast<CudaRequester*>(requester); }

int sidp_cas_read_bulk(std::uint64_t start, std::uint64_t bytes, u32 sms, std::uint64_t stream) {
  return guarded([&] {
    const u32 shared = kReadStages * kReadBytes + 1024;
    SIDP_CUDA_CHECK(cudaFuncSetAttribute(read_bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    read_bulk<<<sms, 32, shared, reinterpret_cast<cudaStream_t>(stream)>>>(reinterpret_cast<const std::uint8_t*>(start),
                                                                           bytes / kReadBytes);
    SIDP_CUDA_CHECK(cudaGetLastError());
  });
}
int sidp_cas_read_boxes(std::uint64_t start, u32 rows, u32 columns, u32 sms, std::uint64_t stream) {
  return guarded([&] {
    const u32 shared = kReadStages * kBoxBytes + 1024;
    const CUtensorMap map = matrix_map(Dtype::kBFloat16, reinterpret_cast<const void*>(start), columns, rows,
                                       std::uint64_t(columns) * 2, kBoxRows);
    SIDP_CUDA_CHECK(cudaFuncSetAttribute(read_boxes, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    read_boxes<<<sms, 32, shared, reinterpret_cast<cudaStream_t>(stream)>>>(map, rows / kBoxRows, columns / kBoxColumns);
    SIDP_CUDA_CHECK(cudaGetLastError());
  });
}
}
