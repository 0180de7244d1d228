#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "model.hpp"

namespace py = pybind11;

namespace sidp {
namespace {

using namespace sim;

void bind_inputs(py::module_& m) {
  py::class_<Request>(m, "SimRequest")
      .def(py::init([](double arrival, int prompt, int answer, int cached, int rank) {
             return Request{arrival, prompt, answer, cached, rank};
           }),
           py::arg("arrival"), py::arg("prompt"), py::arg("answer"), py::arg("cached") = 0, py::arg("rank") = -1)
      .def_readonly("arrival", &Request::arrival)
      .def_readonly("prompt", &Request::prompt)
      .def_readonly("answer", &Request::answer)
      .def_readonly("cached", &Request::cached)
      .def_readonly("rank", &Request::rank);
  py::class_<Compute>(m, "SimCompute")
      .def(py::init<>())
      .def_readwrite("ffn", &Compute::ffn)
      .def_readwrite("serve", &Compute::serve)
      .def_readwrite("rest", &Compute::rest)
      .def_readwrite("once", &Compute::once)
      .def_readwrite("cached_token_s", &Compute::cached_token_s)
      .def_readwrite("pair_s", &Compute::pair_s);
  py::class_<Fabric>(m, "SimFabric")
      .def(py::init<>())
      .def_readwrite("egress_bytes_per_s", &Fabric::egress_bytes_per_s)
      .def_readwrite("ingress_bytes_per_s", &Fabric::ingress_bytes_per_s)
      .def_readwrite("local_bytes_per_s", &Fabric::local_bytes_per_s)
      .def_readwrite("copy_bytes", &Fabric::copy_bytes)
      .def_readwrite("incast", &Fabric::incast)
      .def_readwrite("turns", &Fabric::turns)
      .def_readwrite("slice_bytes", &Fabric::slice_bytes)
      .def_readwrite("slice_pauses", &Fabric::slice_pauses)
      .def_readwrite("round_trip_s", &Fabric::round_trip_s)
      .def_readwrite("send_row_bytes", &Fabric::send_row_bytes)
      .def_readwrite("reply_row_bytes", &Fabric::reply_row_bytes);
  py::enum_<Reach>(m, "SimReach")
      .value("local", Reach::local)
      .value("was", Reach::was)
      .value("cas", Reach::cas)
      .value("auto", Reach::automatic)
      .value("gather", Reach::gather);
  py::enum_<Step>(m, "SimStep")
      .value("free", Step::free)
      .value("iteration", Step::iteration)
      .value("layer", Step::layer);
  py::class_<Options>(m, "SimOptions")
      .def(py::init<>())
      .def_readwrite("reach", &Options::reach)
      .def_readwrite("stages", &Options::stages)
      .def_readwrite("peak_shifting", &Options::peak_shifting)
      .def_readwrite("fuse", &Options::fuse)
      .def_readwrite("step", &Options::step)
      .def_readwrite("look_every", &Options::look_every)
      .def_readwrite("batched_tokens", &Options::batched_tokens)
      .def_readwrite("most_requests", &Options::most_requests)
      .def_readwrite("jitter", &Options::jitter)
      .def_readwrite("compute_factors", &Options::compute_factors)
      .def_readwrite("wake_s", &Options::wake_s)
      .def_readwrite("seed", &Options::seed)
      .def_readwrite("trace", &Options::trace);
  py::class_<Job>(m, "SimJob")
      .def(py::init<>())
      .def_readwrite("compute", &Job::compute)
      .def_readwrite("fabric", &Job::fabric)
      .def_readwrite("options", &Job::options)
      .def_readwrite("slots", &Job::slots)
      .def_readwrite("kv_tokens", &Job::kv_tokens)
      .def_readwrite("starts", &Job::starts)
      .def_readwrite("policies", &Job::policies)
      .def_readwrite("requests", &Job::requests);
}

void bind_results(py::module_& m) {
  py::class_<Iteration>(m, "SimIteration")
      .def_readonly("rank", &Iteration::rank)
      .def_readonly("mode", &Iteration::mode)
      .def_readonly("rows", &Iteration::rows)
      .def_readonly("requests", &Iteration::requests)
      .def_readonly("begin", &Iteration::begin)
      .def_readonly("end", &Iteration::end)
      .def_readonly("stall", &Iteration::stall);
  py::class_<RankResult>(m, "SimRankResult")
      .def_readonly("iterations", &RankResult::iterations)
      .def_readonly("idle_iterations", &RankResult::idle_iterations)
      .def_readonly("cas_iterations", &RankResult::cas_iterations)
      .def_readonly("tokens", &RankResult::tokens)
      .def_readonly("requests", &RankResult::requests)
      .def_readonly("most_kv_tokens", &RankResult::most_kv_tokens)
      .def_readonly("last_end", &RankResult::last_end)
      .def_readonly("busy_s", &RankResult::busy_s)
      .def_readonly("stall_s", &RankResult::stall_s)
      .def_readonly("fetches", &RankResult::fetches)
      .def_readonly("fetch_s", &RankResult::fetch_s)
      .def_readonly("requested_rows", &RankResult::requested_rows)
      .def_readonly("fused_rows", &RankResult::fused_rows)
      .def_readonly("requests_served", &RankResult::requests_served)
      .def_readonly("batches_served", &RankResult::batches_served)
      .def_readonly("switches", &RankResult::switches);
  py::class_<Result>(m, "SimResult")
      .def_readonly("end_s", &Result::end_s)
      .def_readonly("events", &Result::events)
      .def_readonly("ranks", &Result::ranks)
      .def_readonly("finished_s", &Result::finished_s)
      .def_readonly("read", &Result::read)
      .def_readonly("feeding_s", &Result::feeding_s)
      .def_readonly("crowded_s", &Result::crowded_s)
      .def_readonly("iterations", &Result::iterations);
}

}  // namespace

void bind_sim(py::module_& m) {
  bind_inputs(m);
  bind_results(m);
  m.def("simulate", &simulate, py::arg("placement"), py::arg("job"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace sidp
