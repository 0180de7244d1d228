"""Who the ranks of a group are: their places in torch.distributed, and the processes behind them."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ._native import C
from .errors import ConfigError, LayoutError


@dataclass(frozen=True)
class Membership:
    """`global_ranks` of the group, this process's `rank` in it, and the default store (None in a group of
    one)."""

    global_ranks: tuple[int, ...]
    rank: int
    store: Any

    @classmethod
    def of(cls, group: Any) -> Membership:
        """``group`` itself where it is a Membership; ConfigError where it is no process group that this process is in."""
        if isinstance(group, Membership):
            return group
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            if group is not None:
                raise ConfigError(
                    "group was given, but torch.distributed is not initialised: call init_process_group first"
                )
            return cls((0,), 0, None)
        try:
            ranks = tuple(dist.get_process_group_ranks(dist.group.WORLD if group is None else group))
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise ConfigError(f"group={group!r} is no process group of this process: {error}") from error
        own = dist.get_rank()
        if own not in ranks:
            raise ConfigError(f"global rank {own} is not in the given group of ranks {list(ranks)}")
        store = dist.distributed_c10d._get_default_store() if len(ranks) > 1 else None
        return cls(ranks, ranks.index(own), store)


@dataclass(frozen=True)
class Identity:
    """Which process a rank is. `boot_id` tells hosts apart; pids mean the same only within a
    `pid_namespace`."""

    pid: int
    start_time: int
    boot_id: str
    pid_namespace: int
    uid: int
    host: str

    @classmethod
    def current(cls) -> Identity:
        own = C.ProcessIdentity.current()
        host = socket.gethostname()[:255]
        return cls(own.pid, own.start_time, own.boot_id, own.pid_namespace, own.uid, host)

    def native(self) -> Any:
        return C.ProcessIdentity(self.pid, self.start_time, self.boot_id, self.pid_namespace, self.uid)

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, record: bytes, rank: int) -> Identity:
        """What ``rank`` published, every field checked; LayoutError where it is not an identity."""
        try:
            identity = cls(**json.loads(record[:4096]))
            identity._check()
        except (ValueError, TypeError, RecursionError) as error:
            raise LayoutError(f"rank {rank} published no valid identity: {error}") from error
        return identity

    def _check(self) -> None:
        limits = {
            "pid": (1, 1 << 31),
            "start_time": (0, 1 << 63),
            "pid_namespace": (0, 1 << 63),
            "uid": (0, 1 << 32),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value < high:
                raise ValueError(f"{name} is {value!r}")
        if not isinstance(self.host, str) or not isinstance(self.boot_id, str):
            raise ValueError("host and boot_id must be strings")
        if len(self.boot_id) != 32 or not set(self.boot_id) <= set("0123456789abcdef"):
            raise ValueError(f"boot_id is {self.boot_id!r}")


def require_one_host(identities: Sequence[Identity]) -> None:
    """ConfigError where a group spans hosts or users: shared memory and pids reach neither."""
    first = identities[0]
    for rank, other in enumerate(identities):
        if other.boot_id != first.boot_id:
            raise ConfigError(
                f"rank 0 runs on {first.host}, rank {rank} on {other.host}: a pool spans one host; pass "
                f"group= a process group of the ranks of one host"
            )
        if other.uid != first.uid:
            raise ConfigError(f"rank 0 runs as user {first.uid}, rank {rank} as {other.uid}: run all ranks as one user")
