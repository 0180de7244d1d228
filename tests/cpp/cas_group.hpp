// A small CaS group for the C++ tests, fuzzers and benches: the mailbox regions of four ranks, a multiplication in place
// of a BLAS, and layers whose result is an exact function of the input: y = (layer + 1) x for x >= 0.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cas_server/cpu_requester.hpp"
#include "cas_server/cpu_server.hpp"

namespace sidp::cas::cpu::testing {

constexpr int kWorld = 4;
constexpr int kLayers = 8;
constexpr std::uint32_t kHidden = 16;
constexpr std::uint64_t kPool = 77;

// Column-major, only what Blas::multiply asks for.
inline void plain_sgemm(const char* trans, const char*, const std::int64_t* m, const std::int64_t* n, const std::int64_t* k,
                        const float*, const float* a, const std::int64_t* lda, const float* b, const std::int64_t* ldb,
                        const float* beta, float* c, const std::int64_t* ldc, std::size_t, std::size_t) {
  for (std::int64_t j = 0; j < *n; ++j)
    for (std::int64_t i = 0; i < *m; ++i) {
      float sum = *beta == 0 ? 0 : c[i + j * *ldc];
      for (std::int64_t t = 0; t < *k; ++t) sum += (*trans == 'T' ? a[t + i * *lda] : a[i + t * *lda]) * b[t + j * *ldb];
      c[i + j * *ldc] = sum;
    }
}

// up = (layer + 1) times the identity, down = the identity, relu. In `striped` each owner holds a quarter of the
// intermediate dimension.
struct Weights {
  std::vector<float> up, down;
  FfnSlice slice;

  Weights(int layer, int owner, bool striped) {
    const std::uint32_t inner = striped ? kHidden / kWorld : kHidden;
    const std::uint32_t begin = striped ? inner * static_cast<std::uint32_t>(owner) : 0;
    up.assign(inner * kHidden, 0);
    down.assign(kHidden * inner, 0);
    for (std::uint32_t i = 0; i < inner; ++i) {
      up[i * kHidden + begin + i] = static_cast<float>(layer + 1);
      down[(begin + i) * inner + i] = 1;
    }
    slice.hidden = kHidden;
    slice.inner = inner;
    slice.activation = Activation::kRelu;
    slice.up = {reinterpret_cast<const std::byte*>(up.data()), kHidden, false};
    slice.down = {reinterpret_cast<const std::byte*>(down.data()), inner, false};
  }
};

// The regions of all ranks. Between threads each is an allocation of its own and of exactly its size, so that
// AddressSanitizer sees what reaches beyond it; between processes they are shared mappings, made before the fork.
class Regions {
 public:
  enum class Between { threads, processes };

  Regions(bool striped, Between between)
      : striped_(striped), between_(between), geometry_(Geometry::make(kWorld, 2, 8, kHidden, 4, 4)) {
    for (int rank = 0; rank < kWorld; ++rank) {
      void* memory = between == Between::threads
                         ? std::aligned_alloc(kRegionAlignment, geometry_.bytes())
                         : mmap(nullptr, geometry_.bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
      if (memory == nullptr || memory == MAP_FAILED) throw std::runtime_error("no memory for a mailbox region");
      std::memset(memory, 0, geometry_.bytes());
      addresses_.push_back(static_cast<std::byte*>(memory));
      region(rank).write_header(kPool);
    }
  }
  ~Regions() {
    for (std::byte* address : addresses_)
      between_ == Between::threads ? std::free(address) : static_cast<void>(munmap(address, geometry_.bytes()));
  }
  Regions(const Regions&) = delete;
  Regions& operator=(const Regions&) = delete;

  bool striped() const { return striped_; }
  const Geometry& geometry() const { return geometry_; }
  std::byte* address(int rank) const { return addresses_[static_cast<std::size_t>(rank)]; }
  Region region(int rank) const { return Region(address(rank), geometry_); }

  RequesterOptions requester_options(int rank) const {
    RequesterOptions options;
    options.rank = rank;
    options.geometry = geometry_;
    options.pool_id = kPool;
    options.striped = striped_;
    options.regions = addresses_;
    for (int layer = 0; layer < kLayers; ++layer) options.layers.push_back({kHidden, Dtype::kFloat32, layer % kWorld});
    return options;
  }

 private:
  bool striped_;
  Between between_;
  Geometry geometry_;
  std::vector<std::byte*> addresses_;
};

// One rank's server over its layers: in `layer` placement every fourth, in `striped` a quarter of each.
class Owner {
 public:
  Owner(const Regions& regions, int rank, SgemmFunction sgemm = &plain_sgemm) {
    ServerOptions options;
    options.rank = rank;
    options.geometry = regions.geometry();
    options.pool_id = kPool;
    options.striped = regions.striped();
    for (int other = 0; other < kWorld; ++other) options.regions.push_back(regions.address(other));
    for (int layer = 0; layer < kLayers; ++layer) {
      weights_.push_back(std::make_unique<Weights>(layer, rank, regions.striped()));
      const bool held = regions.striped() || layer % kWorld == rank;
      options.layers.push_back(held ? weights_.back()->slice : FfnSlice{});
    }
    server_ = std::make_unique<CpuServer>(std::move(options), std::make_shared<Blas>(sgemm));
  }

  CpuServer& server() { return *server_; }

 private:
  std::vector<std::unique_ptr<Weights>> weights_;
  std::unique_ptr<CpuServer> server_;
};

}  // namespace sidp::cas::cpu::testing
