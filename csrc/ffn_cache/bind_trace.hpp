// A trace as Python sees it: (kind, layer, slot, begin, end).
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "trace.hpp"

namespace sidp::cache {

inline const char* kind_name(TraceEvent::Kind kind) {
  switch (kind) {
    case TraceEvent::Kind::fetch:
      return "fetch";
    case TraceEvent::Kind::compute:
      return "compute";
    case TraceEvent::Kind::stall:
      return "stall";
  }
  return "?";
}

inline pybind11::list trace_list(const std::vector<TraceEvent>& events) {
  pybind11::list list;
  for (const TraceEvent& event : events)
    list.append(pybind11::make_tuple(kind_name(event.kind), event.layer, event.slot, event.begin, event.end));
  return list;
}

}  // namespace sidp::cache
