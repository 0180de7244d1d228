// Streams and events that release themselves.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "../cuda_check.hpp"

namespace sidp::cache {

class Event {
 public:
  explicit Event(bool timed = false) {
    SIDP_CUDA_CHECK(cudaEventCreateWithFlags(&event_, timed ? cudaEventDefault : cudaEventDisableTiming));
  }
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  cudaEvent_t get() const { return event_; }
  void record(cudaStream_t stream) const { SIDP_CUDA_CHECK(cudaEventRecord(event_, stream)); }

 private:
  cudaEvent_t event_ = nullptr;
};

// Does not synchronise with the legacy default stream, and goes before other streams where kernels compete.
class Stream {
 public:
  Stream() {
    int least = 0, greatest = 0;
    SIDP_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    SIDP_CUDA_CHECK(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest));
  }
  ~Stream() {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace sidp::cache
