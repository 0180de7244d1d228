// CaS of one rank on a GPU: its server, its requester, and who watches the peers for both.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda_requester.hpp"
#include "cuda_server.hpp"
#include "p2p/peer_watch.hpp"

namespace sidp {
namespace cas {

struct CudaCasUnit {
  std::uint32_t layer = 0;
  UnitPointers pointers;
  UnitShape shape;
};

struct CudaCasOptions {
  int device = 0;
  std::uint32_t rank = 0;
  Geometry geometry = {};
  std::uint64_t pool_id = 0;
  bool striped = false;
  std::vector<void*> regions;  // by rank, as mapped here
  std::vector<void*> bells;    // by rank: its page of BellLines, as this device writes it
  const void* own_bells = nullptr;  // this rank's, as the host reads it
  std::uint32_t hidden = 0;
  Dtype dtype = Dtype::kBFloat16;
  std::vector<int> owners;     // by layer: whom to ask, -1 where nobody is asked; in `striped` all are
  std::vector<CudaCasUnit> units;  // that this rank serves
  unsigned sms = 0;            // 0: as many as measured best, fewer where ranks share the GPU
  unsigned ranks_here = 1;     // ranks that compute on this GPU, this one included
  double timeout_s = 60;
  std::shared_ptr<const PeerWatch> watch;
  std::uint64_t* activity = nullptr;  // counts calls, for peers that wait for this rank to finish
};

class CudaCas {
 public:
  // Writes this rank's region header; collective by its caller, who puts a barrier between this and the constructor.
  static void write_header(const Geometry& geometry, void* region, std::uint64_t pool_id, int device);

  // Checks the peers' headers and starts serving. LayoutError, ConfigError.
  explicit CudaCas(CudaCasOptions options);
  ~CudaCas() { stop(); }
  CudaCas(const CudaCas&) = delete;
  CudaCas& operator=(const CudaCas&) = delete;

  // Enqueues the FFN of `layer` on x [rows, hidden] (contiguous) into y, in pieces of at most max_rows. Can be captured. Calls of
  // one rank follow each other in stream order.
  void forward(std::uint32_t layer, const void* x, void* y, std::uint64_t rows, cudaStream_t stream);
  // The same by this rank's own server, for a layer that it holds (of its slice in `striped`): what serving costs here.
  void forward_here(std::uint32_t layer, const void* x, void* y, std::uint64_t rows, cudaStream_t stream);

  // PeerError, LayoutError or Error where a wait has failed or the server has.
  void check() const;
  // Ends the server; nothing may be in flight any more. Idempotent.
  void stop();

  RequesterCounters requester_counters() const { return requester_->counters(); }
  ServerCounters server_counters() const { return server_->counters(); }
  std::size_t workspace_bytes() const { return server_->workspace_bytes(); }
  std::uint32_t retired() const { return retired_; }
  bool uses_sm90() const { return server_->uses_sm90(); }

 private:
  struct Target {
    std::uint32_t first_owner;
    std::uint32_t owners;
    bool striped;
  };
  void run(std::uint32_t layer, const Target& target, const void* x, void* y, std::uint64_t rows, cudaStream_t stream);
  void check_headers() const;
  void look_at_peers();

  CudaCasOptions options_;
  std::unique_ptr<CudaRequester> requester_;
  std::unique_ptr<CudaServer> server_;
  std::uint64_t calls_ = 0;
  std::atomic<std::uint32_t> retired_{0};  // bit per requester; the server's thread alone writes it
};

}  // namespace cas
}  // namespace sidp
