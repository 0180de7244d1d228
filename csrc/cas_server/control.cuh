// The control role: one warp of CTA 0, lane r standing for requester r. It watches the mailboxes, elects a batch
// (O1-O3) and publishes it on the board for all CTAs; and what ends a batch (O6, O7). Used by every serving kernel.
// Which launch serves, and until when, is in server_life.cuh.
#pragma once

#include "server_life.cuh"

namespace sidp {
namespace cas {

// --- O6, O7 ---

__device__ inline void release_reply(const ServerArguments& args, u32 requester, u64 sequence, Status status, u32 rows,
                                     u32 batch_rows, u32 batch_requests, u64 service_ns) {
  std::uint8_t* region = args.peer_region[requester];
  if (region == nullptr) return;
  auto* reply = reinterpret_cast<ReplyRecord*>(
      region + args.geometry.reply(args.rank, slot_of(sequence, args.geometry.slots)));
  reply->batch_rows = batch_rows;
  reply->batch_requests = batch_requests;
  reply->service_ns = service_ns;
  store_pair_release_sys(&reply->sequence, Pair{sequence, static_cast<u32>(status) | u64(rows) << 32});
}

// One warp, once all result rows of the batch have been written and fenced: answers every request, opens the buffers of
// this parity to the batch after the next.
__device__ inline void complete_batch(const ServerArguments& args, const Batch& batch) {
  const u32 lane = threadIdx.x % 32;
  const u64 service_ns = now_ns() - batch.elected_ns;
  if (lane < batch.requests) {
    const BatchRequest request = batch.request[lane];
    release_reply(args, request.requester, request.sequence, Status::kOk, request.rows, batch.rows, batch.requests,
                  service_ns);
  }
  __syncwarp();
  if (lane == 0) {
    ServerState::Progress& progress = args.state->progress[batch.id % 2];
    progress.gathered = 0;
    progress.inner = 0;
    progress.finished = 0;
    args.state->counters.batches += 1;
    args.state->counters.fused_batches += batch.requests > 1;
    args.state->counters.requests += batch.requests;
    args.state->counters.rows += batch.rows;
    args.state->counters.busy_ns += service_ns;
    store_release_gpu(&args.state->completed, batch.id);
  }
}

// --- O1-O3 ---

// What the control warp remembers during a launch, per lane.
struct Control {
  u64 served;
  u64 tail;
  u64 refused;
  u64 started_ns;
  u64 active_ns;  // when a batch was last elected
  u32 turn;
  u32 polls;
  bool reads;  // this lane has a requester, not retired, not broken
  bool stop;
  bool waits;   // this rank has requests of its own under way, and this launch does not give way
  u32 arrived;       // of this rank's announced requests, modulo 2^32
  u64 arrived_ns;    // when that last changed, or nothing was to come
  bool worked;  // in this launch
};

__device__ inline Control begin_control(const ServerArguments& args) {
  const u32 lane = threadIdx.x % 32;
  Control control = {};
  control.served = args.state->served[lane];
  control.tail = control.served;
  control.started_ns = control.active_ns = control.arrived_ns = __shfl_sync(kAllLanes, now_ns(), 0);
  control.turn = args.state->turn;
  control.reads = lane < args.geometry.world && args.peer_region[lane] != nullptr &&
                  (args.state->broken >> lane & 1) == 0;
  return control;
}

__device__ inline void end_control(const ServerArguments& args, const Control& control) {
  const u32 lane = threadIdx.x % 32;
  args.state->served[lane] = control.served;
  u64 refused = control.refused;
  for (int distance = 16; distance > 0; distance /= 2) refused += __shfl_xor_sync(kAllLanes, refused, distance);
  if (lane == 0) {
    args.state->turn = control.turn;
    args.state->counters.refused += refused;
    args.state->counters.launches += 1;
    args.host->counters = args.state->counters;
  }
  __threadfence_system();
}

// The oldest request of this lane's requester, checked; refuses what does not hold and goes on to the next.
__device__ inline bool head_request(const ServerArguments& args, Control& control, u32& layer, u32& rows) {
  const u32 lane = threadIdx.x % 32;
  while (control.served != control.tail) {
    const u64 sequence = control.served + 1;
    const auto* slot = reinterpret_cast<const uint4*>(
        args.region + args.geometry.request(lane, slot_of(sequence, args.geometry.slots)));
    union {
      uint4 words[2];
      RequestRecord record;
    } copy = {};
    copy.words[0] = __ldcg(slot);
    copy.words[1] = __ldcg(slot + 1);
    const RequestRecord& record = copy.record;
    const bool known = record.layer < args.layers && (args.held[record.layer / 32] >> record.layer % 32 & 1) != 0;
    const Status status = check_request(record, sequence, args.pool_id, args.geometry.max_rows, known ? args.hidden : 0,
                                        args.dtype, args.reply_flags);
    if (status == Status::kOk) {
      layer = record.layer;
      rows = record.rows;
      return true;
    }
    release_reply(args, lane, sequence, status, 0, 0, 0, 0);
    control.served = sequence;
    control.refused += 1;
  }
  return false;
}

__device__ inline bool waiting_request(const ServerArguments& args, Control& control, u32& layer, u32& rows) {
  const u32 lane = threadIdx.x % 32;
  if (!control.reads) return false;
  control.tail = load_acquire_sys(reinterpret_cast<const u64*>(args.region + args.geometry.tail(lane)));
  if (control.tail - control.served > args.geometry.slots) {  // also where it went backwards
    control.reads = false;
    control.refused += 1;
    control.tail = control.served;
    atomicOr(&args.state->broken, 1u << lane);
    return false;
  }
  return head_request(args, control, layer, rows);
}

// The weight loaders of all CTAs start on this; everybody else waits for the whole batch.
__device__ inline void publish_headline(const ServerArguments& args, const Headline& line) {
  store_pair_relaxed_gpu(&args.state->headline[line.id % 2], Pair{line.id | u64(static_cast<u32>(line.kind)) << 32,
                                                                  line.layer | u64(line.rows) << 32});
}

__device__ inline Headline wait_headline(const ServerArguments& args, u32 id) {
  Pair pair = {};
  if (!spin_until(
          [&] {
            pair = load_pair_relaxed_gpu(&args.state->headline[id % 2]);
            return static_cast<u32>(pair.first) == id;
          },
          args.run_ns + 2 * args.stall_ns))
    fail(args, ServerFault::kBoard, id);
  return Headline{id, static_cast<BatchKind>(pair.first >> 32), static_cast<u32>(pair.second),
                  static_cast<u32>(pair.second >> 32)};
}

// Fills `batch` with the waiting requests for one unit; false where nothing waits.
__device__ inline bool elect(const ServerArguments& args, Control& control, Batch* batch, u32 id) {
  const u32 lane = threadIdx.x % 32;
  u32 layer = 0, rows = 0;
  bool waiting = waiting_request(args, control, layer, rows);
  const u32 ready = __ballot_sync(kAllLanes, waiting);
  if (ready == 0) return false;
  const u32 leader = (__ffs(__funnelshift_r(ready, ready, control.turn)) - 1 + control.turn) % 32;
  const u32 unit = __shfl_sync(kAllLanes, layer, leader);
  const u32 requester = (lane + leader) % 32;  // in the order of choice this lane stands for that requester
  u32 total = 0, count = 0;
  while (true) {
    const u32 wanted = __shfl_sync(kAllLanes, waiting && layer == unit ? rows : 0, requester);
    const u64 sequence = __shfl_sync(kAllLanes, control.served + 1, requester);
    u32 until = wanted;  // inclusive sum over the order of choice
    for (u32 distance = 1; distance < 32; distance *= 2) {
      const u32 before = __shfl_up_sync(kAllLanes, until, distance);
      if (lane >= distance) until += before;
    }
    const u32 place = count + __popc(__ballot_sync(kAllLanes, wanted > 0) & ((1u << lane) - 1));
    const bool fits = wanted > 0 && total + until <= args.row_limit && place < kMaxBatchRequests;
    if (fits) {
      batch->request[place] = BatchRequest{sequence, static_cast<u16>(requester),
                                           static_cast<u16>(slot_of(sequence, args.geometry.slots)),
                                           static_cast<u16>(total + until - wanted), static_cast<u16>(wanted)};
    }
    const u32 taken = __ballot_sync(kAllLanes, fits);
    if (taken == 0) break;
    count += __popc(taken);
    total += __shfl_sync(kAllLanes, until, 31 - __clz(taken));
    if (taken >> ((lane - leader) % 32) & 1) {
      control.served += 1;
      waiting = head_request(args, control, layer, rows);
    }
  }
  if (lane == 0) publish_headline(args, Headline{id, BatchKind::kWork, unit, total});
  if (lane == 0) {
    batch->id = id;
    batch->kind = BatchKind::kWork;
    batch->layer = unit;
    batch->rows = total;
    batch->requests = count;
    batch->elected_ns = now_ns();
  }
  control.turn = (leader + 1) % args.geometry.world;
  return true;
}

__device__ inline void wait_completed(const ServerArguments& args, u32 id) {
  if (!spin_until([&] { return reached(load_acquire_gpu(&args.state->completed), id); }, args.stall_ns))
    fail(args, ServerFault::kComplete, id);
}

// What only the host and this rank's requester know; far away, so looked at now and then.
__device__ inline void look_around(const ServerArguments& args, Control& control) {
  const volatile ServerHostWords* host = args.host;
  control.stop = host->stop != 0;
  if (host->retired >> (threadIdx.x % 32) & 1) control.reads = false;
  const OwnRequests own = own_requests(args);
  const u64 now = __shfl_sync(kAllLanes, now_ns(), 0);
  if (!own.coming || static_cast<u32>(own.arrived) != control.arrived) control.arrived_ns = now;
  control.arrived = static_cast<u32>(own.arrived);
  control.waits = own.open || (own.coming && !gives_way(args, control.arrived_ns, now));
}

// The next batch in `batch`; false once this launch is to end. A launch that finds nothing at its start and whose own rank does
// not wait leaves at once: it would hold its SMs for nothing.
__device__ inline bool next_batch(const ServerArguments& args, Control& control, Batch* batch, u32 id) {
  bool work = false;
  while (true) {
    if (control.polls++ % 64 == 0) look_around(args, control);
    const u64 now = __shfl_sync(kAllLanes, now_ns(), 0);
    if (control.waits) {
      control.active_ns = now;
      control.worked = true;
    }
    auto over = [&] { return control.stop || (now - control.started_ns > args.run_ns && !control.waits); };
    work = !over() && elect(args, control, batch, id);
    if (!work && (over() || (!control.waits && (!control.worked || now - control.active_ns > args.idle_ns)))) {
      LifeAccess life{args, control.served};
      const bool left = leaves(life, [&] {
        __syncwarp();  // no lane looks before lane 0 has said that the server ends
        look_around(args, control);
        work = !over() && elect(args, control, batch, id);
        return work || (control.waits && !control.stop);
      });
      if (left) return false;
    }
    if (work) {
      control.active_ns = now;
      control.worked = true;
      return true;
    }
  }
}

// Publishes batch `id`: work, or the exit. `may_elect` says when this CTA is nearly through with batch id - 1: electing earlier
// would miss requests that could still be fused.
template <typename MayElect>
__device__ inline void publish_batch(const ServerArguments& args, Control& control, u32 id, MayElect may_elect) {
  const u32 lane = threadIdx.x % 32;
  Batch* batch = &args.state->board[id % 2];
  wait_completed(args, id - 2);  // the last user of this board entry and of this parity's buffers
  if (!spin_until(may_elect, args.stall_ns)) fail(args, ServerFault::kRing, id);
  if (!next_batch(args, control, batch, id)) {
    wait_completed(args, id - 1);
    if (lane == 0) {
      publish_headline(args, Headline{id, BatchKind::kExit, 0, 0});
      batch->id = id;
      batch->kind = BatchKind::kExit;
      batch->rows = batch->requests = 0;
      store_release_gpu(&args.state->completed, id);
    }
    end_control(args, control);
  }
  __syncwarp();
  if (lane == 0) {
    store_release_gpu(&args.state->board_sequence, id);
  }
}

// A CTA's own copy of a batch, with its rows' addresses.
struct SharedBatch {
  Batch batch;
  const std::uint8_t* source[kMaxBatchRows];  // the row in the requester's slot here
  std::uint8_t* target[kMaxBatchRows];        // the row in the reply slot there
};

// One warp of every CTA: waits for batch `id` on the board and copies it.
__device__ inline void receive_batch(const ServerArguments& args, u32 id, SharedBatch& here) {
  const u32 lane = threadIdx.x % 32;
  if (!spin_until([&] { return reached(load_acquire_gpu(&args.state->board_sequence), id); },
                  args.run_ns + 2 * args.stall_ns))
    fail(args, ServerFault::kBoard, id);
  const auto* entry = reinterpret_cast<const uint4*>(&args.state->board[id % 2]);
  for (u32 i = lane; i < sizeof(Batch) / sizeof(uint4); i += 32)
    reinterpret_cast<uint4*>(&here.batch)[i] = __ldcg(entry + i);
  __syncwarp();
  const Geometry& geometry = args.geometry;
  for (u32 q = 0; q < here.batch.requests; ++q) {
    const BatchRequest request = here.batch.request[q];
    for (u32 i = lane; i < request.rows; i += 32) {
      here.source[request.first_row + i] = args.region + geometry.request_rows(request.requester, request.slot) +
                                           std::size_t(i) * geometry.row_bytes;
      here.target[request.first_row + i] = args.peer_region[request.requester] +
                                           geometry.reply_rows(args.rank, request.slot) +
                                           std::size_t(i) * geometry.reply_row_bytes;
    }
  }
  __syncwarp();
}

}  // namespace cas
}  // namespace sidp
