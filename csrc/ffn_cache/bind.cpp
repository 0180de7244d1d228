#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "bind_moved.hpp"
#include "bind_trace.hpp"
#include "ring.hpp"

namespace py = pybind11;

namespace sidp {

namespace {

using cache::Ring;
using cache::RingOptions;
using cache::Source;

std::unique_ptr<Ring> make_ring(const Placement& placement, int rank,
                                const std::vector<std::pair<std::uintptr_t, std::uintptr_t>>& sources,
                                std::uintptr_t dead_rank, int slots, bool peak_shifting, bool poison,
                                double link_bytes_per_s, double owner_bytes_per_s, std::uintptr_t activity, const py::object&,
                                bool paused) {
  std::vector<Source> list;
  for (const auto& [extents, egress_clock] : sources)
    list.push_back({reinterpret_cast<const std::byte*>(extents), reinterpret_cast<std::uint64_t*>(egress_clock)});
  RingOptions options;
  options.slots = slots;
  options.peak_shifting = peak_shifting;
  options.poison = poison;
  options.paused = paused;
  options.activity = reinterpret_cast<std::uint64_t*>(activity);
  options.limits = {link_bytes_per_s, owner_bytes_per_s};
  return std::make_unique<Ring>(placement, rank, std::move(list), reinterpret_cast<const std::atomic<int>*>(dead_rank),
                                options);
}

}  // namespace

void bind_ffn_cache(py::module_& m) {
  py::class_<cache::RingStats>(m, "RingStats")
      .def(py::init<>())
      .def_readonly("fetches", &cache::RingStats::fetches)
      .def_readonly("fetched_bytes", &cache::RingStats::fetched_bytes)
      .def_readonly("stalls", &cache::RingStats::stalls)
      .def_readonly("stall_seconds", &cache::RingStats::stall_seconds)
      .def_readonly("restarts", &cache::RingStats::restarts)
      .def_readonly("fetch_seconds", &cache::RingStats::fetch_seconds)
      .def_readonly("pauses", &cache::RingStats::pauses);
  py::class_<Ring>(m, "Ring")
      .def(py::init(&make_ring), py::arg("placement"), py::arg("rank"), py::arg("sources"), py::arg("dead_rank"),
           py::arg("slots"), py::arg("peak_shifting") = true, py::arg("poison") = false,
           py::arg("link_bytes_per_s") = 0.0, py::arg("owner_bytes_per_s") = 0.0, py::arg("activity") = 0,
           py::arg("keep") = py::none(), py::arg("paused") = false,
           py::keep_alive<1, 12>())  // `keep`: whatever owns the memory behind the addresses
      .def("acquire", &Ring::acquire, py::arg("layer"), py::arg("timeout_s"), py::call_guard<py::gil_scoped_release>())
      .def("release", &Ring::release, py::arg("layer"))
      .def("pause", &Ring::pause)
      .def("resume", &Ring::resume)
      .def("move_extents", &cache::move_extents_of<Ring>, py::arg("from_rank"), py::arg("moved"))
      .def("owners", &Ring::owners, py::arg("layer"))
      .def("stop", &Ring::stop, py::call_guard<py::gil_scoped_release>())
      .def("slot_address", [](const Ring& ring, int slot) { return reinterpret_cast<std::uintptr_t>(ring.slot_address(slot)); })
      .def_property_readonly("bytes", &Ring::bytes)
      .def_property_readonly("schedule", &Ring::schedule, py::return_value_policy::reference_internal)
      .def("stats", &Ring::stats)
      .def("start_trace", [](Ring& ring, std::size_t capacity) { ring.trace().start(capacity); }, py::arg("capacity"))
      .def("trace", [](Ring& ring) { return cache::trace_list(ring.trace().events()); });
}

}  // namespace sidp
