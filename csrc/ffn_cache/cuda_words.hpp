// The words of the CUDA ring and the kernels that write and await them. Seen by host and device.
//
//   content[slot]  device   remote index whose bytes the slot holds whole, -1 for none
//   ready[slot]    device   generation of the last fetch that has arrived      (hand-over by words only)
//   used[slot]     device   generation of the last use that has ended          (hand-over by words only)
//   issued, done   device   batches of eager fetches: enqueued, and arrived    (hand-over by words only)
//   HostWords      pinned   what the host reads without asking the device
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sidp::cache {

enum class RingFault : std::uint32_t { none = 0, wait_timed_out = 1 };

struct HostWords {
  std::uint32_t abort;  // host: waits give up
  std::uint32_t fault;  // device: a RingFault
  std::uint64_t graph_fetches;  // fetches made by graph replays
  std::uint64_t graph_bytes;
  std::uint64_t repairs;        // slots a kernel had to fill because they did not hold what a use or a replay expected
  std::uint64_t stalls;         // waits that found their word not there yet (words only)
  std::uint64_t stall_ns;
  std::uint32_t turns_off;      // this rank takes no turns at owners any more (cuda_turns.hpp); host, after a death, or device
};

// One row-wise copy of a unit, as the repairing kernel reads it.
struct DeviceCopy {
  const std::uint8_t* source;
  std::uint64_t target;  // offset in the slot
  std::uint64_t width, height, source_pitch, target_pitch;
};

struct DeviceUnit {
  std::uint32_t first_copy;
  std::uint32_t copies;
};

constexpr int kMostEnsured = 64;

struct EnsureArguments {
  std::uint8_t* slots;
  std::uint64_t slot_stride;
  std::int32_t* content;
  std::uint32_t* arrivals;  // kMostEnsured words, zero between launches
  const DeviceCopy* copies;
  const DeviceUnit* units;  // by remote index
  HostWords* host;
  const std::uint64_t* done;    // null: do not wait
  const std::uint64_t* issued;
  std::uint64_t issued_before;  // batches enqueued when this was captured
  std::uint64_t timeout_ns;
  int count;
  std::int16_t slot[kMostEnsured];
  std::int32_t index[kMostEnsured];
};

struct PostArguments {
  std::uint64_t* word;  // null: no word
  std::uint64_t value;
  std::int32_t* content;  // null: no content
  std::int32_t index;
  HostWords* host;  // null: not counted
  std::uint64_t bytes;
  std::uint64_t* activity;  // null: none; in this rank's arena header, for peers that wait for it
};

struct WaitArguments {
  const std::uint64_t* word;
  std::uint64_t value;
  HostWords* host;
  std::uint64_t timeout_ns;
  bool counted;  // as a stall, if it has to wait
};

// Waits until *word >= value, at most for timeout_ns; a wait that gives up leaves a fault.
void launch_wait(const WaitArguments& arguments, cudaStream_t stream);
// After all that precedes it in its stream: content, counters, then the word (release).
void launch_post(const PostArguments& arguments, cudaStream_t stream);
cudaGraphNode_t add_post_node(cudaGraph_t graph, const cudaGraphNode_t* after, std::size_t count, PostArguments arguments);
// Makes sure that each listed slot holds the listed unit, copying what does not by the SMs themselves.
void launch_ensure(const EnsureArguments& arguments, cudaStream_t stream);
// Loads every kernel, so that none is loaded while a stream is captured.
void preload_ring_kernels();

}  // namespace sidp::cache
