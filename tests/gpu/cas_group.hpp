// What the cases of cas_selftest stand on: the float64 reference, a rank's server and requester, a group of them in one process.
#pragma once

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cas_server/cuda_requester.hpp"
#include "../../csrc/cas_server/cuda_server.hpp"

namespace selftest {

using namespace sidp;
using namespace sidp::cas;

constexpr std::uint32_t kHidden = 384, kInner = 832, kMaxRows = 16, kSlots = 2;
constexpr std::uint64_t kPool = 4711;
constexpr std::size_t kBellBytes = kMaxWorld * sizeof(BellLine);

inline double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(std::uint16_t x) {
  const std::uint32_t bits = std::uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

using Matrix = std::vector<std::uint16_t>;

inline Matrix random_matrix(std::size_t rows, std::size_t columns, float scale, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, scale);
  Matrix result(rows * columns);
  for (auto& value : result) value = to_bf16(normal(random));
  return result;
}

// One layer's weights, the same in every process: drawn from the layer's number.
struct Layer {
  Matrix gate, up, down;
  explicit Layer(unsigned number) {
    std::mt19937 random(1000 + number);
    gate = random_matrix(kInner, kHidden, 0.05f, random);
    up = random_matrix(kInner, kHidden, 0.05f, random);
    down = random_matrix(kHidden, kInner, 0.04f, random);
  }

