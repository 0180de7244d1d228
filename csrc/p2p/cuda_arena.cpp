#include "p2p/cuda_arena.hpp"

#include <cstring>
#include <random>

#include "error.hpp"

namespace sidp {
namespace {

constexpr std::uint64_t kProbeWords = kProbeBytes / sizeof(std::uint64_t);

static_assert(sizeof(cudaIpcMemHandle_t) == kIpcHandleBytes, "the record holds a whole handle");

DeviceUuid uuid_of(const cudaDeviceProp& properties) {
  DeviceUuid uuid;
  std::memcpy(uuid.data(), properties.uuid.bytes, uuid.size());
  return uuid;
}

std::uint64_t draw_seed() {
  std::random_device random;
  return (std::uint64_t{random()} << 32) ^ random();
}

}  // namespace

CudaArena::CudaArena(int rank, int world_size, JobToken token, std::uint64_t extent_bytes, int device, DeviceMemoryKind kind)
    : device_(device) {
  const DeviceGuard guard(device);
  cudaDeviceProp properties;
  SIDP_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  handle_.kind = kind;
  handle_.rank = rank;
  handle_.world_size = world_size;
  handle_.token = token;
  handle_.extent_bytes = extent_bytes;
  handle_.total_bytes = cuda_total_bytes(extent_bytes);
  handle_.probe_offset = cuda_probe_offset(extent_bytes);
  handle_.probe_seed = draw_seed();
  handle_.owner = ProcessIdentity::current();
  handle_.device = uuid_of(properties);
  allocate();
  std::vector<std::uint64_t> pattern(kProbeWords);
  for (std::uint64_t i = 0; i < kProbeWords; ++i) pattern[i] = probe_word(handle_.probe_seed, i);
  SIDP_CUDA_CHECK(cudaMemset(memory_, 0, handle_.total_bytes));
  SIDP_CUDA_CHECK(cudaMemcpy(memory_ + handle_.probe_offset, pattern.data(), kProbeBytes, cudaMemcpyHostToDevice));
  SIDP_CUDA_CHECK(cudaDeviceSynchronize());
}

void CudaArena::allocate() {
  handle_.mapped_bytes = handle_.total_bytes;
  if (handle_.kind == DeviceMemoryKind::vmm) {
    vmm_ = VmmMemory::create(handle_.total_bytes, device_);
    handle_.mapped_bytes = vmm_.mapped_bytes();
    memory_ = vmm_.address();
    return;
  }
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, handle_.total_bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    std::size_t free_bytes = 0, total = 0;
    SIDP_CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total));
    throw ConfigError(detail::concat("this rank's share needs ", handle_.total_bytes, " bytes of device ", device_, ", which has ",
                                     free_bytes, " free: use a larger group, host_tier=True, or free memory first"));
  }
  SIDP_CUDA_CHECK(error);
  memory_ = static_cast<std::uint8_t*>(memory);
}

Descriptor CudaArena::share() const {
  SIDP_REQUIRE(memory_ != nullptr, PoolClosedError, "the device arena of rank ", handle_.rank, " (this rank) is closed");
  return vmm_.share();
}

std::string CudaArena::handle() {
  SIDP_REQUIRE(memory_ != nullptr, PoolClosedError, "the device arena of rank ", handle_.rank, " (this rank) is closed");
  if (!exported_ && handle_.kind == DeviceMemoryKind::ipc) {
    const DeviceGuard guard(device_);
    cudaIpcMemHandle_t ipc;
    SIDP_CUDA_CHECK(cudaIpcGetMemHandle(&ipc, memory_));
    std::memcpy(handle_.ipc.data(), &ipc, sizeof(ipc));
    exported_ = true;
  }
  return encode_cuda_handle(handle_);
}

void CudaArena::close() {
  if (memory_ == nullptr) return;
  // A lost context cannot be told from a destructor; its memory is gone anyway.
  if (handle_.kind == DeviceMemoryKind::ipc)
    cudaFree(memory_);
  else
    vmm_.close();
  memory_ = nullptr;
}

CudaPeerMapping::CudaPeerMapping(const std::string& handle, const ArenaExpectation& expected, int device, const Descriptor* fd)
    : handle_(decode_cuda_handle(handle, expected, fd == nullptr ? DeviceMemoryKind::ipc : DeviceMemoryKind::vmm)), device_(device) {
  const DeviceGuard guard(device);
  if (fd == nullptr) {
    open_ipc();
  } else {
    vmm_ = VmmMemory::open(*fd, handle_.mapped_bytes, device);
    memory_ = vmm_.address();
  }
  try {
    probe();
  } catch (...) {
    close();
    throw;
  }
}

