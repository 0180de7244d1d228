// Where the time of a batch goes: with -DSIDP_CAS_TRACE every CTA notes when it passed each mark of its last batch, which
// bench/cas_kernel.py --trace reads. Without, nothing of it exists.
#pragma once

#include "ptx.cuh"

namespace sidp {
namespace cas {

enum class Mark : u32 {
  kReceived,       // the herald has the batch
  kIssued,         // the first copy of weights has been issued
  kFirstStage,     // the first stage has arrived
  kGateUp,         // the last product of the first phase
  kInnerWritten,   // this warpgroup's part of the intermediate is published
  kInnerSeen,      // everybody's is
  kDownStage,      // the first stage of the second phase has arrived
  kDown,           // the last product of the second phase
  kResultsWritten,
  kFinished,       // counted as finished
  kReplied,        // the last CTA only
  kClockFirst,     // cycles, at kReceived
  kClockLast,      // cycles, at kFinished
  kCount,
};

#if defined(SIDP_CAS_TRACE)
constexpr u32 kTracedCtas = 256;
static __device__ u64 trace_marks[kTracedCtas][static_cast<u32>(Mark::kCount)];

__device__ inline void trace(Mark mark) { trace_marks[blockIdx.x][static_cast<u32>(mark)] = now_ns(); }
__device__ inline void trace_clock(Mark mark) { trace_marks[blockIdx.x][static_cast<u32>(mark)] = clock64(); }
#else
__device__ inline void trace(Mark) {}
__device__ inline void trace_clock(Mark) {}
#endif

}  // namespace cas
}  // namespace sidp
