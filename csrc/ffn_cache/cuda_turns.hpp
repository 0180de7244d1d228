// Turns at an owner: of the ranks that read one owner's memory, one at a time does, in the order in which they came.
//
// Two words in each owner's arena, which every reader advances over the link by atomic addition:
//   taken  tickets given out
//   ended  turns that are over
// A reader draws ticket t = taken++, waits until ended >= t, reads, and adds one to ended. Numbers only grow, and a ticket that
// was drawn is ended once, whether its reader waited for its turn or gave up.
//
// Nothing that is computed depends on turns: they keep readers apart, no more. So a wait is bounded, and a reader that came to the
// bound (a rank died in its turn, or does not run) takes no turns any more: `turns_off` among its HostWords.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda_words.hpp"

namespace sidp::cache {

struct TurnWords {
  std::uint64_t taken;
  std::uint64_t ended;
};

constexpr std::uint64_t kTurnBoundNs = 1'000'000'000;  // far above the turns of a node's other GPUs, even over PCIe

struct Turn {
  TurnWords* words;     // the owner's
  std::uint32_t* held;  // this rank's: a ticket was drawn there and its turn has not ended
  HostWords* host;      // this rank's
};

enum class TurnEdge { begin, end };

void launch_turn(TurnEdge edge, const Turn& turn, cudaStream_t stream);
cudaGraphNode_t add_turn_node(cudaGraph_t graph, const cudaGraphNode_t* after, std::size_t count, TurnEdge edge, Turn turn);
// Loads the kernels, so that none is loaded while a stream is captured.
void preload_turn_kernels();

}  // namespace sidp::cache
