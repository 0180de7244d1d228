// Python's view of the CUDA ring. Pointers and streams cross as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "bind_moved.hpp"
#include "bind_trace.hpp"
#include "cuda_rate.hpp"
#include "cuda_ring.hpp"
#include "../error.hpp"

namespace py = pybind11;

namespace sidp {
namespace {

using cache::CudaRing;
using cache::CudaRingOptions;
using cache::CudaRingStats;
using cache::HandOver;

HandOver hand_over_from(const std::string& name) {
  SIDP_REQUIRE(name == "events" || name == "words", ConfigError, "hand-over must be 'events' or 'words', got '", name, "'");
  return name == "events" ? HandOver::events : HandOver::words;
}

std::unique_ptr<CudaRing> make_ring(const Placement& placement, int rank, const std::vector<std::uintptr_t>& sources,
                                    std::uintptr_t dead_rank, int device, int slots, bool peak_shifting,
                                    const std::vector<bool>& local, const std::string& hand_over, std::uint64_t slice_bytes,
                                    double timeout_s, bool poison, bool own_is_remote, std::uintptr_t activity,
                                    std::uintptr_t device_activity, const py::object&, const std::vector<std::uint64_t>& cuts,
                                    const std::vector<std::uintptr_t>& host_sources, const std::vector<std::uintptr_t>& turns) {
  std::vector<const std::uint8_t*> owners;
  for (const std::uintptr_t source : sources) owners.push_back(reinterpret_cast<const std::uint8_t*>(source));
  SIDP_REQUIRE(cuts.size() == host_sources.size() && (cuts.empty() || cuts.size() == sources.size()), ConfigError, cuts.size(),
               " cuts and ", host_sources.size(), " host parts for ", sources.size(), " owners");
  CudaRingOptions options;
  options.cuts = cuts;
  for (const std::uintptr_t source : host_sources) options.host_sources.push_back(reinterpret_cast<const std::uint8_t*>(source));
  for (const std::uintptr_t words : turns) options.turns.push_back(reinterpret_cast<cache::TurnWords*>(words));
  options.device = device;
  options.slots = slots;
  options.peak_shifting = peak_shifting;
  options.local = local;
  options.hand_over = hand_over_from(hand_over);
  options.slice_bytes = slice_bytes;
  options.timeout_s = timeout_s;
  options.poison = poison;
  options.own_is_remote = own_is_remote;
  options.device_activity = reinterpret_cast<std::uint64_t*>(device_activity);
  options.activity = reinterpret_cast<std::uint64_t*>(activity);
  const py::gil_scoped_release release;
  return std::make_unique<CudaRing>(placement, rank, owners, reinterpret_cast<const std::atomic<int>*>(dead_rank), options);
}

cudaStream_t stream_of(std::uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

}  // namespace

void bind_cuda_ring(py::module_& m) {
  py::class_<CudaRingStats>(m, "CudaRingStats")
      .def_readonly("fetches", &CudaRingStats::fetches)
      .def_readonly("fetched_bytes", &CudaRingStats::fetched_bytes)
      .def_readonly("stalls", &CudaRingStats::stalls)
      .def_readonly("stall_seconds", &CudaRingStats::stall_seconds)
      .def_readonly("restarts", &CudaRingStats::restarts)
      .def_readonly("repairs", &CudaRingStats::repairs);
  py::class_<CudaRing>(m, "CudaRing")
      .def(py::init(&make_ring), py::arg("placement"), py::arg("rank"), py::arg("sources"), py::arg("dead_rank"),
           py::arg("device"), py::arg("slots"), py::arg("peak_shifting") = true, py::arg("local") = std::vector<bool>(),
           py::arg("hand_over") = "events", py::arg("slice_bytes") = 0, py::arg("timeout_s") = 60.0,
           py::arg("poison") = false, py::arg("own_is_remote") = false, py::arg("activity") = 0,
           py::arg("device_activity") = 0, py::arg("keep") = py::none(), py::arg("cuts") = std::vector<std::uint64_t>(),
           py::arg("host_sources") = std::vector<std::uintptr_t>(), py::arg("turns") = std::vector<std::uintptr_t>(),
           py::keep_alive<1, 17>())  // `keep`: whatever owns the memory behind the addresses
      .def("acquire", [](CudaRing& ring, int layer, std::uintptr_t stream) { ring.acquire(layer, stream_of(stream)); },
           py::arg("layer"), py::arg("stream"))
      .def("release", [](CudaRing& ring, int layer, std::uintptr_t stream) { ring.release(layer, stream_of(stream)); },
           py::arg("layer"), py::arg("stream"))
      .def("move_extents", &cache::move_extents_of<CudaRing>, py::arg("from_rank"), py::arg("moved"))
      .def("owners", &CudaRing::owners, py::arg("layer"))
      .def("stop", &CudaRing::stop, py::call_guard<py::gil_scoped_release>())
      .def("slot_address", [](const CudaRing& ring, int slot) { return reinterpret_cast<std::uintptr_t>(ring.slot_address(slot)); })
      .def_property_readonly("bytes", &CudaRing::bytes)
      .def_property_readonly("schedule", &CudaRing::schedule, py::return_value_policy::reference_internal)
      .def("stats", &CudaRing::stats)
      .def("start_trace", &CudaRing::start_trace, py::arg("capacity"))
      .def("trace", [](const CudaRing& ring) { return cache::trace_list(ring.trace_events()); });
  m.def("cuda_copy_rate", &cache::cuda_copy_rate, py::arg("source"), py::arg("bytes"), py::arg("device"),
        py::call_guard<py::gil_scoped_release>(), "Bytes per second of copies from `source`, by the copy engine.");
}

}  // namespace sidp
