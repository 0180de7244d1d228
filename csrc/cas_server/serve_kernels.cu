#include "serve_kernels.hpp"

#include "serve_plain.cuh"
#include "serve_sm90.cuh"

namespace sidp {
namespace cas {

// One warp, lane r looking at requester r's tail. Its end lets the serving kernel queued behind it start, so that an idle
// server holds one warp of one SM.
__global__ void __launch_bounds__(32) watch(const __grid_constant__ ServerArguments args, u64 bound_ns) {
  const u32 lane = threadIdx.x;
  if (load_acquire_gpu(&args.state->turns.ended) >= args.turn) return;  // launched again elsewhere, and over
  const Control control = begin_control(args);
  volatile ServerHostWords* host = args.host;
  if (lane == 0) host->watching = args.turn;
  bool reads = control.reads;
  for (u32 polls = 0;; ++polls) {
    bool leave_now = false;
    if (polls % 64 == 0) {  // host memory is far away
      leave_now = host->stop != 0;
      reads = reads && (host->retired >> lane & 1) == 0;
    }
    if (reads)
      leave_now |= load_acquire_sys(reinterpret_cast<const u64*>(args.region + args.geometry.tail(lane))) !=
                   control.served;
    leave_now |= now_ns() - control.started_ns > bound_ns;
    if (__any_sync(kAllLanes, leave_now)) return;
    __nanosleep(200);
  }
}

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
  cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&watch));
  if (error != cudaSuccess) return error;
  const void* kernel = kernel_of(path, dtype);
  error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess || path == ServePath::kPlain) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kServeSharedBytes);
}

cudaError_t launch_serve(const ServeLaunch& launch, const ServerArguments& arguments) {
  void* parameters[] = {const_cast<ServerArguments*>(&arguments)};
  const unsigned threads = launch.path == ServePath::kSm90 ? kServeThreads : kPlainThreads;
  return cudaLaunchKernel(kernel_of(launch.path, launch.dtype), dim3(launch.ctas), dim3(threads), parameters,
                          shared_bytes(launch.path), launch.stream);
}

cudaError_t launch_watch(const ServerArguments& arguments, std::uint64_t bound_ns, cudaStream_t stream) {
  void* parameters[] = {const_cast<ServerArguments*>(&arguments), &bound_ns};
  return cudaLaunchKernel(reinterpret_cast<const void*>(&watch), dim3(1), dim3(32), parameters, 0, stream);
}

}  // namespace cas
}  // namespace sidp

#if defined(SIDP_CAS_TRACE)
// For bench/cas_kernel.py: the marks of all CTAs' last batch, [kTracedCtas][Mark::kCount]. Returns a cudaError_t.
extern "C" int sidp_cas_trace(std::uint64_t* out) {
  return cudaMemcpyFromSymbol(out, sidp::cas::trace_marks, sizeof(sidp::cas::trace_marks));
}
#endif
