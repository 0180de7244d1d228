// Python's view of CaS on the CPU. Pointers cross as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>

#include "cas_server/cpu_requester.hpp"
#include "cas_server/cpu_server.hpp"
#include "p2p/bind_common.hpp"

namespace py = pybind11;

namespace sidp {

namespace {

using namespace cas;
using namespace cas::cpu;

const std::byte* bytes_at(std::uintptr_t address) { return reinterpret_cast<const std::byte*>(address); }

std::vector<std::byte*> regions_at(const std::vector<std::uintptr_t>& addresses) {
  std::vector<std::byte*> regions;
  for (std::uintptr_t address : addresses) regions.push_back(reinterpret_cast<std::byte*>(address));
  return regions;
}

using MatrixArguments = std::tuple<std::uintptr_t, std::int64_t, bool>;  // address (0: none), pitch, transposed

Matrix matrix_from(const MatrixArguments& m) { return {bytes_at(std::get<0>(m)), std::get<1>(m), std::get<2>(m)}; }

FfnSlice make_slice(std::uint32_t hidden, std::uint32_t inner, const std::string& activation, const std::string& dtype,
                    const MatrixArguments& gate, const MatrixArguments& up, const MatrixArguments& down,
                    std::uintptr_t gate_bias, std::uintptr_t up_bias, std::uintptr_t down_bias) {
  return {hidden, inner, activation_from(activation), dtype_from(dtype), matrix_from(gate), matrix_from(up),
          matrix_from(down), bytes_at(gate_bias), bytes_at(up_bias), bytes_at(down_bias)};
}

void bind_words(py::module_& m) {
  m.attr("cas_bells_bytes") = kMaxWorld * sizeof(BellLine);  // CUDA backend
  py::class_<Geometry>(m, "CasGeometry")
      .def(py::init([](std::uint32_t world, std::uint32_t slots, std::uint32_t max_rows, std::uint32_t hidden_bytes,
                       std::uint32_t reply_bytes) {
             const Geometry geometry = Geometry::make(world, slots, max_rows, 1, hidden_bytes, reply_bytes);
             check_geometry(geometry, 0);
             return geometry;
           }),
           py::arg("world"), py::arg("slots"), py::arg("max_rows"), py::arg("row_bytes"), py::arg("reply_row_bytes"))
      .def_property_readonly("bytes", &Geometry::bytes)
      .def_readonly("slots", &Geometry::slots)
      .def_readonly("max_rows", &Geometry::max_rows)
      .def("tail", &Geometry::tail)
      .def("request", &Geometry::request)
      .def("reply", &Geometry::reply)
      .def("request_rows", &Geometry::request_rows)
      .def("write_header",
           [](const Geometry& geometry, std::uintptr_t region, std::uint64_t pool_id) {
             Region(reinterpret_cast<std::byte*>(region), geometry).write_header(pool_id);
           },
           py::arg("region"), py::arg("pool_id"));
  py::class_<FfnSlice> slice(m, "FfnSlice");
  slice.def(py::init<>())
      .def(py::init(&make_slice), py::arg("hidden"), py::arg("inner"), py::arg("activation"), py::arg("dtype"), py::arg("gate"),
           py::arg("up"), py::arg("down"), py::arg("gate_bias") = 0, py::arg("up_bias") = 0, py::arg("down_bias") = 0);
  slice.def_readonly("inner", &FfnSlice::inner);
  py::class_<RemoteLayer>(m, "RemoteLayer")
      .def(py::init<>())
      .def(py::init([](std::uint32_t hidden, const std::string& dtype, int owner) {
             return RemoteLayer{hidden, dtype_from(dtype), owner};
           }),
           py::arg("hidden"), py::arg("dtype"), py::arg("owner"));
  py::class_<Blas, std::shared_ptr<Blas>>(m, "Blas").def_property_readonly("name", &Blas::name);
  m.def("open_blas", [](const std::vector<std::string>& libraries) {
    return std::const_pointer_cast<Blas>(Blas::open(libraries));
  });
  m.def(
      "run_slice",
      [](const FfnSlice& slice, const std::shared_ptr<Blas>& blas, std::uintptr_t x, std::int64_t rows, std::uintptr_t y) {
        CpuFfn(blas).run(slice, reinterpret_cast<const float*>(x), rows, reinterpret_cast<float*>(y));
      },
      py::arg("slice"), py::arg("blas"), py::arg("x"), py::arg("rows"), py::arg("y"), NoGil(),
      "The server's computation by itself: x [rows, hidden] to y [rows, hidden], both float32.");
}

void bind_server(py::module_& m) {
  py::class_<ServerStats>(m, "CasServerStats")
      .def_readonly("requests", &ServerStats::requests)
      .def_readonly("rows", &ServerStats::rows)
      .def_readonly("batches", &ServerStats::batches)
      .def_readonly("fused_batches", &ServerStats::fused_batches)
      .def_readonly("refused", &ServerStats::refused)
      .def_readonly("broken", &ServerStats::broken)
      .def_readonly("retired", &ServerStats::retired)
      .def_readonly("failures", &ServerStats::failures)
      .def_readonly("sleeps", &ServerStats::sleeps)
      .def_readonly("busy_seconds", &ServerStats::busy_seconds)
      .def_readonly("last_failure", &ServerStats::last_failure);
  py::class_<CpuServer>(m, "CasServer")
      .def(py::init([](int rank, const Geometry& geometry, std::uint64_t pool_id, bool striped,
                       const std::vector<std::uintptr_t>& regions, std::vector<FfnSlice> layers,
                       std::shared_ptr<PeerWatch> watch, const std::shared_ptr<Blas>& blas, int blas_threads, bool fuse,
                       const py::object&) {
             ServerOptions options;
             options.rank = rank;
             options.geometry = geometry;
             options.pool_id = pool_id;
             options.striped = striped;
             options.regions = regions_at(regions);
             options.layers = std::move(layers);
             options.watch = std::move(watch);
             options.blas_threads = blas_threads;
             options.fuse = fuse;
             return std::make_unique<CpuServer>(std::move(options), blas);
           }),
           py::arg("rank"), py::arg("geometry"), py::arg("pool_id"), py::arg("striped"), py::arg("regions"),
           py::arg("layers"), py::arg("watch"), py::arg("blas"), py::arg("blas_threads") = 1, py::arg("fuse") = true,
           py::arg("keep") = py::none(), py::keep_alive<1, 12>())
      .def("stop", &CpuServer::stop, NoGil())
      .def("stats", &CpuServer::stats);
}

void bind_requester(py::module_& m) {
  py::class_<RequesterStats>(m, "CasRequesterStats")
      .def(py::init<>())
      .def_readonly("requests", &RequesterStats::requests)
      .def_readonly("rows", &RequesterStats::rows)
      .def_readonly("refused", &RequesterStats::refused)
      .def_readonly("fused_rows", &RequesterStats::fused_rows)
      .def_readonly("service_seconds", &RequesterStats::service_seconds)
      .def_readonly("wait_seconds", &RequesterStats::wait_seconds);
  py::class_<CpuRequester::Ticket>(m, "CasTicket");
  py::class_<CpuRequester>(m, "CasRequester")
      .def(py::init([](int rank, const Geometry& geometry, std::uint64_t pool_id, bool striped,
                       const std::vector<std::uintptr_t>& regions, std::vector<RemoteLayer> layers,
                       std::shared_ptr<PeerWatch> watch, std::uintptr_t activity,
                       const std::vector<std::uintptr_t>& phases, double link_bytes_per_s,
                       const py::object&) {
             RequesterOptions options;
             options.rank = rank;
             options.geometry = geometry;
             options.pool_id = pool_id;
             options.striped = striped;
             options.regions = regions_at(regions);
             options.layers = std::move(layers);
             options.watch = std::move(watch);
             options.activity = reinterpret_cast<std::uint64_t*>(activity);
             for (std::uintptr_t phase : phases) options.phases.push_back(reinterpret_cast<const std::uint32_t*>(phase));
             options.link_bytes_per_s = link_bytes_per_s;
             return std::make_unique<CpuRequester>(std::move(options));
           }),
           py::arg("rank"), py::arg("geometry"), py::arg("pool_id"), py::arg("striped"), py::arg("regions"),
           py::arg("layers"), py::arg("watch"), py::arg("activity") = 0, py::arg("phases") = std::vector<std::uintptr_t>{},
           py::arg("link_bytes_per_s") = 0.0, py::arg("keep") = py::none(), py::keep_alive<1, 12>())
      .def("submit",
           [](CpuRequester& requester, int layer, std::uintptr_t x, std::uintptr_t y, std::uint64_t rows, double timeout_s) {
             return requester.submit(layer, bytes_at(x), reinterpret_cast<std::byte*>(y), rows, timeout_s);
           },
           py::arg("layer"), py::arg("x"), py::arg("y"), py::arg("rows"), py::arg("timeout_s"), NoGil())
      .def("finish", &CpuRequester::finish, py::arg("ticket"), py::arg("timeout_s"), NoGil())
      .def("stats", &CpuRequester::stats);
}

}  // namespace

void bind_cas_cpu(py::module_& m) {
  bind_words(m);
  bind_server(m);
  bind_requester(m);
}

}  // namespace sidp
