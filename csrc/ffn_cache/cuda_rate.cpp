#include "cuda_rate.hpp"

#include <algorithm>
#include <vector>

#include "cuda_objects.hpp"

namespace sidp::cache {

double cuda_copy_rate(std::uintptr_t source, std::uint64_t bytes, int device) {
  SIDP_REQUIRE(bytes > 0, ConfigError, "a rate needs bytes to copy");
  const DeviceGuard guard(device);
  constexpr std::size_t kCopies = 5;
  const DeviceMemory target(bytes);
  const Stream stream;
  std::vector<Event> marks;
  for (std::size_t i = 0; i < kCopies + 2; ++i) marks.emplace_back(true);
  for (std::size_t i = 0; i < marks.size(); ++i) {  // the first copy opens the way and is not counted
    if (i > 0)
      SIDP_CUDA_CHECK(cudaMemcpyAsync(target.as<void>(), reinterpret_cast<const void*>(source), bytes, cudaMemcpyDefault, stream.get()));
    marks[i].record(stream.get());
  }
  SIDP_CUDA_CHECK(cudaStreamSynchronize(stream.get()));
  std::vector<float> milliseconds(kCopies);
  for (std::size_t i = 0; i < kCopies; ++i)
    SIDP_CUDA_CHECK(cudaEventElapsedTime(&milliseconds[i], marks[i + 1].get(), marks[i + 2].get()));
  std::sort(milliseconds.begin(), milliseconds.end());
  return static_cast<double>(bytes) / (std::max(milliseconds[kCopies / 2], 1e-6f) * 1e-3);
}

}  // namespace sidp::cache
