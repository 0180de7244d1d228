// Device memory by the virtual memory API: a physical allocation that travels as a file descriptor, and its mapping here.
// The driver's functions are looked up at the first use, so that the module loads on machines without a driver.
#pragma once

#include <cstdint>

#include "p2p/descriptor_exchange.hpp"

namespace sidp {

class VmmMemory {
 public:
  // At least `bytes` on `device`, in whole pages of the driver's, mapped and writable there. ConfigError where there is
  // not enough memory, Error where the driver or the device does not offer this kind.
  static VmmMemory create(std::uint64_t bytes, int device);
  // A peer's memory, mapped for `device` only. Error with the driver's reason. Takes `mapped_bytes` as the owner has it.
  static VmmMemory open(const Descriptor& fd, std::uint64_t mapped_bytes, int device);

  VmmMemory() = default;
  ~VmmMemory() { close(); }
  VmmMemory(VmmMemory&& other) noexcept { *this = static_cast<VmmMemory&&>(other); }
  VmmMemory& operator=(VmmMemory&& other) noexcept;

  std::uint8_t* address() const { return reinterpret_cast<std::uint8_t*>(address_); }
  std::uint64_t mapped_bytes() const { return bytes_; }
  // A new descriptor of the physical memory.
  Descriptor share() const;
  void close();  // idempotent

 private:
  void map(int device);

  unsigned long long handle_ = 0;  // CUmemGenericAllocationHandle
  bool allocated_ = false;
  std::uint64_t address_ = 0;  // CUdeviceptr
  bool mapped_ = false;
  std::uint64_t bytes_ = 0;
};

// Whether `device` and its driver can export memory this way, "" or the reason why not.
const char* vmm_refusal(int device);

}  // namespace sidp
