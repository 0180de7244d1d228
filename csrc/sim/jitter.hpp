// Small random differences between ranks that would otherwise stay in step for ever. The same with every standard library.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace sidp::sim {

class Jitter {
 public:
  Jitter(double size, std::uint64_t seed) : size_(size), draw_(seed) {}

  // 1 +- size, evenly.
  double factor() { return size_ == 0 ? 1 : 1 + size_ * (static_cast<double>(draw_() >> 11) * 0x1p-52 - 1); }

  double one_of(const std::vector<double>& measured) { return measured[draw_() % measured.size()]; }

 private:
  double size_;
  std::mt19937_64 draw_;
};

}  // namespace sidp::sim
