#include "p2p/vmm_memory.hpp"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <utility>

#include "cuda_check.hpp"
#include "error.hpp"

namespace sidp {
namespace {

template <typename Function>
void look_up(const char* name, Function& function) {
  void* pointer = nullptr;
  cudaDriverEntryPointQueryResult result;
  SIDP_CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &pointer, 12000, cudaEnableDefault, &result));
  SIDP_REQUIRE(result == cudaDriverEntryPointSuccess && pointer != nullptr, Error, "the driver has no ", name,
               ": VMM handles need a newer one");
  function = reinterpret_cast<Function>(pointer);
}

struct Driver {
  decltype(&cuMemCreate) create;
  decltype(&cuMemRelease) release;
  decltype(&cuMemAddressReserve) reserve;
  decltype(&cuMemAddressFree) unreserve;
  decltype(&cuMemMap) map;
  decltype(&cuMemUnmap) unmap;
  decltype(&cuMemSetAccess) set_access;
  decltype(&cuMemExportToShareableHandle) export_handle;
  decltype(&cuMemImportFromShareableHandle) import_handle;
  decltype(&cuMemGetAllocationGranularity) granularity;
  decltype(&cuDeviceGetAttribute) attribute;
  decltype(&cuGetErrorString) error_string;

  Driver() {
    look_up("cuMemCreate", create);
    look_up("cuMemRelease", release);
    look_up("cuMemAddressReserve", reserve);
    look_up("cuMemAddressFree", unreserve);
    look_up("cuMemMap", map);
    look_up("cuMemUnmap", unmap);
    look_up("cuMemSetAccess", set_access);
    look_up("cuMemExportToShareableHandle", export_handle);
    look_up("cuMemImportFromShareableHandle", import_handle);
    look_up("cuMemGetAllocationGranularity", granularity);
    look_up("cuDeviceGetAttribute", attribute);
    look_up("cuGetErrorString", error_string);
  }
};

const Driver& driver() {
  static const Driver functions;
  return functions;
}

std::string reason(CUresult result) {
  const char* text = nullptr;
  driver().error_string(result, &text);
  return detail::concat(text == nullptr ? "unknown error" : text, " (", static_cast<int>(result), ")");
}

void require(CUresult result, const char* what, int device) {
  SIDP_REQUIRE(result == CUDA_SUCCESS, Error, what, " on device ", device, ": ", reason(result));
}

bool has(CUdevice_attribute attribute, int device) {
  int value = 0;
  return driver().attribute(&value, attribute, device) == CUDA_SUCCESS && value != 0;
}

CUmemAllocationProp properties_on(int device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  return properties;
}

// The driver's functions want the device's primary context to be there.
void begin_context() { SIDP_CUDA_CHECK(cudaFree(nullptr)); }

}  // namespace

const char* vmm_refusal(int device) {
  const DeviceGuard guard(device);
  begin_context();
  if (!has(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device)) return "the device has no virtual memory management";
  if (!has(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device))
    return "the device's memory cannot be exported as a file descriptor";
  return "";
}

VmmMemory VmmMemory::create(std::uint64_t bytes, int device) {
  const std::string refusal = vmm_refusal(device);
  SIDP_REQUIRE(refusal.empty(), Error, "VMM handles: ", refusal);
  const DeviceGuard guard(device);
  const CUmemAllocationProp properties = properties_on(device);
  std::size_t page = 0;
  require(driver().granularity(&page, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED), "cuMemGetAllocationGranularity", device);
  VmmMemory memory;
  memory.bytes_ = (bytes + page - 1) / page * page;
  CUmemGenericAllocationHandle handle = 0;
  const CUresult result = driver().create(&handle, memory.bytes_, &properties, 0);
  SIDP_REQUIRE(result != CUDA_ERROR_OUT_OF_MEMORY, ConfigError, "device ", device, " has no ", memory.bytes_,
               " bytes free for this rank's share: use a larger group, host_tier=True, or free memory first");
  require(result, "cuMemCreate", device);
  memory.handle_ = handle;
  memory.allocated_ = true;
  memory.map(device);
  return memory;
}

VmmMemory VmmMemory::open(const Descriptor& fd, std::uint64_t mapped_bytes, int device) {
  const DeviceGuard guard(device);
  begin_context();
  VmmMemory memory;
  memory.bytes_ = mapped_bytes;
  CUmemGenericAllocationHandle handle = 0;
  // The driver keeps what it needs of the descriptor, which stays the caller's.
  require(driver().import_handle(&handle, reinterpret_cast<void*>(static_cast<std::uintptr_t>(fd.get())),
                                 CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
          "cuMemImportFromShareableHandle", device);
  memory.handle_ = handle;
  memory.allocated_ = true;
  memory.map(device);
  return memory;
}

// A peer's memory stays where it is; only this device gets access, so that no other one need reach it.
void VmmMemory::map(int device) {
  CUdeviceptr address = 0;
  require(driver().reserve(&address, bytes_, 0, 0, 0), "cuMemAddressReserve", device);
  address_ = address;
  require(driver().map(address_, bytes_, 0, handle_, 0), "cuMemMap", device);
  mapped_ = true;
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  require(driver().set_access(address_, bytes_, &access, 1), "cuMemSetAccess", device);
}

Descriptor VmmMemory::share() const {
  int fd = -1;
  const CUresult result = driver().export_handle(&fd, handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  SIDP_REQUIRE(result == CUDA_SUCCESS, Error, "cuMemExportToShareableHandle: ", reason(result));
  return Descriptor(fd);
}

void VmmMemory::close() {
  // What fails here is a context that is lost, and its memory with it.
  if (mapped_) driver().unmap(address_, bytes_);
  if (address_ != 0) driver().unreserve(address_, bytes_);
  if (allocated_) driver().release(handle_);
  mapped_ = allocated_ = false;
  address_ = 0;
}

VmmMemory& VmmMemory::operator=(VmmMemory&& other) noexcept {
  if (this == &other) return *this;
  close();
  handle_ = other.handle_;
  bytes_ = other.bytes_;
  address_ = std::exchange(other.address_, 0);
  mapped_ = std::exchange(other.mapped_, false);
  allocated_ = std::exchange(other.allocated_, false);
  return *this;
}

}  // namespace sidp
