// A rank's arena in device memory, and its view from a peer: by cudaIpc, or by the virtual memory API (vmm_memory.hpp).
//
// One allocation of whole 2 MiB pages, exported once, opened once by each peer on the peer's own device; sub-ranges are
// offsets. Teardown: readers stop, importers close, all meet, owners free. Words that the host reads (phase, heartbeat)
// do not lie here but in a small ShmArena beside it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda_check.hpp"
#include "p2p/cuda_handle.hpp"
#include "p2p/shm_arena.hpp"
#include "p2p/vmm_memory.hpp"

namespace sidp {

class CudaArena {
 public:
  // Zeroed memory on `device`. ConfigError with needed and free bytes where there is not enough.
  // Error where the driver does not offer `kind`.
  CudaArena(int rank, int world_size, JobToken token, std::uint64_t extent_bytes, int device, DeviceMemoryKind kind);
  ~CudaArena() { close(); }
  CudaArena(const CudaArena&) = delete;
  CudaArena& operator=(const CudaArena&) = delete;

  std::uint8_t* extents() const { return memory_; }
  std::uint8_t* turns() const { return memory_ + cuda_turns_offset(handle_.extent_bytes); }
  std::uint64_t total_bytes() const { return handle_.mapped_bytes; }
  DeviceMemoryKind kind() const { return handle_.kind; }
  int device() const { return device_; }
  // Exports the memory (at the first call). Error with the driver's reason where it cannot be exported.
  std::string handle();
  // vmm: a descriptor for the peers, to be sent beside the handle.
  Descriptor share() const;
  void close();  // frees; idempotent
  bool closed() const { return memory_ == nullptr; }

 private:
  CudaHandle handle_;
  int device_;
  void allocate();

  VmmMemory vmm_;                   // owns the memory of kind vmm
  std::uint8_t* memory_ = nullptr;  // of either kind
  bool exported_ = false;
};

class CudaPeerMapping {
 public:
  // Opens a checked handle on `device` and reads the probe page, by a kernel and by a copy. Error with the reason where
  // the memory cannot be opened or does not read as it should. `fd`: what the owner's share() gave, null for kind ipc.
  CudaPeerMapping(const std::string& handle, const ArenaExpectation& expected, int device, const Descriptor* fd = nullptr);
  ~CudaPeerMapping() { close(); }
  CudaPeerMapping(const CudaPeerMapping&) = delete;
  CudaPeerMapping& operator=(const CudaPeerMapping&) = delete;

  int rank() const { return handle_.rank; }
  const std::uint8_t* extents() const { return memory_; }
  std::uint8_t* turns() const { return memory_ + cuda_turns_offset(handle_.extent_bytes); }
  void close();  // idempotent
  bool closed() const { return memory_ == nullptr; }

 private:
  void open_ipc();
  void probe() const;

  CudaHandle handle_;
  int device_;
  VmmMemory vmm_;
  std::uint8_t* memory_ = nullptr;
};

// What a device can do for a pool.
struct CudaDeviceFacts {
  std::string name;
  DeviceUuid uuid{};
  int multiprocessors = 0;
  int copy_engines = 0;
  std::uint64_t total_bytes = 0;
  std::uint64_t free_bytes = 0;
  std::string pci;
  std::vector<int> peers;       // devices that it reaches directly, by cudaDeviceCanAccessPeer
  std::vector<int> peer_ranks;  // by position in `peers`: cudaDevP2PAttrPerformanceRank, 0 the fastest kind of link here
};
int cuda_device_count();  // 0 where there is no driver
CudaDeviceFacts cuda_device_facts(int device);

// Reads `words` words by a kernel on the current device.
void read_by_kernel(const std::uint64_t* source, std::uint64_t* target, std::uint64_t words);

// Host memory pinned for the GPUs while this lives.
class PinnedRange {
 public:
  // `read_only`: the mapping cannot be written here. Error where the system refuses.
  PinnedRange(std::uintptr_t address, std::uint64_t bytes, bool read_only, int device);
  ~PinnedRange() { close(); }
  PinnedRange(const PinnedRange&) = delete;
  PinnedRange& operator=(const PinnedRange&) = delete;
  std::uintptr_t device_address() const { return device_address_; }
  void close();

 private:
  void* memory_ = nullptr;
  std::uintptr_t device_address_ = 0;
};

}  // namespace sidp
