// What the host and the serving kernels of one owner share: units, the batch board, the state that outlives a launch.
// Nothing here is seen by a peer; the words that are, are in mailbox.hpp.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "activation.hpp"
#include "life.hpp"
#include "mailbox.hpp"
#include "requester_types.hpp"

namespace sidp {
namespace cas {

// Fused rows are padded to one of these (the N of wgmma).
constexpr std::uint32_t kWidths = 5;
SIDP_HOST_DEVICE constexpr std::uint32_t width_index(std::uint32_t rows) {
  return rows <= 8 ? 0 : rows <= 16 ? 1 : rows <= 32 ? 2 : rows <= 64 ? 3 : 4;
}
SIDP_HOST_DEVICE constexpr std::uint32_t width_of(std::uint32_t index) { return 8u << index; }

// A stage of the weight stream: two boxes of 128 weight rows x 64 columns. In the first phase of a gated FFN these are the
// same rows of gate and of up, otherwise 256 rows of one matrix.
constexpr std::uint32_t kBoxRows = 128;
constexpr std::uint32_t kBoxColumns = 64;
constexpr std::uint32_t kTileRows = 2 * kBoxRows;

// One layer's weights as this owner holds them (whole, or its slice of the intermediate dimension).
struct alignas(128) UnitRecord {
  // sm_90a: maps of the weights of both phases, and of the activations with a box of each width: the
  // mailbox rows, the gathered rows and the intermediate, the latter two for both parities of the batch number.
  CUtensorMap weights[2];
  CUtensorMap mailbox[kWidths];
  CUtensorMap gathered[2][kWidths];
  CUtensorMap inner[2][kWidths];

