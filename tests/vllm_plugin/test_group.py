"""How engines find each other, without vLLM: a store of their own, from environment variables."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from launch import parallel_launch
from sidp.errors import ConfigError
from sidp.vllm.group import Place, join, use_torchrun


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SIDP_VLLM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def set_all(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(f"SIDP_VLLM_{name}", value)


def test_no_variables_is_a_group_of_one():
    place = Place.from_environment()
    assert (place.rank, place.world_size) == (0, 1)
    assert join(place, 1, 2, 1.0).global_ranks == (0,)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"WORLD_SIZE": "2"}, "SIDP_VLLM_RANK=''"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "SIDP_VLLM_WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_PORT": "1"}, "must be below"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "SIDP_VLLM_MASTER_PORT=''"),
    ],
)
def test_variables_that_are_missing_or_wrong_are_named(monkeypatch, values, words):
    set_all(monkeypatch, **values)
    with pytest.raises(ConfigError, match=words):
        Place.from_environment()


def test_torchruns_own_variables_are_refused_until_they_are_moved(monkeypatch):
    variables = {
        "TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1",
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "JOB", "STORE_HOSTED"):
        monkeypatch.setenv(f"SIDP_VLLM_{name}", "")  # so that they are taken back after this test
        monkeypatch.delenv(f"SIDP_VLLM_{name}")
    with pytest.raises(ConfigError, match="use_torchrun"):
        Place.from_environment()
    use_torchrun(2)
    assert Place.from_environment() == Place(3, 4, "127.0.0.1", 1234, "job/1", hosted=True)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert not [name for name in variables if name in os.environ]
    with pytest.raises(ConfigError, match="torchrun did not start"):
        use_torchrun(1)


def test_a_rank_without_enough_gpus_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "JOB"):
        monkeypatch.setenv(f"SIDP_VLLM_{name}", "")
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ConfigError, match=r"has 3 GPUs, but this rank's are 2 \.\.\. 3"):
        use_torchrun(2)


def _two_engines_of_two_workers(ctx, port):
    """Ranks 0 and 1 are the workers of engine 0. Each worker meets its peer of the other engine, twice."""
    from sidp.control import ControlPlane

    engine, tp_rank = divmod(ctx.rank, 2)
    heard = []
    for attempt in range(2):
        members = join(Place(engine, 2, "127.0.0.1", port, "job"), tp_rank, 2, 60.0)
        control = ControlPlane(members, 60.0)
        heard.append((members.global_ranks, members.rank, control.exchange("who", f"{ctx.rank}.{attempt}".encode())))
        control.close()
    # The workers of an engine end together; here the host of the store waits for the others.
    everybody = ControlPlane(join(Place(ctx.rank, 4, "127.0.0.1", port, "end"), 0, 1, 60.0), 60.0)
    everybody.barrier("end")
    everybody.close()
    return heard


def test_workers_meet_their_peers_of_the_other_engine():
    from ranks import free_port

    results = parallel_launch(_two_engines_of_two_workers, 4, free_port(), rendezvous="none", timeout=120)
    for rank, heard in enumerate(results):
        engine, tp_rank = divmod(rank, 2)
        for attempt, (ranks, own, words) in enumerate(heard):
            assert (ranks, own) == ((tp_rank, 2 + tp_rank), engine)
            assert words == [f"{tp_rank}.{attempt}".encode(), f"{2 + tp_rank}.{attempt}".encode()]


def test_importing_the_plugin_imports_neither_torch_nor_vllm():
    code = "import sys, sidp.vllm; assert not {'torch', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
