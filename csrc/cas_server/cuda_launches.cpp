// When the CUDA server runs: the launching thread, and what makes sure of a server before a request (life.hpp).
#include "cuda_server.hpp"

#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <numeric>

namespace sidp {
namespace cas {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds kAwake(20), kAsleep(200);  // between two looks at the bells
constexpr std::chrono::milliseconds kStaysAwake(500);           // after the last time that anything was wanted
constexpr std::chrono::milliseconds kNowAndThen(1);
constexpr int kMostPatience = 64;

// Whether to launch for bells that ring without an answer coming of it: less and less often. A bell that was heard has been looked
// at by the launch that it brought (L5), so only a requester that rings without asking gets here.
class Patience {
 public:
  bool allows(Clock::time_point now) const { return now - since_ >= std::chrono::milliseconds(tries_ - 1); }
  void launched(Clock::time_point now, std::uint64_t served) {
    tries_ = served != served_ ? 1 : std::min(2 * tries_, kMostPatience);
    served_ = served;
    since_ = now;
  }

 private:
  std::uint64_t served_ = ~std::uint64_t(0);
  int tries_ = 1;
  Clock::time_point since_;
};

}  // namespace

void CudaServer::start() {
  SIDP_REQUIRE(!thread_.joinable(), ConfigError, "the server is running");
  DeviceGuard guard(config_.device);
  if (!units_.empty())
    SIDP_CUDA_CHECK(cudaMemcpy(unit_memory_.as<void>(), units_.data(), sizeof(UnitRecord) * units_.size(),
                               cudaMemcpyHostToDevice));
  SIDP_CUDA_CHECK(cudaDeviceSynchronize());  // the zeroed workspace too; the stream waits for no other
  auto* stop = &host_memory_.as<ServerHostWords>()->stop;
  {
    // The first launch of a kernel may wait for all that runs, to make room for its local memory: not when somebody waits for it.
    // It finds the stop word and leaves, for with requests of this rank under way it would stay.
    const std::lock_guard<std::mutex> lock(launching_);
    __atomic_store_n(stop, 1u, __ATOMIC_RELEASE);
    launch();
    SIDP_CUDA_CHECK(cudaStreamSynchronize(streams_[stream_].stream));
  }
  __atomic_store_n(stop, 0u, __ATOMIC_RELEASE);
  stopping_ = false;
  thread_ = std::thread([this] { serve_until_stopped(); });
}

void CudaServer::stop() {
  if (!thread_.joinable()) return;
  stopping_ = true;
  __atomic_store_n(&host_memory_.as<ServerHostWords>()->stop, 1u, __ATOMIC_RELEASE);
  thread_.join();
}

bool CudaServer::running() const {
  return __atomic_load_n(&host_memory_.as<ServerHostWords>()->running, __ATOMIC_ACQUIRE) != 0;
}

bool CudaServer::wanted() const {
  const auto* host = host_memory_.as<ServerHostWords>();
  const std::uint32_t deaf = __atomic_load_n(&host->retired, __ATOMIC_RELAXED) | __atomic_load_n(&host->broken, __ATOMIC_RELAXED);
  for (std::uint32_t r = 0; r < geometry_.world; ++r)
    if ((deaf >> r & 1) == 0 && __atomic_load_n(&bells_[r].sequence, __ATOMIC_ACQUIRE) >
                                    __atomic_load_n(&host->served[r], __ATOMIC_RELAXED))
      return true;
  return false;
}

bool CudaServer::pending() const {
  const auto* host = host_memory_.as<ServerHostWords>();
  return __atomic_load_n(&host->begun[stream_], __ATOMIC_ACQUIRE) < streams_[stream_].launch;
}

void CudaServer::launch() {
  ServerArguments arguments = arguments_;
  Stream& stream = streams_[stream_];
  stream.launch = arguments.launch = ++launches_;
  arguments.stream = static_cast<std::uint32_t>(stream_);
  launched_ = Clock::now();
  const std::chrono::nanoseconds pause = launched_ - std::min(ran_.load(), launched_);
  arguments.idle_ns = stay_ns(static_cast<std::uint64_t>(pause.count()), arguments.idle_ns);
  SIDP_CUDA_CHECK(launch_serve(ServeLaunch{path_, config_.dtype, config_.sms, stream.stream}, arguments));
}

// Streams share hardware queues, and a queue stands still behind a kernel that waits for this very server.
void CudaServer::launch_elsewhere() {
  const auto* host = host_memory_.as<ServerHostWords>();
  launched_ = Clock::now();  // where none is free: in a while again
  for (std::size_t step = 1; step < streams_.size(); ++step) {
    const std::size_t next = (stream_ + step) % streams_.size();
    if (__atomic_load_n(&host->begun[next], __ATOMIC_ACQUIRE) < streams_[next].launch) continue;
    stream_ = next;
    launch();
    return;
  }
}

void CudaServer::relieve() {
  auto* host = host_memory_.as<ServerHostWords>();
  const std::uint64_t wanted = __atomic_load_n(&host->relief_wanted, __ATOMIC_ACQUIRE);
  if (wanted == host->relief_given) return;
  const std::lock_guard<std::mutex> lock(launching_);
  for (std::size_t s = 0; s < streams_.size(); ++s) {
    if (__atomic_load_n(&host->begun[s], __ATOMIC_ACQUIRE) != wanted || streams_[s].launch != wanted) continue;
    stream_ = s;
    launch();
  }
  __atomic_store_n(&host->relief_given, wanted, __ATOMIC_RELEASE);
}

void CudaServer::ensure_serving() {
  if (running()) return;
  const std::lock_guard<std::mutex> lock(launching_);
  if (!running() && !pending() && !stopping_) launch();
}

void CudaServer::push(CudaRequester& asks, RowsArgument rows, bool striped, cudaStream_t stream) {
  cudaStreamCaptureStatus capture;
  SIDP_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  rows.announced = capture == cudaStreamCaptureStatusNone;
  try {
    if (rows.announced) {
      asks.announce();
      ensure_serving();
    }
    asks.push(rows, striped, stream);
  } catch (...) {
    asks.abort();  // what was announced and never comes would keep the server for ever
    throw;
  }
}

void CudaServer::serve_until_stopped() {
  using Milliseconds = std::chrono::duration<double, std::milli>;
  try {
    SIDP_CUDA_CHECK(cudaSetDevice(config_.device));
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // others may be capturing while we launch
    SIDP_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);
    const auto* host = host_memory_.as<ServerHostWords>();
    Patience patience;
    int late = 1;
    Clock::time_point wanted_at = Clock::now(), looked_at_peers;
    while (!stopping_) {
      const Clock::time_point now = Clock::now();
      if (config_.now_and_then && now - looked_at_peers > kNowAndThen) {
        config_.now_and_then();
        looked_at_peers = now;
      }
      relieve();
      const bool serves = running(), wants = !serves && wanted();
      if (serves || wants) wanted_at = now;
      if (serves) {
        ran_ = now;
      } else {
        const std::lock_guard<std::mutex> lock(launching_);
        if (!pending()) {
          late = 1;
          if (wants && patience.allows(now) && !running()) {
            patience.launched(now, std::accumulate(std::begin(host->served), std::end(host->served), std::uint64_t(0)));
            launch();
          }
        } else if (now - launched_ > late * Milliseconds(config_.late_ms)) {
          late = std::min(2 * late, kMostPatience);  // the device may just be busy
          launch_elsewhere();
        }
      }
      std::this_thread::sleep_for(now - wanted_at < kStaysAwake ? kAwake : kAsleep);
    }
    for (const Stream& stream : streams_) SIDP_CUDA_CHECK(cudaStreamSynchronize(stream.stream));
  } catch (const std::exception& error) {
    failure_ = error.what();
    failed_.store(true, std::memory_order_release);
  }
}

}  // namespace cas
}  // namespace sidp
