// When the CUDA server of a rank runs. An idle server has nothing on the GPU; a launch of the serving kernel ends by itself and
// any number of launches may come, from the launching thread, from the engine's thread and late ones from streams that
// stood still. These decisions make one of them serve; docs/models/life.pml is this protocol for the model checker,
// tests/cpp/life_stress.cpp runs these functions with threads, control.cuh in the kernel.
//
//   L1 a launch says that it has begun, fences, and only then looks at `life`
//   L2 `serving`: another one serves, and will look again before it ends (L5): this launch leaves
//   L3 `free`: whoever swaps it to `serving` serves, and says `running`; `leaving`: wait for what becomes of it
//   L4 a server that finds nothing to do sets `leaving`, takes `running` back, fences
//   L5 ... and looks once more at the requests and at what its own rank has announced; if there is anything, it goes on as
//      before: `serving`, `running`
//   L6 else the last CTA to leave sets `free`
//
// On the host a request is announced, fence, and only then `running` and whether the newest launch has begun are looked at:
//   H1 `running`: the server will look at the announcement before it ends (L5)
//   H2 the newest launch has not begun: it will look at `life` after the announcement (L1)
//   H3 neither: launch
// So a rank that waits for others has a server of its own all that time, without the launching thread, which may be kept from
// launching by whoever holds the driver's locks meanwhile.
//
// A model's layers ask an owner about every millisecond. A server that ended between two of them would have to be launched for each, and
// could not be while its rank launches a graph: with thousands of nodes that takes 5 ms and more, in which the driver lets nobody
// else launch. So a launch that comes soon after the server before it ended stays longer without work (stay_ns).
//
// A request that is announced may never be pushed while the server runs: CUDA, when it loads a kernel, can have all that is
// enqueued later wait for all that runs. Therefore:
//   G1 a server that waits for announced requests alone, and sees none arrive for the bound of a launch, asks for relief
//   G2 the launching thread launches once more, in the same stream, where the launch begins when the server has ended, and says so
//   G3 then the server ends unless there is work or a pushed request (L4-L6); so it does without relief, after long, if the
//      launching thread cannot launch: better that everybody depends on it than that nobody gets on
#pragma once

#include "mailbox.hpp"

namespace sidp {
namespace cas {

enum class Life : std::uint32_t { kFree = 0, kServing = 1, kLeaving = 2 };

// L1-L3. `Access` has begun(), fence(), life(), swap_life(from, to), running(bool) and pause().
template <typename Access>
SIDP_HOST_DEVICE bool takes_over(Access& access) {
  access.begun();
  access.fence();
  while (true) {
    const Life life = access.life();
    if (life == Life::kServing) return false;
    if (life == Life::kFree && access.swap_life(Life::kFree, Life::kServing)) {
      access.running(true);
      return true;
    }
    access.pause();
  }
}

// L4, L5: whether the server ends. `needed()` looks at everything afresh.
template <typename Access, typename Needed>
SIDP_HOST_DEVICE bool leaves(Access& access, Needed needed) {
  access.set_life(Life::kLeaving);
  access.running(false);
  access.fence();
  if (!needed()) return true;
  access.set_life(Life::kServing);
  access.running(true);
  return false;
}

constexpr std::uint64_t kLongestStay = 5;  // times idle_ns

// How long a launch serves without work, where the server before it ended `pause_ns` ago.
constexpr std::uint64_t stay_ns(std::uint64_t pause_ns, std::uint64_t idle_ns) {
  return pause_ns < kLongestStay * idle_ns ? kLongestStay * idle_ns : idle_ns;
}

}  // namespace cas
}  // namespace sidp
