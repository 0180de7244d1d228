// The serving kernels as the host sees them.
#pragma once

#include <cuda_runtime_api.h>

#include "serve_types.hpp"

namespace sidp {
namespace cas {

enum class ServePath { kPlain, kSm90 };  // kSm90: bulk tensor copies and wgmma, compute capability 9.0 only

struct ServeLaunch {
  ServePath path;
  Dtype dtype;
  unsigned ctas;
  cudaStream_t stream;
};

// Whether this build holds the sm_90a kernel; on a device of 9.0 without it the plain one serves.
bool sm90_path_built();

// Loads the kernels and raises their shared-memory limits; before the first launch, because lazy loading can wait for a
// kernel that is running. Returns the first error.
cudaError_t preload_serve_kernels(ServePath path, Dtype dtype);

// A launch that serves and ends by itself, or leaves at once where another one serves (life.hpp).
cudaError_t launch_serve(const ServeLaunch& launch, const ServerArguments& arguments);

}  // namespace cas
}  // namespace sidp
