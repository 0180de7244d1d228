// The words that a requester and an owner share in CaS: mailbox region, request record, reply record, sequence words.
// This header is the contract of both backends; g++ (C++17) and nvcc compile it. docs/protocol_cas.md tells the
// protocol; the step numbers R1..R7 and O1..O7 here are the same there, in the kernels and in the tests.
//
// Every rank has one mailbox region in its arena, of the same geometry on all ranks. As an owner it receives requests
// there (tails, request records, request rows), as a requester it receives replies there (reply records, reply rows).
// Nobody reads a peer's memory: the requester writes into the owner's region, the owner into the requester's.
//
//   R1 wait until the slot is free      O1 acquire each requester's tail: requests served+1 .. tail wait, in order
//   R2 rows -> owner's slot             O2 check the record; what is malformed is refused, counted and answered
//   R3 record -> owner's slot           O3 elect a batch: the waiting requests for one unit
//   R4 release tail = n                 O4 read the rows
//   R5 acquire own reply sequence == n  O5 result rows -> requester's slot
//   R6 read the result rows             O6 reply fields -> requester's slot
//   R7 consumed = n (frees the slot)    O7 release reply sequence = n
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define SIDP_HOST_DEVICE __host__ __device__
#else
#define SIDP_HOST_DEVICE
#endif

