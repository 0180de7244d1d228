"""What a pool is made of (FFNSpec, Unit, TensorSpec) and how it behaves (PoolConfig)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from .backups import check_redundancy
from .errors import ConfigError

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "gelu_new", "relu", "relu2")
MODES = ("auto", "was", "cas", "local")
PLACEMENTS = ("layer", "striped")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a unit.

    Args:
        name: its key in ``WeightPool.load``.
        shape: 1-D or more; row-major.
        dtype: a torch dtype.
        split: how the intermediate dimension lies in it: "rows" (dimension 0), "cols" (dimension 1), "none" (it has none).
        groups: blocks concatenated along the split dimension, 2 for a fused gate_up of [2 * I, H].
        role: what it is in the unit's formula: "gate", "up", "gate_up", "down", or one of them with "_bias"; empty
            where the name says so. Read by CaS only.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    split: str = "none"
    groups: int = 1
    role: str = ""

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if not self.shape or min(self.shape) < 1:
            raise ConfigError(f"tensor '{self.name}' has shape {self.shape}: every dimension must be 1 or more")
        if not isinstance(self.dtype, torch.dtype):
            raise ConfigError(f"tensor '{self.name}' has dtype {self.dtype!r}: expected a torch.dtype")
        if self.split not in ("none", "rows", "cols"):
            raise ConfigError(f"tensor '{self.name}': split must be 'none', 'rows' or 'cols', got {self.split!r}")
        if self.split == "cols" and len(self.shape) != 2:
            raise ConfigError(f"tensor '{self.name}' of shape {self.shape}: only a matrix can be split by 'cols'")

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for n in self.shape:
            count *= n
        return count


@dataclass(frozen=True)
class Unit:
    """One layer's FFN weights: tensors under the names the engine gives them.

    Args:
        tensors: in the order in which they lie in a slot.
        formula: the FFNSpec whose formula they compute, or None where sidp does not know it (then WaS only).
    """

    tensors: tuple[TensorSpec, ...]
    formula: FFNSpec | None = None

    def __post_init__(self):
        object.__setattr__(self, "tensors", tuple(self.tensors))
        names = [tensor.name for tensor in self.tensors]
        if not names:
            raise ConfigError("a unit needs at least one tensor, got none")
        if len(set(names)) != len(names):
            raise ConfigError(f"tensor names of a unit must differ, got {names}")

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class FFNSpec:
    """The FFN of one layer.

    Gated: ``y = down(act(gate(x)) * up(x))``; plain: ``y = down(act(up(x)))``. ``gate`` and ``up`` are [I, H], ``down`` is
    [H, I] (torch.nn.Linear's layout), biases [I], [I] and [H]. "gelu" is the exact form, "gelu_tanh" and "gelu_new" its tanh
    approximation, "relu2" the square of relu.
    """

    hidden_size: int
    intermediate_size: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self):
        for name in ("hidden_size", "intermediate_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be an integer of 1 or more, got {value!r}")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {self.dtype!r}")

    def unit(self) -> Unit:
        h, i = self.hidden_size, self.intermediate_size
        inner = ("gate", "up") if self.gated else ("up",)
        tensors = [TensorSpec(name, (i, h), self.dtype, "rows") for name in inner]
        tensors.append(TensorSpec("down", (h, i), self.dtype, "cols"))
        if self.bias:
            tensors += [TensorSpec(f"{name}_bias", (i,), self.dtype, "rows") for name in inner]
            tensors.append(TensorSpec("down_bias", (h,), self.dtype))
        return Unit(tuple(tensors), self)


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected 1/0, true/false, yes/no or on/off")


def _optional_int(text: str) -> int | None:
    return None if text.lower() in ("", "none", "auto") else int(text)


def _setting(name: str, default: Any, parse: Callable[[str], Any]) -> Any:
    """A field that an explicit argument sets, else SIDP_<NAME>, else the default."""

    def read():
        text = os.environ.get(f"SIDP_{name.upper()}")
        if text is None:
            return default
        try:
            return parse(text)
        except ValueError as error:
            raise ConfigError(f"environment variable SIDP_{name.upper()}={text!r}: {error}") from None

    return field(default_factory=read)


@dataclass(frozen=True)
class PoolConfig:
    """How a pool behaves. Every field can come from the environment as SIDP_<FIELD>; an explicit argument wins.

    Args:
        mode: "auto" (the policy picks), "was" (fetch weights), "cas" (send activations), "local" (keep everything here).
        placement: "layer" (a layer has one owner) or "striped" (every owner holds 1/D of every layer).
        slots: ring slots a rank fetches into; None picks the fewest that hide the fetches.
        resident_layers: layers, spread evenly, that every rank keeps whole.
        host_tier: let pinned host memory own units too (CUDA): all of them, or what ``device_bytes`` does not hold.
        peak_shifting: walk each cycle of D layers from the rank's own offset, so that no owner feeds two ranks at once.
        cas_sms: SMs of the CaS server (CUDA); None takes the measured default, fewer where ranks share a GPU.
        device: where the weights live; None takes the current CUDA device where the build and the machine have one, else
            the CPU.
        force_fetch: fetch the layers of owners on this very GPU too, instead of reading them in place (tests, measurements).
        redundancy: 1: the group survives the loss of one rank (on GPUs in WaS); 0: a death ends it with PeerError.
        backup: where every unit's second copy is then: "peer" (another rank's memory), "host" (host memory that outlives
            its process), "file" (the safetensors files, read again after a loss; CPU backend).
        timeout_s: seconds after which a wait gives up with PeerError.
        device_bytes: with host_tier, bytes of every rank's share that stay in its device memory, where peers fetch them;
            None keeps nothing there.
    """

    mode: str = _setting("mode", "auto", str)
    placement: str = _setting("placement", "layer", str)
    slots: int | None = _setting("slots", None, _optional_int)
    resident_layers: int = _setting("resident_layers", 0, int)
    host_tier: bool = _setting("host_tier", False, _boolean)
    peak_shifting: bool = _setting("peak_shifting", True, _boolean)
    cas_sms: int | None = _setting("cas_sms", None, _optional_int)
    device: str | torch.device | None = _setting("device", None, str)
    timeout_s: float = _setting("timeout_s", 60.0, float)
    redundancy: int = _setting("redundancy", 0, int)
    backup: str = _setting("backup", "peer", str)
    force_fetch: bool = _setting("force_fetch", False, _boolean)
    device_bytes: int | None = _setting("device_bytes", None, _optional_int)

    def __post_init__(self):
        if self.mode not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.placement not in PLACEMENTS:
            raise ConfigError(f"placement must be 'layer' or 'striped', got {self.placement!r}")
        check_redundancy(self.redundancy, self.backup)
        for name, least in (("slots", 1), ("resident_layers", 0), ("cas_sms", 1), ("device_bytes", 0)):
            value = getattr(self, name)
            if value is None and name != "resident_layers":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} must be an integer of {least} or more, got {value!r}")
        if self.device_bytes is not None and not self.host_tier:
            raise ConfigError("device_bytes says what host_tier=True leaves on the device: set both, or neither")
        if not isinstance(self.timeout_s, (int, float)) or not 0 < self.timeout_s < float("inf"):
            raise ConfigError(f"timeout_s must be a positive number of seconds, got {self.timeout_s!r}")

    # What all ranks of a group must agree on; the rest is each rank's own affair.
    def shared_fields(self) -> dict[str, Any]:
        own = {"mode", "cas_sms", "device", "timeout_s"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
