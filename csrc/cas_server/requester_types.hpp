// The words of the requester on a GPU: its own state, and the arguments of its kernels. The server of the same rank reads the
// state, to stay as long as its rank waits.
#pragma once

#include <cstdint>

#include "mailbox.hpp"

namespace sidp {
namespace cas {

constexpr std::uint32_t kMaxCopyCtas = 16;  // of a push or of a wait

// What a requester has had answered.
struct RequesterCounters {
  std::uint64_t requests;
  std::uint64_t rows;
  std::uint64_t batch_rows;  // rows of the batches that its requests were fused into
  std::uint64_t service_ns;  // from election to reply
};

// Device memory, one per owner. `pushed` and `announced` are written by push kernels, `consumed` by wait kernels, in stream order.
struct alignas(128) RequesterState {
  std::uint64_t pushed;
  std::uint64_t announced;      // pushes of which this was the first owner and that the host had announced
  std::uint32_t push_arrivals;  // CTAs of the running push; 0 in between
  alignas(64) std::uint64_t consumed;
  std::uint32_t wait_arrivals;
  RequesterCounters counters;  // of the requests whose first owner this is
};

// Pinned host memory, mapped.
struct RequesterHostWords {
  alignas(128) std::uint64_t error;  // error_word() of the first fault, 0: none
  alignas(128) std::uint32_t abort;  // not 0: every wait gives up
  alignas(128) std::uint64_t announced;  // by the host, before it enqueues a push (life.hpp)
};

// Kernel argument.
struct RequesterArguments {
  Geometry geometry;
  std::uint64_t pool_id;
  std::uint64_t deadline_ns;
  std::uint8_t* region;                  // this rank's
  std::uint8_t* owner_region[kMaxWorld];  // as mapped here
  std::uint64_t* bell[kMaxWorld];         // this rank's word among the owner's bells, as this device writes it
  RequesterState* states;
  RequesterHostWords* host;
  std::uint32_t rank;
  std::uint32_t hidden;
  Dtype dtype;
};

// Rows [count, hidden] `pitch_bytes` apart, 1 <= count <= max_rows: those of a request, or those of its result.
struct RowsArgument {
  void* rows;
  std::uint64_t pitch_bytes;
  std::uint32_t count;
  std::uint32_t layer;
  std::uint32_t first_owner;
  std::uint32_t owners;  // 1: `layer`; more: `striped`
  bool announced = false;  // of a push: whether announce() has counted it
};

}  // namespace cas
}  // namespace sidp
