#include "serve_kernels.hpp"

#include "serve_plain.cuh"
#include "serve_sm90.cuh"

namespace sidp {
namespace cas {

namespace {

const void* kernel_of(ServePath path, Dtype dtype) {
  const bool half = dtype == Dtype::kFloat16;
  if (path == ServePath::kSm90)
    return half ? reinterpret_cast<const void*>(&serve_sm90<__half>)
                : reinterpret_cast<const void*>(&serve_sm90<__nv_bfloat16>);
  return half ? reinterpret_cast<const void*>(&serve_plain<__half>)
              : reinterpret_cast<const void*>(&serve_plain<__nv_bfloat16>);
}

unsigned shared_bytes(ServePath path) { return path == ServePath::kSm90 ? kServeSharedBytes : 0; }

}  // namespace

bool sm90_path_built() {
  for (const int architecture : {__CUDA_ARCH_LIST__})
    if (architecture == 900) return true;
  return false;
}

cudaError_t preload_serve_kernels(ServePath path, Dtype dtype) {
  cudaFuncAttributes attributes;
  const void* kernel = kernel_of(path, dtype);
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess || path == ServePath::kPlain) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kServeSharedBytes);
}

cudaError_t launch_serve(const ServeLaunch& launch, const ServerArguments& arguments) {
  void* parameters[] = {const_cast<ServerArguments*>(&arguments)};
  const unsigned threads = launch.path == ServePath::kSm90 ? kServeThreads : kPlainThreads;
  return cudaLaunchKernel(kernel_of(launch.path, launch.dtype), dim3(launch.ctas), dim3(threads), parameters,
                          shared_bytes(launch.path), launch.stream);
}

}  // namespace cas
}  // namespace sidp

#if defined(SIDP_CAS_TRACE)
// For bench/cas_kernel.py: the marks of all CTAs' last batch, [kTracedCtas][Mark::kCount]. Returns a cudaError_t.
extern "C" int sidp_cas_trace(std::uint64_t* out) {
  return cudaMemcpyFromSymbol(out, sidp::cas::trace_marks, sizeof(sidp::cas::trace_marks));
}
#endif