namespace sidp {
namespace cas {

constexpr std::uint64_t kMailboxMagic = 0x5350494453414331ull;  // "1CASDIPS" as bytes
constexpr std::uint32_t kMailboxVersion = 1;
constexpr std::uint32_t kMaxWorld = 32;      // one lane of the control warp for each requester
constexpr std::uint32_t kMaxBatchRows = 128; // fused rows in one pass over the weights; also the limit of max_rows
constexpr std::uint32_t kMaxBatchRequests = 32;
constexpr std::size_t kLine = 128;           // what two sides write separately lies on separate lines
constexpr std::size_t kRegionAlignment = 256;

enum class Dtype : std::uint16_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };  // kFloat32: CPU backend only

// RequestRecord::flags
constexpr std::uint16_t kReplyFloat32 = 1;  // `striped`: answer with a float32 partial sum

enum class Status : std::uint32_t {
  kOk = 0,
  kBadSequence = 1,  // the record's sequence is not the one the tail announced
  kBadPool = 2,      // another pool's record
  kBadLayer = 3,     // a layer that this owner does not hold
  kBadRows = 4,      // 0 or more than max_rows
  kBadHidden = 5,    // not the unit's hidden size
  kBadDtype = 6,     // not the unit's dtype, or flags that are not known
  kServerError = 7,  // the owner failed while computing; its error word says more
};

// Line 0 of a region, written once by its rank before commit's barrier, checked by every peer when it maps the arena.
struct alignas(128) RegionHeader {
  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t world;
  std::uint32_t slots;
  std::uint32_t max_rows;
  std::uint32_t row_bytes;
  std::uint32_t reply_row_bytes;
  std::uint64_t pool_id;  // drawn at commit, the same on all ranks
  std::uint64_t reserved[11];
};

// Line 1, CPU backend only: how who sleeps on this region is woken. R4b, for the server: add 1 to `bell`, wake the futex
// if `sleeping`. O7b, for this rank's threads that wait for replies: add 1 to `reply_bell`, wake all if `waiting`.
struct alignas(128) DoorbellLine {
  std::uint32_t bell;
  std::uint32_t sleeping;  // the owner of the region writes it: its server sleeps on `bell`
  std::uint32_t reply_bell;
  std::uint32_t waiting;   // the owner of the region writes it: how many of its threads sleep on `reply_bell`
  std::uint32_t reserved[28];
};

// CUDA backend only: a page of host memory for each rank, mapped by all ranks and their GPUs; one line for each requester. R4b: the
// requester repeats the number of R4 here, where the owner's launching thread sees it.
struct alignas(128) BellLine {
  std::uint64_t sequence;
  std::uint64_t reserved[15];
};

// One for each requester: the number of the last request pushed. 0: none yet. Written by the requester alone (R4).
struct alignas(128) TailLine {
  std::uint64_t sequence;
  std::uint64_t reserved[15];
};

// One for each requester and slot. Written by the requester alone (R3), valid once the tail has reached `sequence`.
struct alignas(64) RequestRecord {
  std::uint64_t sequence;
  std::uint64_t pool_id;
  std::uint32_t layer;
  std::uint32_t rows;    // 1 .. max_rows
  std::uint32_t hidden;  // elements of a row
  std::uint16_t dtype;   // Dtype of the rows
  std::uint16_t flags;
  std::uint64_t reserved[4];
};

// One for each owner and slot. Written by the owner alone (O6), valid once `sequence` has been released (O7).
struct alignas(128) ReplyRecord {
  std::uint64_t sequence;
  std::uint32_t status;          // Status
  std::uint32_t rows;
  std::uint32_t batch_rows;      // rows of the batch this request was fused into
  std::uint32_t batch_requests;  // requests of that batch
  std::uint64_t service_ns;      // from the election of the batch to this reply
  std::uint64_t reserved[12];
};

static_assert(sizeof(RegionHeader) == 128 && offsetof(RegionHeader, pool_id) == 32, "region header");
static_assert(sizeof(DoorbellLine) == 128 && offsetof(DoorbellLine, sleeping) == 4 &&
                  offsetof(DoorbellLine, reply_bell) == 8 && offsetof(DoorbellLine, waiting) == 12,
              "doorbell line");
static_assert(sizeof(BellLine) == 128 && kMaxWorld * sizeof(BellLine) == 4096, "the bells are one page");
static_assert(sizeof(TailLine) == 128 && offsetof(TailLine, sequence) == 0, "tail line");
static_assert(sizeof(RequestRecord) == 64, "request record");
static_assert(offsetof(RequestRecord, pool_id) == 8 && offsetof(RequestRecord, layer) == 16 &&
                  offsetof(RequestRecord, rows) == 20 && offsetof(RequestRecord, hidden) == 24 &&
                  offsetof(RequestRecord, dtype) == 28 && offsetof(RequestRecord, flags) == 30,
              "request record");
static_assert(sizeof(ReplyRecord) == 128, "reply record");
static_assert(offsetof(ReplyRecord, status) == 8 && offsetof(ReplyRecord, rows) == 12 &&
                  offsetof(ReplyRecord, batch_rows) == 16 && offsetof(ReplyRecord, batch_requests) == 20 &&
                  offsetof(ReplyRecord, service_ns) == 24,
              "reply record");

// Requests of one (owner, requester) pair are numbered 1, 2, 3, ...; number n lies in slot (n - 1) mod slots.
SIDP_HOST_DEVICE constexpr std::uint32_t slot_of(std::uint64_t sequence, std::uint32_t slots) {
  if ((slots & (slots - 1)) == 0) return static_cast<std::uint32_t>(sequence - 1) & (slots - 1);  // on a GPU dividing is slow
  return static_cast<std::uint32_t>((sequence - 1) % slots);
}

// R1: request `sequence` may overwrite its slot once the requester has consumed the reply of the one before it there.
SIDP_HOST_DEVICE constexpr bool slot_is_free(std::uint64_t sequence, std::uint64_t consumed, std::uint32_t slots) {
  return sequence <= consumed + slots;
}

// Where everything lies in a region; offsets in bytes from the region's start. Pure arithmetic, equal on all ranks.
struct Geometry {
  std::uint32_t world;            // 1 .. kMaxWorld
  std::uint32_t slots;            // requests of one pair in flight, at least 1
  std::uint32_t max_rows;         // 1 .. kMaxBatchRows
  std::uint32_t row_bytes;        // one request row, padded to kLine
  std::uint32_t reply_row_bytes;  // one reply row, padded to kLine

  SIDP_HOST_DEVICE static constexpr std::uint32_t padded(std::uint64_t bytes) {
    return static_cast<std::uint32_t>((bytes + kLine - 1) / kLine * kLine);
  }

  // `reply_element_bytes`: that of the activations in `layer` placement, 4 in `striped`.
  SIDP_HOST_DEVICE static constexpr Geometry make(std::uint32_t world, std::uint32_t slots, std::uint32_t max_rows,
                                                  std::uint32_t hidden, std::uint32_t element_bytes,
                                                  std::uint32_t reply_element_bytes) {
    return Geometry{world, slots, max_rows, padded(std::uint64_t(hidden) * element_bytes),
                    padded(std::uint64_t(hidden) * reply_element_bytes)};
  }

