"""How engines that know nothing of each other become one group.

Inside vLLM the default process group is the engine's own, so sidp's ranks meet in a store of their own: the TCPStore
at SIDP_VLLM_MASTER_ADDR and SIDP_VLLM_MASTER_PORT. Engine d of D with tp workers: worker t is rank d of pool t, and
the store's keys know it as d * tp + t.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, PeerError
from ..membership import Membership

_PREFIX = "SIDP_VLLM_"
# torchrun's name -> ours
_MOVED = {"RANK": "RANK", "WORLD_SIZE": "WORLD_SIZE", "MASTER_ADDR": "MASTER_ADDR", "MASTER_PORT": "MASTER_PORT"}
_TORCHRUN_ONLY = (
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
)

_stores: dict[tuple[str, int], Any] = {}  # the one that hosts must outlive every engine of this process


@dataclass(frozen=True)
class Place:
    """This engine among the engines, as the environment says it."""

    rank: int
    world_size: int
    address: str = ""
    port: int = 0
    job: str = ""  # tells two jobs that use one store apart
    hosted: bool = False  # somebody else (torchrun's agent) hosts the store

    @classmethod
    def from_environment(cls) -> Place:
        """ConfigError naming the variable that is missing or wrong; a group of one where none is set."""
        if _PREFIX + "WORLD_SIZE" not in os.environ:
            _refuse_torchrun()
            return cls(0, 1)
        rank, world_size = _integer("RANK", 0), _integer("WORLD_SIZE", 1)
        if rank >= world_size:
            raise ConfigError(f"{_PREFIX}RANK={rank} must be below {_PREFIX}WORLD_SIZE={world_size}")
        if world_size == 1:
            return cls(0, 1)
        address = os.environ.get(_PREFIX + "MASTER_ADDR", "127.0.0.1")
        job, hosted = os.environ.get(_PREFIX + "JOB", ""), os.environ.get(_PREFIX + "STORE_HOSTED") == "1"
        return cls(rank, world_size, address, _integer("MASTER_PORT", 1), job, hosted)


def join(place: Place, tp_rank: int, tp_size: int, timeout_s: float) -> Membership:
    """Collective over the DP peers of one tensor-parallel rank: their membership, for WeightPool's ``group``.

    Raises:
        PeerError: the store does not answer within ``timeout_s``.
    """
    if place.world_size == 1:
        return Membership((0,), 0, None)
    import torch.distributed as dist

    ranks = tuple(engine * tp_size + tp_rank for engine in range(place.world_size))
    own = ranks[place.rank]
    try:
        store = _open(place, own == 0 and not place.hosted, timeout_s)
        # An engine that this process or its parent made before has left its keys behind: count the engines.
        count = store.add(f"sidp-vllm/{place.job}/engines/{own}", 1)
    except RuntimeError as error:  # torch's own errors of stores all are
        raise PeerError(
            f"the store at {place.address}:{place.port} does not answer ({error}): rank 0 hosts it; are all engines "
            f"started, with the same {_PREFIX}MASTER_ADDR and {_PREFIX}MASTER_PORT?",
            0,
        ) from error
    return Membership(ranks, place.rank, dist.PrefixStore(f"sidp-vllm/{place.job}/{count}", store))


def use_torchrun(tensor_parallel_size: int) -> None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ConfigError(
            "torchrun did not start this process: run it with torchrun --nproc-per-node N, or set SIDP_VLLM_RANK, "
            "SIDP_VLLM_WORLD_SIZE and SIDP_VLLM_MASTER_PORT for each engine"
        )
    if not isinstance(tensor_parallel_size, int) or tensor_parallel_size < 1:
        raise ConfigError(f"tensor_parallel_size must be an integer of 1 or more, got {tensor_parallel_size!r}")
    environment = os.environ
    environment[_PREFIX + "JOB"] = "/".join(
        (environment["TORCHELASTIC_RUN_ID"], environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    )
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        environment[_PREFIX + "STORE_HOSTED"] = "1"
    for theirs, ours in _MOVED.items():
        environment[_PREFIX + ours] = environment.pop(theirs)
    local = int(environment["LOCAL_RANK"])
    for name in [*_TORCHRUN_ONLY, *(name for name in environment if name.startswith("TORCHELASTIC_"))]:
        environment.pop(name, None)
    _show_own_gpus(local * tensor_parallel_size, tensor_parallel_size)


def _show_own_gpus(first: int, count: int) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(first + count)]
    if len(names) < first + count:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={visible!r} has {len(names)} GPUs, but this rank's are {first} ... "
            f"{first + count - 1}: start fewer ranks, or make more GPUs visible"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + count])


def _refuse_torchrun() -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            "torchrun started this process, and vLLM would take its variables for its own group: call "
            "sidp.vllm.use_torchrun() before importing vLLM"
        )


def _integer(name: str, least: int) -> int:
    text = os.environ.get(_PREFIX + name, "")
    if not text.isdigit() or int(text) < least:
        raise ConfigError(f"environment variable {_PREFIX}{name}={text!r}: expected an integer of {least} or more")
    return int(text)


def _open(place: Place, hosts: bool, timeout_s: float) -> Any:
    import datetime

    import torch.distributed as dist

    key = (place.address, place.port)
    if key not in _stores:
        _stores[key] = dist.TCPStore(
            place.address,
            place.port,
            is_master=hosts,
            timeout=datetime.timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    return _stores[key]
