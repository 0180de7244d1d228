#include "cuda_requester.hpp"

#include "activation.cuh"
#include "ptx.cuh"

namespace sidp {
namespace cas {

namespace {

constexpr u32 kCopyThreads = 1024;
constexpr u32 kCopyUnitsPerThread = 4;  // of 16 bytes, in flight

// Both kernels are launched so that the next one of the stream may be set up while they still run (programmatic dependent
// launch); here each waits for its predecessor's end and its writes.
__device__ void follow_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Not before an answer is there: the successor's CTAs would hold SMs that a server on this GPU needs to give it.
__device__ void let_successor_in() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// R1 and R5 end by the deadline or by the abort word too. The host's words are far away: looked at every 256 tries.
template <typename Condition>
__device__ Fault wait_bounded(const RequesterArguments& args, Condition condition) {
  const volatile RequesterHostWords* host = args.host;
  const u64 start = now_ns();
  while (true) {
#pragma unroll 1
    for (int i = 0; i < 256; ++i)
      if (condition()) return Fault::kNone;
    if (host->abort != 0) return Fault::kAborted;
    if (now_ns() - start > args.deadline_ns) return Fault::kTimeout;
  }
}

__device__ void report(const RequesterArguments& args, Fault fault, u32 status, u32 owner, u64 sequence) {
  volatile RequesterHostWords* host = args.host;
  if (host->error == 0) host->error = error_word(fault, status, owner, sequence);
  __threadfence_system();
  host->abort = 1;
}

__device__ bool aligned16(const void* pointer, u64 pitch, u32 row_bytes) {
  return ((reinterpret_cast<u64>(pointer) | pitch | row_bytes) & 15) == 0;
}

// Behind everything else of a push, by one thread: what this rank's server goes by (life.hpp), R4, R4b.
__device__ void hand_over(const RequesterArguments& args, const RowsArgument& rows, u32 owner, u64 sequence) {
  RequesterState& state = args.states[owner];
  state.pushed = sequence;
  if (rows.announced && owner == rows.first_owner) store_release_gpu(&state.announced, state.announced + 1);
  store_release_sys(reinterpret_cast<u64*>(args.owner_region[owner] + args.geometry.tail(args.rank)), sequence);
  store_release_sys(args.bell[owner], sequence);
}

// Rows of `row_bytes` between matrices of different pitch, by all CTAs of blockIdx.x. The first loads from `source()` are on
// their way while `allowed()` (which meets the whole CTA) waits for leave to write; only then is `target()` asked for. False
// where leave was refused. The caller's matrix is `user`; the mailbox's rows lie on 128 bytes.
template <typename Source, typename Allowed, typename Target>
__device__ bool copy_rows(const RowsArgument& user, u64 target_pitch, u64 source_pitch, u32 row_bytes, Source source,
                          Allowed allowed, Target target) {
  const u32 first = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x, rows = user.count;
  if (!aligned16(user.rows, user.pitch_bytes, row_bytes)) {
    if (!allowed()) return false;
    const u32 units = row_bytes / 2;
    for (u32 i = first; i < rows * units; i += threads) {
      const u32 row = i / units, unit = i - row * units;
      const volatile u16* from = reinterpret_cast<const volatile u16*>(source() + row * source_pitch);
      reinterpret_cast<u16*>(target() + row * target_pitch)[unit] = from[unit];
    }
    return true;
  }
  const u32 units = row_bytes / 16, all = rows * units;
  uint4 held[kCopyUnitsPerThread];
  auto load = [&](u32 from) {
#pragma unroll
    for (u32 k = 0; k < kCopyUnitsPerThread; ++k) {
      const u32 i = from + k * threads, row = i / units;
      if (i < all) held[k] = __ldcg(reinterpret_cast<const uint4*>(source() + row * source_pitch) + (i - row * units));
    }
  };
  load(first);
  if (!allowed()) return false;
  std::uint8_t* to = target();
  for (u32 from = first; from < all; from += kCopyUnitsPerThread * threads) {
    if (from != first) load(from);
#pragma unroll
    for (u32 k = 0; k < kCopyUnitsPerThread; ++k) {
      const u32 i = from + k * threads, row = i / units;
      if (i < all) reinterpret_cast<uint4*>(to + row * target_pitch)[i - row * units] = held[k];
    }
  }
  return true;
}

// blockIdx.y: one owner each.
__global__ void __launch_bounds__(kCopyThreads) push_rows(const __grid_constant__ RequesterArguments args,
                                                          const __grid_constant__ RowsArgument rows, u16 flags) {
  follow_predecessor();
  let_successor_in();
  const u32 owner = rows.first_owner + blockIdx.y;
  RequesterState& state = args.states[owner];
  std::uint8_t* region = args.owner_region[owner];
  const u64 pushed = *const_cast<const volatile u64*>(&state.pushed);
  const u32 slots = args.geometry.slots;
  auto slot_free = [&] {  // R1
    bool free = true;
    if (threadIdx.x == 0) {
      const Fault fault =
          wait_bounded(args, [&] { return slot_is_free(pushed + 1, load_acquire_sys(&state.consumed), slots); });
      free = fault == Fault::kNone;
      if (!free) report(args, fault, 0, owner, pushed + 1);
    }
    return __syncthreads_and(free) != 0;
  };
  if (!copy_rows(
          rows, args.geometry.row_bytes, rows.pitch_bytes, args.hidden * 2,
          [&] { return static_cast<const std::uint8_t*>(rows.rows); }, slot_free,
          [&] { return region + args.geometry.request_rows(args.rank, slot_of(pushed + 1, slots)); }))  // R2
    return;
  const u64 sequence = pushed + 1;
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (gridDim.x > 1) {
    fence_sys();
    if (add_relaxed_gpu(&state.push_arrivals, 1) != gridDim.x - 1) return;  // R4's release is the fence behind it
    state.push_arrivals = 0;
  }
  auto* record = reinterpret_cast<uint4*>(region + args.geometry.request(args.rank, slot_of(sequence, slots)));  // R3
  union {
    uint4 words[2];
    RequestRecord record;
  } copy = {};
  copy.record.sequence = sequence;
  copy.record.pool_id = args.pool_id;
  copy.record.layer = rows.layer;
  copy.record.rows = rows.count;
  copy.record.hidden = args.hidden;
  copy.record.dtype = static_cast<u16>(args.dtype);
  copy.record.flags = flags;
  record[0] = copy.words[0];
  record[1] = copy.words[1];
  hand_over(args, rows, owner, sequence);
}

// What one thread waits for: the reply of one owner.
struct Expected {
  u32 owner;
  u64 sequence;
  const ReplyRecord* reply;
  Fault fault;
  u32 status;
};

// R5: the reply's sequence, status and rows are written as one and read as one.
__device__ Expected wait_reply(const RequesterArguments& args, u32 owner, u32 rows) {
  const u64 sequence = *const_cast<const volatile u64*>(&args.states[owner].consumed) + 1;
  const auto* reply = reinterpret_cast<const ReplyRecord*>(
      args.region + args.geometry.reply(owner, slot_of(sequence, args.geometry.slots)));
  Pair pair = {};
  Fault fault = wait_bounded(args, [&] {
    pair = load_pair_acquire_sys(reply);
    if (pair.first >= sequence) return true;
    if (blockIdx.x != 0) __nanosleep(200);  // many that look at one line without a pause slow down the stream of weights
    return false;
  });
  const u32 status = static_cast<u32>(pair.second), answered = static_cast<u32>(pair.second >> 32);
  if (fault == Fault::kNone && pair.first != sequence) fault = Fault::kSequence;
  if (fault == Fault::kNone && status != static_cast<u32>(Status::kOk)) fault = Fault::kRefused;
  if (fault == Fault::kNone && answered != rows) fault = Fault::kSequence;
  return Expected{owner, sequence, reply, fault, status};
}


template <typename T>
__device__ void sum_rows(const RequesterArguments& args, const RowsArgument& rows, const std::uint8_t* const* replies) {
  const u32 first = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  for (u32 i = first; i < rows.count * args.hidden; i += threads) {
    const u32 row = i / args.hidden, column = i - row * args.hidden;
    float sum = 0.0f;
    for (u32 owner = 0; owner < rows.owners; ++owner)  // the same order for every request
      sum += __ldcg(reinterpret_cast<const float*>(replies[owner] + row * u64(args.geometry.reply_row_bytes)) + column);
    reinterpret_cast<T*>(static_cast<std::uint8_t*>(rows.rows) + row * rows.pitch_bytes)[column] = from_float<T>(sum);
  }
}

// Nobody shall take for a result what is none.
__device__ void fill_with_nan(const RequesterArguments& args, const RowsArgument& rows) {
  const u32 first = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  for (u32 i = first; i < rows.count * args.hidden; i += threads) {
    const u32 row = i / args.hidden, column = i - row * args.hidden;
    reinterpret_cast<u16*>(static_cast<std::uint8_t*>(rows.rows) + row * rows.pitch_bytes)[column] = 0x7fff;  // in both dtypes
  }
}

__global__ void __launch_bounds__(kCopyThreads) wait_rows(const __grid_constant__ RequesterArguments args,
                                                          const __grid_constant__ RowsArgument rows, bool striped) {
  __shared__ const std::uint8_t* replies[kMaxWorld];
  follow_predecessor();
  Expected expected = {};
  const bool waits = threadIdx.x < rows.owners;
  if (waits) {
    expected = wait_reply(args, rows.first_owner + threadIdx.x, rows.count);
    replies[threadIdx.x] = args.region + args.geometry.reply_rows(
                                             expected.owner, slot_of(expected.sequence, args.geometry.slots));
  }
  if (!__syncthreads_and(expected.fault == Fault::kNone)) {
    if (waits && expected.fault != Fault::kNone)
      report(args, expected.fault, expected.status, expected.owner, expected.sequence);
    fill_with_nan(args, rows);
    return;
  }
  let_successor_in();
  if (!striped) {  // R6
    copy_rows(
        rows, rows.pitch_bytes, args.geometry.reply_row_bytes, args.hidden * 2, [&] { return replies[0]; },
        [] { return true; }, [&] { return static_cast<std::uint8_t*>(rows.rows); });
  } else {
    if (args.dtype == Dtype::kFloat16)
      sum_rows<__half>(args, rows, replies);
    else
      sum_rows<__nv_bfloat16>(args, rows, replies);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  RequesterState& head = args.states[rows.first_owner];
  if (gridDim.x > 1) {
    if (add_acq_rel_gpu(&head.wait_arrivals, 1) != gridDim.x - 1) return;
    head.wait_arrivals = 0;
  }
  const volatile ReplyRecord* reply = expected.reply;  // thread 0 waited for the first owner
  head.counters.requests += 1;
  head.counters.rows += rows.count;
  head.counters.batch_rows += reply->batch_rows;
  head.counters.service_ns += reply->service_ns;
  for (u32 i = 0; i < rows.owners; ++i) {  // R7
    u64* consumed = &args.states[rows.first_owner + i].consumed;
    // Relaxed is enough: all rows have been read, since what was read has been written on before the barrier above.
    *const_cast<volatile u64*>(consumed) = *const_cast<volatile u64*>(consumed) + 1;
  }
}

// Small CTAs as long as there are few of them: one that has 64 KB to move takes 1.2 us for it.
u32 copy_threads(u64 bytes) {
  return bytes <= u64(kMaxCopyCtas) * 256 * kCopyUnitsPerThread * 16 ? 256 : kCopyThreads;
}

u32 copy_ctas(u64 bytes) {
  const u64 per_cta = u64(copy_threads(bytes)) * kCopyUnitsPerThread * 16;
  const u64 ctas = (bytes + per_cta - 1) / per_cta;
  return static_cast<u32>(ctas < 1 ? 1 : ctas > kMaxCopyCtas ? kMaxCopyCtas : ctas);
}

}  // namespace

cudaError_t preload_requester_kernels() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&push_rows));
  return error != cudaSuccess ? error : cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&wait_rows));
}

namespace {

template <typename... Parameters, typename... Values>
cudaError_t launch_following(void (*kernel)(Parameters...), dim3 grid, u32 threads, cudaStream_t stream,
                             Values... values) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, values...);
}

}  // namespace

cudaError_t launch_push(const RequesterArguments& arguments, const RowsArgument& rows, bool striped, cudaStream_t stream) {
  const u64 bytes = u64(rows.count) * arguments.hidden * 2;
  return launch_following(push_rows, dim3(copy_ctas(bytes), rows.owners), copy_threads(bytes), stream, arguments, rows,
                          u16(striped ? kReplyFloat32 : 0));
}

cudaError_t launch_wait(const RequesterArguments& arguments, const RowsArgument& rows, bool striped, cudaStream_t stream) {
  const u64 bytes = u64(rows.count) * arguments.hidden * (striped ? 4 * rows.owners : 2);
  return launch_following(wait_rows, dim3(copy_ctas(bytes)), copy_threads(bytes), stream, arguments, rows, striped);
}

}  // namespace cas
}  // namespace sidp
