// Python's view of CaS on a GPU. Pointers and streams cross as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>

#include "cas_server/cuda_cas.hpp"

namespace py = pybind11;

namespace sidp {

namespace {

using namespace cas;

using NoGil = py::call_guard<py::gil_scoped_release>;

void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

cudaStream_t stream_at(std::uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

CudaCasUnit make_unit(std::uint32_t layer, std::uint32_t hidden, std::uint32_t inner, const std::string& activation,
                      std::uintptr_t gate, std::uintptr_t up, std::uintptr_t down, std::uintptr_t gate_bias,
                      std::uintptr_t up_bias, std::uintptr_t down_bias) {
  return {layer,
          {pointer(gate), pointer(up), pointer(down), pointer(gate_bias), pointer(up_bias), pointer(down_bias)},
          {hidden, inner, activation_from(activation)}};
}

std::unique_ptr<CudaCas> make_cas(int device, std::uint32_t rank, const Geometry& geometry, std::uint64_t pool_id, bool striped,
                                  const std::vector<std::uintptr_t>& regions, const std::vector<std::uintptr_t>& bells,
                                  std::uintptr_t own_bells, std::uint32_t hidden, const std::string& dtype,
                                  std::vector<int> owners, std::vector<CudaCasUnit> units, unsigned sms, unsigned ranks_here,
                                  double timeout_s, std::shared_ptr<PeerWatch> watch, std::uintptr_t activity, const py::object&) {
  CudaCasOptions options;
  options.device = device;
  options.rank = rank;
  options.geometry = geometry;
  options.pool_id = pool_id;
  options.striped = striped;
  for (const std::uintptr_t region : regions) options.regions.push_back(pointer(region));
  for (const std::uintptr_t page : bells) options.bells.push_back(pointer(page));
  options.own_bells = pointer(own_bells);
  options.hidden = hidden;
  options.dtype = dtype_from(dtype);
  options.owners = std::move(owners);
  options.units = std::move(units);
  options.sms = sms;
  options.ranks_here = ranks_here;
  options.timeout_s = timeout_s;
  options.watch = std::move(watch);
  options.activity = static_cast<std::uint64_t*>(pointer(activity));
  const py::gil_scoped_release release;
  return std::make_unique<CudaCas>(std::move(options));
}

}  // namespace

void bind_cas_cuda(py::module_& m) {
  py::class_<RequesterCounters>(m, "CudaRequesterCounters")
      .def_readonly("requests", &RequesterCounters::requests)
      .def_readonly("rows", &RequesterCounters::rows)
      .def_readonly("batch_rows", &RequesterCounters::batch_rows)
      .def_property_readonly("service_seconds", [](const RequesterCounters& c) { return double(c.service_ns) * 1e-9; });
  py::class_<ServerCounters>(m, "CudaServerCounters")
      .def_readonly("requests", &ServerCounters::requests)
      .def_readonly("rows", &ServerCounters::rows)
      .def_readonly("batches", &ServerCounters::batches)
      .def_readonly("fused_batches", &ServerCounters::fused_batches)
      .def_readonly("refused", &ServerCounters::refused)
      .def_readonly("launches", &ServerCounters::launches)
      .def_property_readonly("busy_seconds", [](const ServerCounters& c) { return double(c.busy_ns) * 1e-9; });
  py::class_<CudaCasUnit>(m, "CudaCasUnit")
      .def(py::init(&make_unit), py::arg("layer"), py::arg("hidden"), py::arg("inner"), py::arg("activation"), py::arg("gate"),
           py::arg("up"), py::arg("down"), py::arg("gate_bias") = 0, py::arg("up_bias") = 0, py::arg("down_bias") = 0);
  py::class_<CudaCas>(m, "CudaCas")
      .def_static("write_header",
                  [](const Geometry& geometry, std::uintptr_t region, std::uint64_t pool_id, int device) {
                    CudaCas::write_header(geometry, pointer(region), pool_id, device);
                  },
                  py::arg("geometry"), py::arg("region"), py::arg("pool_id"), py::arg("device"))
      .def(py::init(&make_cas), py::arg("device"), py::arg("rank"), py::arg("geometry"), py::arg("pool_id"), py::arg("striped"),
           py::arg("regions"), py::arg("bells"), py::arg("own_bells"), py::arg("hidden"), py::arg("dtype"), py::arg("owners"),
           py::arg("units"), py::arg("sms"), py::arg("ranks_here"), py::arg("timeout_s"), py::arg("watch"), py::arg("activity"),
           py::arg("keep"), py::keep_alive<1, 19>())
      .def("forward",
           [](CudaCas& cas, std::uint32_t layer, std::uintptr_t x, std::uintptr_t y, std::uint64_t rows, std::uintptr_t stream) {
             cas.forward(layer, pointer(x), pointer(y), rows, stream_at(stream));
           },
           py::arg("layer"), py::arg("x"), py::arg("y"), py::arg("rows"), py::arg("stream"), NoGil())
      .def("forward_here",
           [](CudaCas& cas, std::uint32_t layer, std::uintptr_t x, std::uintptr_t y, std::uint64_t rows, std::uintptr_t stream) {
             cas.forward_here(layer, pointer(x), pointer(y), rows, stream_at(stream));
           },
           py::arg("layer"), py::arg("x"), py::arg("y"), py::arg("rows"), py::arg("stream"), NoGil())
      .def("check", &CudaCas::check)
      .def("stop", &CudaCas::stop, NoGil())
      .def("requester_counters", &CudaCas::requester_counters, NoGil())
      .def("server_counters", &CudaCas::server_counters)
      .def_property_readonly("workspace_bytes", &CudaCas::workspace_bytes)
      .def_property_readonly("retired", &CudaCas::retired)
      .def_property_readonly("uses_sm90", &CudaCas::uses_sm90);
}

}  // namespace sidp