  // Relative Frobenius error of y against float64.
  double error(const Matrix& x, const Matrix& y) const {
    double difference = 0, norm = 0;
    for (std::size_t row = 0; row * kHidden < x.size(); ++row) {
      std::vector<double> inner(kInner);
      for (std::size_t i = 0; i < kInner; ++i) {
        double g = 0, u = 0;
        for (std::size_t k = 0; k < kHidden; ++k) {
          g += double(from_bf16(gate[i * kHidden + k])) * from_bf16(x[row * kHidden + k]);
          u += double(from_bf16(up[i * kHidden + k])) * from_bf16(x[row * kHidden + k]);
        }
        inner[i] = g / (1 + std::exp(-g)) * u;
      }
      for (std::size_t c = 0; c < kHidden; ++c) {
        double sum = 0;
        for (std::size_t i = 0; i < kInner; ++i) sum += inner[i] * from_bf16(down[c * kInner + i]);
        const double d = sum - from_bf16(y[row * kHidden + c]);
        difference += d * d;
        norm += sum * sum;
      }
    }
    const double result = std::sqrt(difference / norm);
    return std::isnan(result) ? 1e9 : result;
  }
};

inline const Layer& layer(unsigned number) {
  static std::vector<std::unique_ptr<Layer>> layers(16);
  if (!layers[number]) layers[number] = std::make_unique<Layer>(number);
  return *layers[number];
}

template <typename T>
DeviceMemory on_device(const std::vector<T>& values) {
  DeviceMemory memory(values.size() * sizeof(T));
  SIDP_CUDA_CHECK(cudaMemcpy(memory.as<void>(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return memory;
}

struct Stream {
  cudaStream_t stream = nullptr;
  Stream() { SIDP_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream); }
};

// The weights an owner holds: whole layers, or its slice of every layer.
struct Weights {
  std::vector<DeviceMemory> memory;
  UnitPointers slice(const Layer& whole, unsigned part, unsigned parts) {
    const std::size_t inner = kInner / parts;
    Matrix down;
    for (std::size_t c = 0; c < kHidden; ++c)
      down.insert(down.end(), whole.down.begin() + c * kInner + part * inner,
                  whole.down.begin() + c * kInner + (part + 1) * inner);
    auto rows = [&](const Matrix& m) {
      return Matrix(m.begin() + part * inner * kHidden, m.begin() + (part + 1) * inner * kHidden);
    };
    const std::size_t first = memory.size();
    memory.push_back(on_device(rows(whole.gate)));
    memory.push_back(on_device(rows(whole.up)));
    memory.push_back(on_device(down));
    UnitPointers pointers;
    pointers.gate = memory[first].as<void>();
    pointers.up = memory[first + 1].as<void>();
    pointers.down = memory[first + 2].as<void>();
    return pointers;
  }
};

struct Options {
  unsigned world = 2, layers = 4, sms = 8;
  bool striped = false, plain = false, start = true;
  double idle_ms = 1, run_ms = 10, timeout_s = 5;
};

inline Geometry geometry_of(const Options& o) {
  return Geometry::make(o.world, kSlots, kMaxRows, kHidden, 2, o.striped ? 4 : 2);
}

// One rank: its server (owner of the layers rank mod world, or of a slice of all) and its requester.
struct Rank {
  Options options;
  unsigned rank;
  Weights weights;
  std::unique_ptr<CudaRequester> requester;
  std::unique_ptr<CudaServer> server;
  Stream stream;

  // `bells` by rank, as device and host see them.
  Rank(const Options& o, unsigned number, void* region, const std::vector<void*>& regions, const std::vector<void*>& bells)
      : options(o), rank(number) {
    CudaRequesterConfig asks;
    asks.pool_id = kPool;
    asks.rank = rank;
    asks.hidden = kHidden;
    asks.timeout_s = o.timeout_s;
    requester = std::make_unique<CudaRequester>(asks, geometry_of(o), region, regions, bells);
    CudaServerConfig config;
    config.sms = o.sms;
    config.layers = o.layers;
    config.hidden = kHidden;
    config.intermediate = o.striped ? kInner / o.world : kInner;
    config.reply_float32 = o.striped;
    config.pool_id = kPool;
    config.rank = rank;
    config.idle_ms = o.idle_ms;
    config.run_ms = o.run_ms;
    config.stall_s = 5;
    config.plain = o.plain;
    config.asks = requester.get();
    server = std::make_unique<CudaServer>(config, geometry_of(o), region, regions, bells[rank]);
    for (unsigned l = 0; l < o.layers; ++l) {
      if (!o.striped && l % o.world != rank) continue;
      server->register_unit(l, o.striped ? weights.slice(layer(l), rank, o.world) : weights.slice(layer(l), 0, 1),
                            UnitShape{kHidden, config.intermediate, Activation::kSilu});
    }
    if (o.start) server->start();
  }

  // Whole requests go to the layer's owner, in `striped` to all.
  RowsArgument target(unsigned l, const void* rows, unsigned count) const {
    return {const_cast<void*>(rows), kHidden * 2, count, l, options.striped ? 0 : l % options.world,
            options.striped ? options.world : 1};
  }
  void push(unsigned l, const void* x, unsigned rows, cudaStream_t s) {
    server->push(*requester, target(l, x, rows), options.striped, s);
  }
  void wait(unsigned l, void* y, unsigned rows, cudaStream_t s) {
    requester->wait(target(l, y, rows), options.striped, s);
  }
};

struct Group {
  std::vector<DeviceMemory> regions;
  std::vector<MappedHostMemory> bells;
  std::vector<std::unique_ptr<Rank>> ranks;
  explicit Group(const Options& o) {
    std::vector<void*> pointers, pages;
    for (unsigned r = 0; r < o.world; ++r) {
      regions.emplace_back(geometry_of(o).bytes());
      pointers.push_back(regions.back().as<void>());
      bells.emplace_back(kBellBytes);
      pages.push_back(bells.back().as<void>());
    }
    SIDP_CUDA_CHECK(cudaDeviceSynchronize());
    for (unsigned r = 0; r < o.world; ++r) ranks.push_back(std::make_unique<Rank>(o, r, pointers[r], pointers, pages));
  }
};

// One request with its buffers; y starts poisoned.
struct Request {
  unsigned l, rows;
  Matrix x;
  DeviceMemory x_device, y_device;
  Request(unsigned number, unsigned count, std::mt19937& random)
      : l(number), rows(count), x(random_matrix(count, kHidden, 1.0f, random)), x_device(on_device(x)),
        y_device(on_device(Matrix(std::size_t(count) * kHidden, 0x7fc0))) {}
  double error() const {
    Matrix y(x.size());
    SIDP_CUDA_CHECK(cudaMemcpy(y.data(), y_device.as<void>(), y.size() * 2, cudaMemcpyDeviceToHost));
    return layer(l).error(x, y);
  }
};

inline int failures = 0;

inline void expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}
inline void expect_error(double error, const std::string& where) {
  expect(error < 6e-3, where + ": relative error " + std::to_string(error));
}

inline void stop(Group& group) {
  for (auto& rank : group.ranks) rank->server->stop();
}

}  // namespace selftest
