// Python's view of arenas in device memory and of pinned host memory. Pointers cross as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <string>

#include "error.hpp"
#include "p2p/bind_common.hpp"
#include "p2p/cuda_arena.hpp"

namespace py = pybind11;

namespace sidp {
void bind_cuda_p2p(py::module_& m) {
  py::class_<CudaArena, std::shared_ptr<CudaArena>>(m, "CudaArena")
      .def(py::init([](int rank, int world_size, const std::string& token, std::uint64_t extent_bytes, int device,
                       const std::string& kind) {
             const JobToken job = token_from(token);
             const DeviceMemoryKind memory = device_memory_kind(kind);
             const py::gil_scoped_release release;
             return std::make_shared<CudaArena>(rank, world_size, job, extent_bytes, device, memory);
           }),
           py::arg("rank"), py::arg("world_size"), py::arg("token"), py::arg("extent_bytes"), py::arg("device"),
           py::arg("kind") = "ipc")
      .def_property_readonly("extents", [](const CudaArena& arena) { return address(arena.extents()); })
      .def_property_readonly("turns", [](const CudaArena& arena) { return address(arena.turns()); })
      .def_property_readonly("total_bytes", &CudaArena::total_bytes)
      .def("handle", [](CudaArena& arena) { return py::bytes(arena.handle()); })
      .def("share", [](const CudaArena& arena) { return std::make_shared<Descriptor>(arena.share()); })
      .def("close", &CudaArena::close, NoGil())
      .def_property_readonly("closed", &CudaArena::closed);
  py::class_<CudaPeerMapping, std::shared_ptr<CudaPeerMapping>>(m, "CudaPeerMapping")
      .def(py::init([](const std::string& handle, int rank, int world_size, const std::string& token,
                       std::uint64_t extent_bytes, int device, const std::shared_ptr<Descriptor>& fd) {
             const ArenaExpectation expected{rank, world_size, token_from(token), extent_bytes, 0};
             const py::gil_scoped_release release;
             return std::make_shared<CudaPeerMapping>(handle, expected, device, fd.get());
           }),
           py::arg("handle"), py::arg("rank"), py::arg("world_size"), py::arg("token"), py::arg("extent_bytes"), py::arg("device"),
           py::arg("fd") = py::none())
      .def_property_readonly("rank", &CudaPeerMapping::rank)
      .def_property_readonly("extents", [](const CudaPeerMapping& mapping) { return address(mapping.extents()); })
      .def_property_readonly("turns", [](const CudaPeerMapping& mapping) { return address(mapping.turns()); })
      .def("close", &CudaPeerMapping::close, NoGil())
      .def_property_readonly("closed", &CudaPeerMapping::closed);
  py::class_<PinnedRange, std::shared_ptr<PinnedRange>>(m, "PinnedRange")
      .def(py::init([](std::uintptr_t memory, std::uint64_t bytes, bool read_only, int device) {
             const py::gil_scoped_release release;
             return std::make_shared<PinnedRange>(memory, bytes, read_only, device);
           }),
           py::arg("address"), py::arg("bytes"), py::arg("read_only"), py::arg("device"))
      .def_property_readonly("device_address", &PinnedRange::device_address)
      .def("close", &PinnedRange::close, NoGil());
  py::class_<CudaDeviceFacts>(m, "CudaDeviceFacts")
      .def_readonly("name", &CudaDeviceFacts::name)
      .def_property_readonly("uuid", [](const CudaDeviceFacts& facts) { return uuid_text(facts.uuid); })
      .def_readonly("multiprocessors", &CudaDeviceFacts::multiprocessors)
      .def_readonly("copy_engines", &CudaDeviceFacts::copy_engines)
      .def_readonly("total_bytes", &CudaDeviceFacts::total_bytes)
      .def_readonly("free_bytes", &CudaDeviceFacts::free_bytes)
      .def_readonly("pci", &CudaDeviceFacts::pci)
      .def_readonly("peers", &CudaDeviceFacts::peers)
      .def_readonly("peer_ranks", &CudaDeviceFacts::peer_ranks);
  m.def("vmm_refusal", &vmm_refusal, py::arg("device"), "Why a device's memory cannot be shared by VMM handles; empty where it can.");
  m.def("cuda_device_count", &cuda_device_count, "Devices the driver shows; 0 where there is no driver.");
  m.def("cuda_device_facts", &cuda_device_facts, py::arg("device"));
}

}  // namespace sidp
