"""What doctor reads out of nvidia-smi's topology, and what it says of GPUs that do not reach each other or have no MPS."""

from __future__ import annotations

import pytest

from sidp.cli import doctor

_TWO = """\
\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV18\tPXB\t0-31\t0
GPU1\tNV18\t X \tPXB\t0-31\t0
NIC0\tPXB\tPXB\t X
"""


@pytest.mark.parametrize("text", [_TWO, _TWO.replace("\tGPU0\tGPU1", "\t\x1b[4mGPU0\tGPU1", 1)])
def test_the_topology_of_nvidia_smi(monkeypatch, text):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda *_: text)
    assert doctor._nvlink_table() == {(0, 0): "X", (0, 1): "NV18", (1, 0): "NV18", (1, 1): "X"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert doctor._nvlink_table() == {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda *_: None)
    assert doctor._nvlink_table() == {}


def _gpu(index, reaches):
    return {"index": index, "reaches": reaches, "reaches_rank": [0] * len(reaches)}


def test_who_reaches_whom():
    links = {(0, 1): "NV18", (1, 0): "NV18"}
    found = doctor._reach([_gpu(0, [1]), _gpu(1, [0])], links)
    assert (found.level, found.text) == ("ok", "0->1 NVLink NV18, 1->0 NVLink NV18")
    found = doctor._reach([_gpu(0, [1]), _gpu(1, [])], {})
    assert found.level == "note" and "performance rank 0" in found.text and "not reached: 1->0" in found.text
    assert doctor._reach([_gpu(0, [])], {}).level == "note"


def test_whether_ranks_can_share_a_gpu():
    assert doctor._mps([{"mps": True}]).level == "ok"
    found = doctor._mps([{"mps": False}])
    assert found.level == "note" and "does not run" in found.text and "a GPU of its own" in found.text
