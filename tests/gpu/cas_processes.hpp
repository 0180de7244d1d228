#pragma once

#include "cas_group.hpp"

namespace selftest {

// Ranks as forked processes on one device, asking each other at random; `killed`: the last one is killed on the way, and the others
// must say so.
void run_ipc(unsigned world, bool killed);

}  // namespace selftest
