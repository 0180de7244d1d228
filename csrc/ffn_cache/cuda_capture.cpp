#include "cuda_capture.hpp"

#include <cuda_runtime.h>

#include <algorithm>

#include "../cuda_check.hpp"
#include "../error.hpp"
#include "cuda_ring.hpp"

namespace sidp::cache {
namespace {

void add_dependency(cudaStream_t stream, cudaGraphNode_t node) {
#if CUDART_VERSION >= 13000
  SIDP_CUDA_CHECK(cudaStreamUpdateCaptureDependencies(stream, &node, nullptr, 1, cudaStreamAddCaptureDependencies));
#else
  SIDP_CUDA_CHECK(cudaStreamUpdateCaptureDependencies(stream, &node, 1, cudaStreamAddCaptureDependencies));
#endif
}

bool contains(const std::vector<cudaGraphNode_t>& nodes, cudaGraphNode_t node) {
  return std::find(nodes.begin(), nodes.end(), node) != nodes.end();
}

}  // namespace

CaptureView view_capture(cudaStream_t stream) {
  CaptureView view;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaGraphNode_t* nodes = nullptr;
  std::size_t count = 0;
#if CUDART_VERSION >= 13000
  SIDP_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &view.id, &view.graph, &nodes, nullptr, &count));
#else
  SIDP_CUDA_CHECK(cudaStreamGetCaptureInfo_v2(stream, &status, &view.id, &view.graph, &nodes, &count));
#endif
  SIDP_ASSERT(status == cudaStreamCaptureStatusActive, "status ", static_cast<int>(status));
  view.nodes.assign(nodes, nodes + count);
  return view;
}

CudaCapture::CudaCapture(CudaRing& ring, unsigned long long id, int first_index, cudaStream_t stream)
    : ring_(ring),
      id_(id),
      plan_(ring.schedule_),
      ready_(ring.schedule_.slots(), nullptr),
      readers_(ring.schedule_.slots()),
      content_(ring.schedule_.slots(), -1) {
  const std::vector<Fetch> assumed = assumed_fetches(first_index);
  EnsureArguments arguments = ring.ensure_arguments();
  for (const Fetch& fetch : assumed) {
    arguments.slot[arguments.count] = static_cast<std::int16_t>(fetch.slot);
    arguments.index[arguments.count++] = fetch.index;
  }
  if (ring.options_.hand_over == HandOver::events) {
    SIDP_CUDA_CHECK(cudaStreamWaitEvent(stream, ring.copy_tail_.get(), cudaEventWaitExternal));
  } else {
    arguments.done = ring.done_word();
    arguments.issued = ring.issued_word();
    arguments.issued_before = ring.batches_;
  }
  launch_ensure(arguments, stream);
  const CaptureView view = view_capture(stream);
  SIDP_ASSERT(view.nodes.size() == 1, "the entering kernel has ", view.nodes.size(), " nodes");
  graph_ = view.graph;
  last_ = view.nodes[0];
  std::fill(ready_.begin(), ready_.end(), last_);
  plan_.start_at(first_index);
  for (assumed_ = 0; assumed_ < assumed.size(); ++assumed_) {
    const Fetch fetch = *plan_.next();
    content_[fetch.slot] = fetch.index;
  }
  given_ = assumed_;
}

// What the end of a replay has fetched for the next one: the first fetches in order, up to the slot that the last use of a
// forward sets free. To fetch that one too would only make the graph's end wait for it; the next replay begins with it.
std::vector<Fetch> CudaCapture::assumed_fetches(int first_index) const {
  const FetchSchedule& schedule = ring_.schedule_;
  const int last_index = (first_index + schedule.num_remote() - 1) % schedule.num_remote();
  const bool all_fit = schedule.num_remote() <= schedule.slots();
  IssuePlan plan(schedule);
  plan.start_at(first_index);
  std::vector<Fetch> list;
  std::vector<bool> taken(schedule.slots(), false);
  while (list.size() < kMostEnsured) {
    const std::optional<Fetch> fetch = plan.next();
    if (!fetch || taken[fetch->slot] || (!all_fit && fetch->slot == schedule.slot(last_index))) break;
    taken[fetch->slot] = true;
    list.push_back(*fetch);
  }
  return list;
}

void CudaCapture::acquire(int index, cudaStream_t stream) {
  const auto remote = static_cast<std::uint64_t>(ring_.schedule_.num_remote());
  const bool waits = plan_.claim(index, [&] {
    if (plan_.restarts() != restarts_) {
      restarts_ = plan_.restarts();
      uses_before_ = plan_.uses();
      given_ = 0;
      assumed_ = assumed_fetches(index).size();
    }
    issue((plan_.uses() - uses_before_) / remote + 1);
  });
  const cudaGraphNode_t ready = ready_[ring_.schedule_.slot(index)];
  if (waits && !contains(view_capture(stream).nodes, ready)) add_dependency(stream, ready);
}

