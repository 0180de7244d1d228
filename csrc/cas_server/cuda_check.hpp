// Error checks and memory of the CUDA runtime live in the core, because the ring and the arenas use them too.
#pragma once

#include "../cuda_check.hpp"
