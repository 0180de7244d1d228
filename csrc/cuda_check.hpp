// CUDA runtime errors as sidp::Error, with the call and the place; and the two kinds of memory that must be released.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

#include "error.hpp"

#define SIDP_CUDA_CHECK(call)                                                                                 \
  do {                                                                                                        \
    const cudaError_t sidp_error = (call);                                                                    \
    if (sidp_error != cudaSuccess)                                                                            \
      throw ::sidp::Error(::sidp::detail::concat(#call, " failed at ", __FILE__, ":", __LINE__, ": ",         \
                                                 cudaGetErrorName(sidp_error), ": ", cudaGetErrorString(sidp_error))); \
  } while (false)

namespace sidp {

// Makes a device current for a scope; costs next to nothing where it is current already.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    SIDP_CUDA_CHECK(cudaGetDevice(&before_));
    if (before_ != device_) SIDP_CUDA_CHECK(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int before_ = 0;
};

inline int device_attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  SIDP_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Within a scope this thread's calls are not refused because some stream of the process is being captured.
class RelaxedCapture {
 public:
  RelaxedCapture() { SIDP_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&before_)); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&before_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode before_ = cudaStreamCaptureModeRelaxed;
};

// Zeroed device memory, or zeroed pinned host memory that the device sees.
enum class MemoryKind { kDevice, kMappedHost };

template <MemoryKind kKind>
class CudaMemory {
 public:
  CudaMemory() = default;
  explicit CudaMemory(std::size_t bytes) {
    if constexpr (kKind == MemoryKind::kDevice) {
      SIDP_CUDA_CHECK(cudaMalloc(&pointer_, bytes));
      SIDP_CUDA_CHECK(cudaMemset(pointer_, 0, bytes));
    } else {
      SIDP_CUDA_CHECK(cudaHostAlloc(&pointer_, bytes, cudaHostAllocMapped | cudaHostAllocPortable));
      for (std::size_t i = 0; i < bytes; ++i) static_cast<char*>(pointer_)[i] = 0;
    }
  }
  ~CudaMemory() {
    if (pointer_ == nullptr) return;
    if constexpr (kKind == MemoryKind::kDevice)
      cudaFree(pointer_);
    else
      cudaFreeHost(pointer_);
  }
  CudaMemory(CudaMemory&& other) noexcept : pointer_(std::exchange(other.pointer_, nullptr)) {}
  CudaMemory& operator=(CudaMemory&& other) noexcept {
    std::swap(pointer_, other.pointer_);
    return *this;
  }

  template <typename T>
  T* as() const {
    return static_cast<T*>(pointer_);
  }

 private:
  void* pointer_ = nullptr;  // with unified addressing the device uses the host's pointer
};

using DeviceMemory = CudaMemory<MemoryKind::kDevice>;
using MappedHostMemory = CudaMemory<MemoryKind::kMappedHost>;

}  // namespace sidp
