"""Which versions of vLLM the plugin is known to fit, and the error for the others."""

from __future__ import annotations

import re

from ..errors import ConfigError

# By reading the sources of every minor release in between; 0.32 is also what the tests run (see docs/vllm.md).
FIRST, LAST = (0, 20), (0, 33)


class UnsupportedVllmError(ConfigError):
    """This vLLM is of a version that the plugin was not made for, or lacks what it builds on."""


def installed() -> str:
    import vllm

    return str(getattr(vllm, "__version__", "of an unknown version"))


def require_supported() -> None:
    """UnsupportedVllmError outside FIRST ... LAST."""
    version = installed()
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not FIRST <= (int(numbers[1]), int(numbers[2])) <= LAST:
        raise UnsupportedVllmError(
            f"vLLM {version} is not supported by sidp's plugin, which knows {FIRST[0]}.{FIRST[1]} to "
            f"{LAST[0]}.{LAST[1]}: install one of these, or run without load_format='sidp'"
        )
