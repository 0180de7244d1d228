// The record by which a rank invites its peers to map its device memory. Plain bytes over the control plane.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "p2p/handle.hpp"

namespace sidp {

constexpr std::size_t kIpcHandleBytes = 64;
using DeviceUuid = std::array<std::uint8_t, 16>;
std::string uuid_text(const DeviceUuid& uuid);

// How a peer gets at the memory. `ipc`: the record holds a cudaIpc handle. `vmm`: by a file descriptor that travels beside the
// record (descriptor_exchange.hpp).
enum class DeviceMemoryKind : std::uint32_t { ipc = 1, vmm = 2 };
DeviceMemoryKind device_memory_kind(const std::string& name);  // "ipc" or "vmm"; ConfigError otherwise

struct CudaHandle {
  DeviceMemoryKind kind = DeviceMemoryKind::ipc;
  std::int32_t rank = 0;
  std::int32_t world_size = 0;
  JobToken token;
  std::uint64_t total_bytes = 0;
  std::uint64_t mapped_bytes = 0;  // of the whole allocation, in the driver's pages
  std::uint64_t extent_bytes = 0;
  std::uint64_t probe_offset = 0;  // a page of random words, drawn from `probe_seed`
  std::uint64_t probe_seed = 0;
  ProcessIdentity owner;
  DeviceUuid device{};
  std::array<std::uint8_t, kIpcHandleBytes> ipc{};
};

constexpr std::size_t kCudaHandleBytes = 272;
constexpr std::uint64_t kProbeBytes = 4096;
constexpr std::uint64_t kTurnBytes = 4096;

// Word `i` of the probe page.
std::uint64_t probe_word(std::uint64_t seed, std::uint64_t i);

// Where the areas lie: the extents at 0, then the probe page, then the words by which readers take turns
// (ffn_cache/cuda_turns.hpp); whole 2 MiB pages in all.
std::uint64_t cuda_probe_offset(std::uint64_t extent_bytes);
std::uint64_t cuda_turns_offset(std::uint64_t extent_bytes);
std::uint64_t cuda_total_bytes(std::uint64_t extent_bytes);

std::string encode_cuda_handle(const CudaHandle& handle);
// LayoutError saying what is wrong: length, magic, version, checksum, or the first field that is not as expected.
CudaHandle decode_cuda_handle(const std::string& record, const ArenaExpectation& expected, DeviceMemoryKind kind);

}  // namespace sidp
