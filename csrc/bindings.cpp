// The Python module: errors, the pure core, and what each part binds for itself.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "error.hpp"
#include "placement.hpp"
#include "policy.hpp"
#include "schedule.hpp"

namespace py = pybind11;

namespace sidp {

void bind_p2p(py::module_& module);
void bind_ffn_cache(py::module_& module);
#ifdef SIDP_WITH_CUDA
void bind_cuda_p2p(py::module_& module);
void bind_cuda_ring(py::module_& module);
void bind_cas_cuda(py::module_& module);
#endif
void bind_cas_cpu(py::module_& module);
void bind_sim(py::module_& module);

namespace {

// The classes live in Python (sidp.errors), so that they exist where the extension does not.
void set_python_error(const char* name, const Error& error) {
  py::object type = py::module_::import("sidp.errors").attr(name);
  py::set_error(type, error.what());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const PeerError& error) {
    py::object type = py::module_::import("sidp.errors").attr("PeerError");
    py::object value = type(error.what(), error.rank());
    PyErr_SetObject(type.ptr(), value.ptr());
  } catch (const ConfigError& error) {
    set_python_error("ConfigError", error);
  } catch (const LayoutError& error) {
    set_python_error("LayoutError", error);
  } catch (const PoolClosedError& error) {
    set_python_error("PoolClosedError", error);
  } catch (const Error& error) {
    set_python_error("SidpError", error);
  }
}

TensorLayout make_tensor(std::string name, std::uint64_t rows, std::uint64_t cols, std::uint64_t element_bytes,
                         const std::string& split, std::uint64_t groups) {
  TensorLayout tensor{std::move(name), rows, cols, element_bytes, Split::none, groups};
  SIDP_REQUIRE(split == "none" || split == "rows" || split == "cols", ConfigError, "split of tensor '", tensor.name,
               "' must be 'none', 'rows' or 'cols', got '", split, "'");
  if (split != "none") tensor.split = split == "rows" ? Split::rows : Split::cols;
  return tensor;
}

PlacementKind placement_kind(const std::string& name) {
  SIDP_REQUIRE(name == "layer" || name == "striped", ConfigError, "placement must be 'layer' or 'striped', got '", name,
               "'");
  return name == "layer" ? PlacementKind::layer : PlacementKind::striped;
}

void bind_core(py::module_& m) {
  py::class_<TensorLayout>(m, "TensorLayout")
      .def(py::init(&make_tensor), py::arg("name"), py::arg("rows"), py::arg("cols"), py::arg("element_bytes"),
           py::arg("split"), py::arg("groups"))
      .def_readonly("name", &TensorLayout::name)
      .def_readonly("rows", &TensorLayout::rows)
      .def_readonly("cols", &TensorLayout::cols)
      .def_readonly("element_bytes", &TensorLayout::element_bytes)
      .def_readonly("offset", &TensorLayout::offset)
      .def_property_readonly("bytes", &TensorLayout::bytes);
  py::class_<Piece>(m, "Piece")
      .def_readonly("tensor", &Piece::tensor)
      .def_readonly("row", &Piece::row)
      .def_readonly("rows", &Piece::rows)
      .def_readonly("col", &Piece::col)
      .def_readonly("cols", &Piece::cols)
      .def_readonly("offset", &Piece::offset);
  py::class_<UnitLayout>(m, "UnitLayout")
      .def(py::init<std::vector<TensorLayout>>())
      .def_property_readonly("tensors", &UnitLayout::tensors)
      .def_property_readonly("bytes", &UnitLayout::bytes);
  py::class_<Extent>(m, "Extent")
      .def_readonly("owner", &Extent::owner)
      .def_readonly("offset", &Extent::offset)
      .def_readonly("bytes", &Extent::bytes)
      .def_readonly("pieces", &Extent::pieces);
  py::class_<CopyOp>(m, "CopyOp")
      .def_readonly("owner", &CopyOp::owner)
      .def_readonly("source", &CopyOp::source)
      .def_readonly("target", &CopyOp::target)
      .def_readonly("width", &CopyOp::width)
      .def_readonly("height", &CopyOp::height)
      .def_readonly("source_pitch", &CopyOp::source_pitch)
      .def_readonly("target_pitch", &CopyOp::target_pitch);
  py::class_<Placement>(m, "Placement")
      .def(py::init([](const std::string& kind, std::vector<UnitLayout> units, int world_size, int resident_layers) {
             return Placement(placement_kind(kind), std::move(units), world_size, resident_layers);
           }),
           py::arg("kind"), py::arg("units"), py::arg("world_size"), py::arg("resident_layers") = 0)
      .def("owner", &Placement::owner)
      .def("cycle", &Placement::cycle)
      .def("resident", &Placement::resident)
      .def("local", &Placement::local)
      .def("share", &Placement::share, py::return_value_policy::reference_internal)
      .def("copies", &Placement::copies, py::arg("layer"), py::arg("rank"), py::arg("from_own") = false)
      .def("arena_bytes", &Placement::arena_bytes)
      .def("unit", &Placement::unit, py::return_value_policy::reference_internal)
      .def_property_readonly("replicated_bytes", &Placement::replicated_bytes)
      .def_property_readonly("largest_unit_bytes", &Placement::largest_unit_bytes);
  py::class_<FetchSchedule>(m, "FetchSchedule")
      .def(py::init<const Placement&, int, int, bool, const std::vector<bool>&>(), py::arg("placement"), py::arg("rank"),
           py::arg("slots"), py::arg("peak_shifting") = true, py::arg("local") = std::vector<bool>())
      .def_property_readonly("order", &FetchSchedule::order)
      .def_property_readonly("num_remote", &FetchSchedule::num_remote)
      .def_property_readonly("slots", &FetchSchedule::slots)
      .def("layer", &FetchSchedule::layer)
      .def("remote_index", &FetchSchedule::remote_index)
      .def("slot", &FetchSchedule::slot);
  py::class_<Fetch>(m, "Fetch")
      .def_readonly("ticket", &Fetch::ticket)
      .def_property_readonly("after",
                             [](const Fetch& f) { return f.after == kNever ? py::none() : py::object(py::int_(f.after)); })
      .def_readonly("index", &Fetch::index)
      .def_readonly("slot", &Fetch::slot);
  py::class_<FetchQueue>(m, "FetchQueue")
      .def(py::init<const FetchSchedule&>(), py::keep_alive<1, 2>())
      .def("next", &FetchQueue::next)
      .def("expected_index", &FetchQueue::expected_index)
      .def("restart", [](FetchQueue& queue, int index, const std::vector<std::int64_t>& last_use) {
        std::vector<std::uint64_t> uses;
        for (std::int64_t use : last_use) uses.push_back(use < 0 ? kNever : static_cast<std::uint64_t>(use));
        return queue.restart(index, uses);
      });
  m.attr("slot_alignment") = kSlotAlignment;
  m.def("default_slots", &default_slots, py::arg("placement"), py::arg("rank"), py::arg("peak_shifting") = true,
        py::arg("local") = std::vector<bool>());
}

void bind_policy(py::module_& m) {
  py::class_<TimeTable>(m, "TimeTable")
      .def(py::init<std::vector<std::pair<double, double>>>(), py::arg("points"))
      .def("at", &TimeTable::at, py::arg("rows"));
  py::class_<PolicyModel>(m, "PolicyModel")
      .def(py::init<>())
      .def_readwrite("layers", &PolicyModel::layers)
      .def_readwrite("remote_layers", &PolicyModel::remote_layers)
      .def_readwrite("fetch_bytes", &PolicyModel::fetch_bytes)
      .def_readwrite("link_bytes_per_s", &PolicyModel::link_bytes_per_s)
      .def_readwrite("round_trip_s", &PolicyModel::round_trip_s)
      .def_readwrite("row_bytes", &PolicyModel::row_bytes)
      .def_readwrite("owner_share", &PolicyModel::owner_share)
      .def_readwrite("fused_factor", &PolicyModel::fused_factor)
      .def_readwrite("compute", &PolicyModel::compute)
      .def_readwrite("served", &PolicyModel::served);
  py::class_<Decision>(m, "Decision")
      .def_readonly("first", &Decision::first)
      .def_readonly("last", &Decision::last)
      .def_property_readonly("mode", [](const Decision& d) { return mode_name(d.mode); })
      .def_property_readonly("text", &Decision::text);
  py::class_<ModePolicy>(m, "ModePolicy")
      .def(py::init([](PolicyModel model, bool timed) { return ModePolicy(std::move(model), PolicyOptions{}, timed); }),
           py::arg("model"), py::arg("timed") = true)
      .def("enter", [](ModePolicy& p, int layer, double rows, double now) { return p.enter(layer, rows, now) == Mode::cas; },
           py::arg("layer"), py::arg("rows"), py::arg("now"))
      .def("leave", &ModePolicy::leave, py::arg("now"))
      .def("learn", [](ModePolicy& p, bool cas, double rows, double took, double inside) {
             p.learn(cas ? Mode::cas : Mode::was, rows, took, inside);
           }, py::arg("cas"), py::arg("rows"), py::arg("took"), py::arg("inside"))
      .def("best_is_cas", [](const ModePolicy& p, double rows) { return p.best(rows) == Mode::cas; }, py::arg("rows"))
      .def("pin", [](ModePolicy& p, const std::string& mode) {
             SIDP_REQUIRE(mode.empty() || mode == "was" || mode == "cas", ConfigError,
                          "a policy is pinned to 'was', 'cas' or '' for none, got '", mode, "'");
             p.pin(mode.empty() ? std::nullopt : std::optional<Mode>(mode == "was" ? Mode::was : Mode::cas));
           }, py::arg("mode"))
      .def("set_link", &ModePolicy::set_link)
      .def("set_fused_factor", &ModePolicy::set_fused_factor)
      .def_property_readonly("mode", [](const ModePolicy& p) { return mode_name(p.mode()); })
      .def_property_readonly("iterations", &ModePolicy::iterations)
      .def_property_readonly("switches", &ModePolicy::switches)
      .def_property_readonly("model", &ModePolicy::model)
      .def_property_readonly("decisions", [](const ModePolicy& p) {
        return std::vector<Decision>(p.decisions().begin(), p.decisions().end());
      })
      .def_property_readonly("reason", &ModePolicy::reason);
  m.def("predict", [](const PolicyModel& model, double rows, double outside_s) {
    const Prediction p = predict(model, rows, outside_s);
    return py::make_tuple(p.fetch_s, p.was_s, p.cas_s);
  }, py::arg("model"), py::arg("rows"), py::arg("outside_s") = 0.0);
  m.def("crossover_rows", &crossover_rows, py::arg("model"), py::arg("outside_s") = 0.0, py::arg("limit") = 65536);
}

}  // namespace
}  // namespace sidp

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native core of sidp. Pointers and streams cross as integers; see _C.pyi.";
#ifdef NDEBUG
  m.attr("debug_build") = false;
#else
  m.attr("debug_build") = true;
#endif
  py::register_exception_translator(&sidp::translate);
  sidp::bind_core(m);
  sidp::bind_policy(m);
  sidp::bind_p2p(m);
  sidp::bind_ffn_cache(m);
#ifdef SIDP_WITH_CUDA
  m.attr("with_cuda") = true;
  sidp::bind_cuda_p2p(m);
  sidp::bind_cuda_ring(m);
#else
  m.attr("with_cuda") = false;
#endif
  sidp::bind_cas_cpu(m);
#ifdef SIDP_WITH_CUDA
  sidp::bind_cas_cuda(m);
#endif
  sidp::bind_sim(m);
}
