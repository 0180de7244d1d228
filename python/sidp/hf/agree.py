"""Steps that may fail on one rank alone, before the pool exists: the others hear of it instead of waiting."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..config import PoolConfig
from ..control import ControlPlane
from ..errors import SidpError


@contextlib.contextmanager
def agreement(group: Any, config: PoolConfig) -> Iterator[ControlPlane]:
    """Collective: a control plane for the `with` block, whose `barrier(name)` a rank passes when all have come.

    An error that leaves the block on one rank is raised by the others too, at their next barrier, in the same class.
    """
    control = ControlPlane(group, config.timeout_s)
    try:
        yield control
    except SidpError as error:
        control.fail(error)
        raise
    finally:
        control.close()