void CudaCapture::release(int index, cudaStream_t stream) {
  if (!plan_.release(index)) return;
  const auto remote = static_cast<std::uint64_t>(ring_.schedule_.num_remote());
  std::vector<cudaGraphNode_t>& readers = readers_[ring_.schedule_.slot(index)];
  for (cudaGraphNode_t node : view_capture(stream).nodes)
    if (!contains(readers, node)) readers.push_back(node);
  const std::uint64_t uses = plan_.uses() - uses_before_;
  issue(uses == 0 ? 1 : (uses - 1) / remote + 1);
}

// Gives the fetches that `forwards` forwards need, and those that the next replay assumes.
void CudaCapture::issue(std::uint64_t forwards) {
  const std::uint64_t most = forwards * static_cast<std::uint64_t>(ring_.schedule_.num_remote()) + assumed_;
  while (given_ < most) {
    const std::optional<Fetch> fetch = plan_.next();
    if (!fetch) return;
    ++given_;
    add_fetch(*fetch);
  }
}

void CudaCapture::add_fetch(const Fetch& fetch) {
  if (content_[fetch.slot] == fetch.index) return;
  std::vector<cudaGraphNode_t> after = readers_[fetch.slot];
  if (!contains(after, last_)) after.push_back(last_);
  const UnitCopies& unit = ring_.copies_[fetch.index];
  std::vector<cudaGraphNode_t> ends;
  for (const std::vector<OwnerCopies>* list : {&unit.remote, &unit.own})
    if (!list->empty()) ends.push_back(add_copies(*list, fetch.slot, after));
  cudaGraphNode_t arrived = nullptr;
  SIDP_CUDA_CHECK(cudaGraphAddMemcpyNode1D(&arrived, graph_, ends.data(), ends.size(), ring_.content_word(fetch.slot),
                                           ring_.index_word(fetch.index), sizeof(std::int32_t), cudaMemcpyHostToDevice));
  last_ = arrived;
  ready_[fetch.slot] = arrived;
  count(fetch.index, arrived);
  readers_[fetch.slot].clear();
  content_[fetch.slot] = fetch.index;
}

// Beside the chain of fetches, so that no copy waits until a GEMM leaves an SM to this kernel.
void CudaCapture::count(int index, cudaGraphNode_t arrived) {
  PostArguments post{};
  post.host = ring_.host_.as<HostWords>();
  post.activity = ring_.options_.device_activity;
  post.bytes = ring_.remote_bytes_[index];
  const cudaGraphNode_t after[] = {arrived, counted_};
  counted_ = add_post_node(graph_, after, counted_ == nullptr ? 1 : 2, post);
}

// One after the other; the last of them.
cudaGraphNode_t CudaCapture::add_copies(const std::vector<OwnerCopies>& list, int slot, std::vector<cudaGraphNode_t> after) {
  const auto add_turn = [&](TurnEdge edge, const Turn& turn) {
    if (turn.words != nullptr) after.assign(1, add_turn_node(graph_, after.data(), after.size(), edge, turn));
  };
  for (const OwnerCopies& from : list) {
    add_turn(TurnEdge::begin, from.turn);
    for (const DeviceCopy& copy : from.copies) after.assign(1, add_copy(copy, slot, after));
    add_turn(TurnEdge::end, from.turn);
  }
  return after.front();
}

cudaGraphNode_t CudaCapture::add_copy(const DeviceCopy& copy, int slot, const std::vector<cudaGraphNode_t>& after) {
  std::uint8_t* target = ring_.slot_address(slot) + copy.target;
  cudaGraphNode_t node = nullptr;
  if (copy.height == 1) {
    SIDP_CUDA_CHECK(cudaGraphAddMemcpyNode1D(&node, graph_, after.data(), after.size(), target, copy.source, copy.width,
                                             cudaMemcpyDefault));
    return node;
  }
  cudaMemcpy3DParms rows{};
  rows.srcPtr = make_cudaPitchedPtr(const_cast<std::uint8_t*>(copy.source), copy.source_pitch, copy.width, copy.height);
  rows.dstPtr = make_cudaPitchedPtr(target, copy.target_pitch, copy.width, copy.height);
  rows.extent = make_cudaExtent(copy.width, copy.height, 1);
  rows.kind = cudaMemcpyDefault;
  SIDP_CUDA_CHECK(cudaGraphAddMemcpyNode(&node, graph_, after.data(), after.size(), &rows));
  return node;
}

}  // namespace sidp::cache