  SIDP_HOST_DEVICE constexpr std::size_t doorbell() const { return sizeof(RegionHeader); }
  SIDP_HOST_DEVICE constexpr std::size_t tail(std::uint32_t requester) const {
    return doorbell() + sizeof(DoorbellLine) + std::size_t(requester) * sizeof(TailLine);
  }
  SIDP_HOST_DEVICE constexpr std::size_t request(std::uint32_t requester, std::uint32_t slot) const {
    return tail(world) + (std::size_t(requester) * slots + slot) * kLine;  // one line each
  }
  SIDP_HOST_DEVICE constexpr std::size_t reply(std::uint32_t owner, std::uint32_t slot) const {
    return request(world, 0) + (std::size_t(owner) * slots + slot) * sizeof(ReplyRecord);
  }
  SIDP_HOST_DEVICE constexpr std::size_t rows_start() const {
    return (reply(world, 0) + kRegionAlignment - 1) / kRegionAlignment * kRegionAlignment;
  }
  SIDP_HOST_DEVICE constexpr std::size_t request_rows(std::uint32_t requester, std::uint32_t slot) const {
    return rows_start() + (std::size_t(requester) * slots + slot) * max_rows * row_bytes;
  }
  SIDP_HOST_DEVICE constexpr std::size_t reply_rows(std::uint32_t owner, std::uint32_t slot) const {
    return request_rows(world, 0) + (std::size_t(owner) * slots + slot) * max_rows * reply_row_bytes;
  }
  SIDP_HOST_DEVICE constexpr std::size_t bytes() const {
    return (reply_rows(world, 0) + kRegionAlignment - 1) / kRegionAlignment * kRegionAlignment;
  }
};

// The requester's error word (its own memory, 64 bits): 0 means no error. The first error stays.
//   bits 0-7 Fault, 8-15 Status of a refused request, 16-31 owner, 32-63 low half of the sequence
enum class Fault : std::uint32_t { kNone = 0, kTimeout = 1, kAborted = 2, kRefused = 3, kSequence = 4, kInternal = 5 };

SIDP_HOST_DEVICE constexpr std::uint64_t error_word(Fault fault, std::uint32_t status, std::uint32_t owner,
                                                    std::uint64_t sequence) {
  return std::uint64_t(fault) | (std::uint64_t(status & 0xff) << 8) | (std::uint64_t(owner & 0xffff) << 16) |
         (sequence << 32);
}
SIDP_HOST_DEVICE constexpr Fault error_fault(std::uint64_t word) { return static_cast<Fault>(word & 0xff); }
SIDP_HOST_DEVICE constexpr std::uint32_t error_status(std::uint64_t word) { return (word >> 8) & 0xff; }
SIDP_HOST_DEVICE constexpr std::uint32_t error_owner(std::uint64_t word) { return (word >> 16) & 0xffff; }
SIDP_HOST_DEVICE constexpr std::uint32_t error_sequence(std::uint64_t word) { return std::uint32_t(word >> 32); }

// O2. `expected_hidden` 0: this owner does not hold the layer. The record was copied out of the slot first, so that a
// requester that writes on meanwhile cannot change what has been checked.
SIDP_HOST_DEVICE constexpr Status check_request(const RequestRecord& record, std::uint64_t sequence,
                                                std::uint64_t pool_id, std::uint32_t max_rows,
                                                std::uint32_t expected_hidden, std::uint16_t expected_dtype,
                                                std::uint16_t expected_flags) {
  return record.sequence != sequence          ? Status::kBadSequence
         : record.pool_id != pool_id          ? Status::kBadPool
         : expected_hidden == 0               ? Status::kBadLayer
         : record.rows == 0                   ? Status::kBadRows
         : record.rows > max_rows             ? Status::kBadRows
         : record.hidden != expected_hidden   ? Status::kBadHidden
         : record.dtype != expected_dtype     ? Status::kBadDtype
         : record.flags != expected_flags     ? Status::kBadDtype
                                              : Status::kOk;
}

}  // namespace cas
}  // namespace sidp
