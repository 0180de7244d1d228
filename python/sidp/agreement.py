"""What the ranks of a group must have in common before a pool allocates anything."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .config import FFNSpec, PoolConfig, Unit
from .control import ControlPlane
from .errors import ConfigError


def units_of(specs: Sequence[FFNSpec | Unit]) -> list[Unit]:
    """One Unit a layer. ConfigError for anything else, and for none."""
    units = []
    for layer, spec in enumerate(specs):
        if not isinstance(spec, (FFNSpec, Unit)):
            raise ConfigError(f"specs[{layer}] must be an FFNSpec or a Unit, got {type(spec).__name__}")
        units.append(spec if isinstance(spec, Unit) else spec.unit())
    if not units:
        raise ConfigError("specs is empty: give one FFNSpec per layer")
    return units


def agree(control: ControlPlane, units: Sequence[Unit], config: PoolConfig, **own) -> list[dict]:
    """Collective: every rank sees every rank's specs, config and ``own`` facts (``gpu`` among them), by rank.

    Raises:
        ConfigError: the first difference between two ranks' specs, configs or kinds of device.
    """
    mine = {
        "specs": [_describe(unit) for unit in units],
        "config": {name: str(value) for name, value in config.shared_fields().items()},
        **own,
    }
    replies = [json.loads(reply) for reply in control.exchange("agree", json.dumps(mine).encode())]
    for rank, reply in enumerate(replies):
        difference = _difference(replies[0], reply)
        if difference:
            raise ConfigError(
                f"rank 0 and rank {rank} disagree on {difference}: give all ranks the same specs and config"
            )
    return replies


def _describe(unit: Unit) -> list:
    return [[t.name, list(t.shape), str(t.dtype), t.split, t.groups] for t in unit.tensors] + [str(unit.formula)]


def _difference(a: dict, b: dict) -> str:
    """In words, where two ranks differ; empty where they do not."""
    if bool(a["gpu"]) != bool(b["gpu"]):
        return f"the device ({a['gpu'] or 'CPU'} and {b['gpu'] or 'CPU'})"
    if len(a["specs"]) != len(b["specs"]):
        return f"the number of layers ({len(a['specs'])} and {len(b['specs'])})"
    for layer, (x, y) in enumerate(zip(a["specs"], b["specs"], strict=True)):
        if x != y:
            return f"layer {layer} ({x} and {y})"
    for name in a["config"]:
        if a["config"][name] != b["config"].get(name):
            return f"config.{name} ({a['config'][name]} and {b['config'].get(name)})"
    return ""
