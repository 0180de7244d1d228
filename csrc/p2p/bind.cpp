// Python's view of csrc/p2p: arenas, mappings, liveness. Pointers cross as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "atomics.hpp"
#include "error.hpp"
#include "p2p/bind_common.hpp"
#include "p2p/descriptor_exchange.hpp"
#include "p2p/memory_limit.hpp"
#include "p2p/peer_watch.hpp"
#include "p2p/shm_arena.hpp"

namespace py = pybind11;

namespace sidp {
namespace {

ArenaPhase phase_from(const std::string& name) {
  if (name == "created") return ArenaPhase::created;
  if (name == "committed") return ArenaPhase::committed;
  if (name == "finished") return ArenaPhase::finished;
  if (name == "closed") return ArenaPhase::closed;
  if (name == "failed") return ArenaPhase::failed;
  throw ConfigError("phase must be 'created', 'committed', 'finished', 'closed' or 'failed', got '" + name + "'");
}

const char* phase_name(ArenaPhase phase) {
  switch (phase) {
    case ArenaPhase::created: return "created";
    case ArenaPhase::committed: return "committed";
    case ArenaPhase::finished: return "finished";
    case ArenaPhase::closed: return "closed";
    case ArenaPhase::failed: return "failed";
  }
  return "invalid";
}

void bind_process(py::module_& m) {
  py::class_<ProcessIdentity>(m, "ProcessIdentity")
      .def(py::init([](std::int64_t pid, std::uint64_t start_time, std::string boot_id, std::uint64_t pid_namespace,
                       std::uint32_t uid) {
             return ProcessIdentity{pid, start_time, std::move(boot_id), pid_namespace, uid};
           }),
           py::arg("pid"), py::arg("start_time"), py::arg("boot_id"), py::arg("pid_namespace"), py::arg("uid"))
      .def_static("current", [] { return ProcessIdentity(ProcessIdentity::current()); })
      .def_readonly("pid", &ProcessIdentity::pid)
      .def_readonly("start_time", &ProcessIdentity::start_time)
      .def_readonly("boot_id", &ProcessIdentity::boot_id)
      .def_readonly("pid_namespace", &ProcessIdentity::pid_namespace)
      .def_readonly("uid", &ProcessIdentity::uid);
  m.def("available_memory", &available_memory, "Bytes of memory a new arena may take.");
  m.def("sweep_names", &sweep_names, py::arg("directory") = kShmDirectory,
        "Removes the names that ended processes of this user left in shared memory; returns how many.");
}

void bind_descriptors(py::module_& m) {
  py::class_<Descriptor, std::shared_ptr<Descriptor>>(m, "Descriptor")
      .def_property_readonly("fd", &Descriptor::get)
      .def("close", &Descriptor::reset);
  py::class_<DescriptorExchange>(m, "DescriptorExchange")
      .def(py::init([](int rank, int world_size, const std::string& token) {
             return std::make_unique<DescriptorExchange>(rank, world_size, token_from(token));
           }),
           py::arg("rank"), py::arg("world_size"), py::arg("token"))
      .def_property_readonly("address", [](const DescriptorExchange& exchange) { return py::bytes(exchange.address()); })
      .def("run", [](DescriptorExchange& exchange, int fd, const std::vector<std::string>& addresses, double timeout_s) {
             std::vector<Descriptor> received;
             {
               const py::gil_scoped_release release;
               received = exchange.run(fd, addresses, timeout_s);
             }
             std::vector<std::shared_ptr<Descriptor>> shared;
             for (Descriptor& descriptor : received) shared.push_back(std::make_shared<Descriptor>(std::move(descriptor)));
             return shared;
           },
           py::arg("fd"), py::arg("addresses"), py::arg("timeout_s"));
}

void bind_arenas(py::module_& m) {
  py::class_<ShmArena, std::shared_ptr<ShmArena>>(m, "ShmArena")
      .def(py::init([](int rank, int world_size, const std::string& token, std::uint64_t extent_bytes,
                       std::uint64_t mailbox_bytes, const std::string& kind, const std::string& directory) {
             const ArenaSpec spec{rank, world_size, token_from(token), extent_bytes, mailbox_bytes};
             const ShmKind shm = shm_kind(kind);
             const py::gil_scoped_release release;
             return std::make_shared<ShmArena>(spec, shm, directory);
           }),
           py::arg("rank"), py::arg("world_size"), py::arg("token"), py::arg("extent_bytes"), py::arg("mailbox_bytes") = 0,
           py::arg("kind") = "memfd", py::arg("directory") = kShmDirectory)
      .def_property_readonly("kind", [](const ShmArena& arena) { return shm_kind_name(arena.kind()); })
      .def_property_readonly("extents", [](const ShmArena& arena) { return address(arena.extents()); })
      .def_property_readonly("mailboxes", [](const ShmArena& arena) { return address(arena.mailboxes()); })
      .def_property_readonly("extent_bytes", [](const ShmArena& arena) { return arena.layout().extents.bytes; })
      .def_property_readonly("mailbox_bytes", [](const ShmArena& arena) { return arena.layout().mailboxes.bytes; })
      .def_property_readonly("activity", [](const ShmArena& arena) { return address(&arena.header()->activity); })
      .def_property_readonly("total_bytes", [](const ShmArena& arena) { return arena.layout().total_bytes; })
      .def_property_readonly("phase", [](const ShmArena& arena) { return phase_name(arena.phase()); })
      .def("set_phase", [](ShmArena& arena, const std::string& name) { arena.set_phase(phase_from(name)); })
      .def("handle", [](const ShmArena& arena) { return py::bytes(arena.handle()); })
      .def("unlink", &ShmArena::unlink)
      .def("close", &ShmArena::close, NoGil())
      .def_property_readonly("closed", &ShmArena::closed);

  py::class_<PeerMapping, std::shared_ptr<PeerMapping>>(m, "PeerMapping")
      .def(py::init([](const std::string& handle, int rank, int world_size, const std::string& token,
                       std::uint64_t extent_bytes, std::uint64_t mailbox_bytes, const std::string& directory) {
             const ArenaExpectation expected{rank, world_size, token_from(token), extent_bytes, mailbox_bytes};
             const py::gil_scoped_release release;
             return std::make_shared<PeerMapping>(handle, expected, directory);
           }),
           py::arg("handle"), py::arg("rank"), py::arg("world_size"), py::arg("token"), py::arg("extent_bytes"),
           py::arg("mailbox_bytes") = 0, py::arg("directory") = kShmDirectory)
      .def_property_readonly("rank", &PeerMapping::rank)
      .def_property_readonly("extents", [](const PeerMapping& mapping) { return address(mapping.extents()); })
      .def_property_readonly("mailboxes", [](const PeerMapping& mapping) { return address(mapping.mailboxes()); })
      .def_property_readonly("extent_bytes", &PeerMapping::extent_bytes)
      .def_property_readonly("mailbox_bytes", &PeerMapping::mailbox_bytes)
      .def_property_readonly("activity", [](const PeerMapping& mapping) { return load_relaxed(&mapping.header()->activity); })
      .def_property_readonly("phase_word", [](const PeerMapping& mapping) { return address(&mapping.header()->phase); })
      .def_property_readonly("phase", [](const PeerMapping& mapping) { return phase_name(mapping.phase()); })
      .def("close", &PeerMapping::close, NoGil())
      .def_property_readonly("closed", &PeerMapping::closed);
}

void bind_watch(py::module_& m) {
  py::class_<PeerWatch, std::shared_ptr<PeerWatch>>(m, "PeerWatch")
      .def(py::init([](int rank, int world_size, int beat_ms, int stale_beats, bool pidfd) {
             return std::make_shared<PeerWatch>(rank, world_size, PeerWatch::Options{beat_ms, stale_beats, pidfd});
           }),
           py::arg("rank"), py::arg("world_size"), py::arg("beat_ms") = 100, py::arg("stale_beats") = 30, py::arg("pidfd") = true)
      .def("watch", &PeerWatch::watch, py::arg("peer"), py::arg("identity"))
      .def("attach", [](PeerWatch& watch, const PeerMapping& mapping) { watch.attach(mapping.rank(), mapping.header()); })
      .def("attach_own", [](PeerWatch& watch, const ShmArena& arena) { watch.attach_own(arena.header()); })
      .def("detach", &PeerWatch::detach, NoGil())
      .def("dead_rank", &PeerWatch::dead_rank)
      .def_property_readonly("dead_word", [](const PeerWatch& watch) { return address(&watch.dead_word()); })
      .def("state", [](const PeerWatch& watch, int peer) { return peer_state_name(watch.state(peer)); })
      .def("lose", &PeerWatch::lose, py::arg("rank"))
      .def("go_on_without", &PeerWatch::go_on_without, py::arg("peer"))
      .def("check", &PeerWatch::check, py::arg("doing"))
      .def("stop", &PeerWatch::stop, NoGil());
}

// A 64-bit word in memory that ranks share; `keep` owns the memory.
struct SharedWord {
  std::uint64_t* word;
  py::object keep;
};

void bind_words(py::module_& m) {
  py::class_<SharedWord>(m, "SharedWord")
      .def(py::init([](std::uintptr_t address, py::object keep) {
             SIDP_REQUIRE(address != 0 && address % 8 == 0, ConfigError, "a shared word at ", address, ": expected a multiple of 8");
             return SharedWord{reinterpret_cast<std::uint64_t*>(address), std::move(keep)};
           }),
           py::arg("address"), py::arg("keep"))
      .def("load", [](const SharedWord& self) { return load_acquire(self.word); })
      .def("store", [](const SharedWord& self, std::uint64_t value) { store_release(self.word, value); }, py::arg("value"))
      // The word's value after it was set to `value` where it was 0.
      .def("set_once",
           [](const SharedWord& self, std::uint64_t value) {
             std::uint64_t there = 0;
             return compare_exchange(self.word, there, value) ? value : there;
           },
           py::arg("value"));
}

}  // namespace

void bind_p2p(py::module_& m) {
  bind_words(m);
  bind_process(m);
  bind_descriptors(m);
  bind_arenas(m);
  bind_watch(m);
}

}  // namespace sidp