  const void* gate_weights;  // null: a plain FFN
  const void* up_weights;
  const void* down_weights;
  const void* gate_bias;  // null: none
  const void* up_bias;
  const void* down_bias;
  std::uint32_t hidden;
  std::uint32_t intermediate;  // of this owner's slice
  Activation activation;
  std::uint32_t reply_flags;  // kReplyFloat32 in `striped`
  std::uint32_t gate_box;     // which box of a stage is gate: the matrix at the lower address comes first
};

constexpr std::uint32_t kMaxLayers = 512;

struct BatchRequest {
  std::uint64_t sequence;
  std::uint16_t requester;
  std::uint16_t slot;
  std::uint16_t first_row;
  std::uint16_t rows;
};

enum class BatchKind : std::uint32_t { kWork = 0, kExit = 1 };

// What the control warp publishes to all CTAs. Batch number b lies on board entry b mod 2.
struct alignas(16) Batch {
  std::uint32_t id;
  BatchKind kind;
  std::uint32_t layer;
  std::uint32_t rows;
  std::uint32_t requests;
  std::uint32_t reserved;
  std::uint64_t elected_ns;
  BatchRequest request[kMaxBatchRequests];
};
static_assert(sizeof(Batch) == 32 + 16 * kMaxBatchRequests, "batch");

// What the weight loaders of all CTAs need to start on a batch; 16 bytes that are published as one, ahead of the batch
// itself. Batch number b lies on entry b mod 2.
struct alignas(128) Headline {
  std::uint32_t id;
  BatchKind kind;
  std::uint32_t layer;
  std::uint32_t rows;
};

struct ServerCounters {
  std::uint64_t batches;
  std::uint64_t fused_batches;  // of more than one request
  std::uint64_t requests;
  std::uint64_t rows;
  std::uint64_t refused;
  std::uint64_t busy_ns;  // election to reply, summed over batches
  std::uint64_t launches;
};

// Which launch serves is decided by the first CTA of a launch for all of them (life.hpp). A stream runs its launches one after
// the other, so that the CTAs that arrive can be counted off: `arrivals` / CTAs is the number of the launch in its stream.
constexpr std::uint32_t kServerStreams = 8;
struct alignas(128) Decision {
  std::uint64_t arrivals;
  std::uint64_t decided;  // 2 x (number + 1) + whether it serves
};

// Device memory; outlives every launch. Words that many CTAs add to lie on lines of their own.
struct ServerState {
  alignas(128) std::uint32_t board_sequence;  // the last batch published
  alignas(128) std::uint32_t completed;       // the last batch whose replies are released
  alignas(128) std::uint32_t life;  // Life
  Decision decision[kServerStreams];  // by stream
  alignas(128) std::uint32_t exited;          // CTAs that have left this launch
  std::uint32_t base;                         // the last batch of the launches before this one
  struct alignas(128) Progress {
    std::uint32_t gathered;  // warpgroups that have copied their part of the rows
    alignas(128) std::uint32_t inner;     // warpgroups that have written their part of the intermediate
    alignas(128) std::uint32_t finished;  // warpgroups that have written all their results
  } progress[2];                          // by parity of the batch number; back to 0 when the batch is complete
  alignas(128) Batch board[2];
  Headline headline[2];
  alignas(128) std::uint64_t served[kMaxWorld];  // per requester: last request elected or refused
  std::uint32_t broken;                          // bit per requester: the tail was nonsense, not read again
  std::uint32_t turn;                            // the requester that has the first choice
  ServerCounters counters;
};

// Pinned host memory, mapped: what the host tells a running kernel, and what the kernel tells the host.
struct ServerHostWords {
  alignas(128) std::uint32_t stop;  // leave as soon as no batch is in flight
  std::uint32_t retired;            // bit per requester: do not serve it any more
  alignas(128) std::uint32_t running;   // whether a launch serves and will look once more before it ends
  std::uint32_t broken;                 // as in ServerState, when `running` was taken back
  std::uint64_t served[kMaxWorld];      // ... likewise
  alignas(128) std::uint64_t begun[kServerStreams];  // by stream: the newest launch that has begun
  std::uint64_t relief_wanted;                       // kernel: the launch that asks for one behind it (G1)
  std::uint64_t relief_given;                        // host: the launch that has it (G2)
  alignas(128) std::uint32_t fault;  // ServerFault; the kernel traps after writing it
  std::uint32_t fault_detail;
  alignas(128) ServerCounters counters;
};

enum class ServerFault : std::uint32_t {
  kNone = 0,
  kRing = 1,       // a stage of the weight ring never filled or never emptied
  kBoard = 2,      // a batch never reached a CTA
  kGather = 3,     // the rows were never all gathered
  kInner = 4,      // the intermediate was never completed
  kPartial = 5,    // a partial sum never came
  kComplete = 6,   // a batch never completed
  kLife = 7,       // a launch that was leaving never left
};

// Kernel argument of every serving kernel.
struct ServerArguments {
  Geometry geometry;
  std::uint64_t pool_id;
  std::uint8_t* region;                 // this rank's mailbox region
  std::uint8_t* peer_region[kMaxWorld];  // the requesters' regions as mapped here; null: cannot be served
  const UnitRecord* units;
  std::uint32_t held[kMaxLayers / 32];  // bit per layer that this owner holds
  std::uint32_t layers;
  std::uint32_t hidden;                // of every unit; what a request must say (O2)
  std::uint16_t dtype;
  std::uint16_t reply_flags;
  std::uint32_t rank;
  std::uint32_t row_limit;  // rows of a batch, at most kMaxBatchRows
  ServerState* state;
  ServerHostWords* host;
  std::uint8_t* gathered[2];  // [kMaxBatchRows, hidden]
  std::uint8_t* inner[2];     // [kMaxBatchRows, inner_stride bytes]
  std::uint64_t inner_stride;
  float* partials;              // [2 parities][2 phases][ctas][256 x kMaxBatchRows], then [ctas] of them: a CTA's own
  std::uint32_t* partial_flags;  // [2][2][ctas][2 warpgroups]: number of the batch whose partial sum lies there
  const RequesterState* asks;           // this rank's own requests; null: it asks nobody
  const RequesterHostWords* asks_host;
  std::uint64_t launch;  // its number
  std::uint32_t stream;  // of kServerStreams, where it was launched
  std::uint64_t idle_ns;
  std::uint64_t run_ns;
  std::uint64_t stall_ns;
};

}  // namespace cas
}  // namespace sidp