void CudaPeerMapping::open_ipc() {
  cudaIpcMemHandle_t ipc;
  std::memcpy(&ipc, handle_.ipc.data(), sizeof(ipc));
  void* memory = nullptr;
  const cudaError_t error = cudaIpcOpenMemHandle(&memory, ipc, cudaIpcMemLazyEnablePeerAccess);
  cudaGetLastError();
  SIDP_REQUIRE(error == cudaSuccess, Error, "the memory of rank ", handle_.rank, " (", uuid_text(handle_.device),
               ") cannot be opened on device ", device_, ": ", cudaGetErrorString(error));
  memory_ = static_cast<std::uint8_t*>(memory);
}

void CudaPeerMapping::probe() const {
  const auto* page = reinterpret_cast<const std::uint64_t*>(memory_ + handle_.probe_offset);
  const DeviceMemory by_kernel(kProbeBytes);
  const DeviceMemory by_copy(kProbeBytes);
  read_by_kernel(page, by_kernel.as<std::uint64_t>(), kProbeWords);
  SIDP_CUDA_CHECK(cudaMemcpy(by_copy.as<void>(), page, kProbeBytes, cudaMemcpyDefault));
  std::vector<std::uint64_t> words(kProbeWords);
  for (const DeviceMemory* memory : {&by_kernel, &by_copy}) {
    SIDP_CUDA_CHECK(cudaMemcpy(words.data(), memory->as<void>(), kProbeBytes, cudaMemcpyDeviceToHost));
    for (std::uint64_t i = 0; i < kProbeWords; ++i)
      SIDP_REQUIRE(words[i] == probe_word(handle_.probe_seed, i), Error, "word ", i, " of the probe page of rank ", handle_.rank,
                   " reads ", words[i], memory == &by_kernel ? " by a kernel" : " by a copy", ", expected ",
                   probe_word(handle_.probe_seed, i), ": peer access does not work here");
  }
}

void CudaPeerMapping::close() {
  if (memory_ == nullptr) return;
  if (handle_.kind == DeviceMemoryKind::ipc)
    cudaIpcCloseMemHandle(memory_);
  else
    vmm_.close();
  memory_ = nullptr;
}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

CudaDeviceFacts cuda_device_facts(int device) {
  const DeviceGuard guard(device);
  cudaDeviceProp properties;
  SIDP_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  CudaDeviceFacts facts;
  facts.name = properties.name;
  facts.uuid = uuid_of(properties);
  facts.multiprocessors = properties.multiProcessorCount;
  facts.copy_engines = properties.asyncEngineCount;
  std::size_t free_bytes = 0, total = 0;
  SIDP_CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total));
  facts.free_bytes = free_bytes;
  facts.total_bytes = total;
  char pci[32] = {};
  SIDP_CUDA_CHECK(cudaDeviceGetPCIBusId(pci, sizeof(pci), device));
  facts.pci = pci;
  for (int other = 0; other < cuda_device_count(); ++other) {
    int reachable = 0;
    if (other == device || cudaDeviceCanAccessPeer(&reachable, device, other) != cudaSuccess || reachable == 0) continue;
    int rank = 0;
    SIDP_CUDA_CHECK(cudaDeviceGetP2PAttribute(&rank, cudaDevP2PAttrPerformanceRank, device, other));
    facts.peers.push_back(other);
    facts.peer_ranks.push_back(rank);
  }
  return facts;
}

PinnedRange::PinnedRange(std::uintptr_t address, std::uint64_t bytes, bool read_only, int device) {
  const DeviceGuard guard(device);
  void* memory = reinterpret_cast<void*>(address);
  unsigned flags = cudaHostRegisterPortable | cudaHostRegisterMapped;
  if (read_only) flags |= cudaHostRegisterReadOnly;
  const cudaError_t error = cudaHostRegister(memory, bytes, flags);
  cudaGetLastError();
  SIDP_REQUIRE(error == cudaSuccess, Error, bytes, " bytes of host memory cannot be pinned: ", cudaGetErrorString(error),
               "; raise the locked-memory limit (ulimit -l), or leave more memory free");
  memory_ = memory;
  void* seen = nullptr;
  SIDP_CUDA_CHECK(cudaHostGetDevicePointer(&seen, memory, 0));
  device_address_ = reinterpret_cast<std::uintptr_t>(seen);
}

void PinnedRange::close() {
  if (memory_ == nullptr) return;
  cudaHostUnregister(memory_);
  memory_ = nullptr;
}

}  // namespace sidp
