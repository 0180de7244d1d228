"""The profile's file: what is written is read, and what is wrong is named."""

from __future__ import annotations

import json

import pytest
import torch

from sidp.errors import ConfigError
from sidp.planner.gpus import load_gpu
from sidp.profile import FFNTimes, MachineProfile, find_times

TIMES = FFNTimes(64, 160, False, (1, 4, 9), (1.5e-6, 2.5e-6, 5e-6), torch.float16)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "p.json"
    for made in (
        MachineProfile("a machine", 54.5e9, 80_000_000_000, 3e12, 6e14, 2e-6, (TIMES,)),
        MachineProfile("a CPU", 0.0, ffn_times=(TIMES, FFNTimes(8, 16, True, (1,), (1e-6,)))),
    ):
        made.save(path)
        assert MachineProfile.load(path) == made


def test_the_planner_reads_the_same_file_and_says_what_it_misses(tmp_path):
    path = str(tmp_path / "p.json")
    MachineProfile("a machine", 54.5e9, 80_000_000_000, 3e12, 6e14, 7e-6, (TIMES,)).save(path)
    gpu = load_gpu("measured", path)
    assert (gpu.name, gpu.link_bytes_per_s, gpu.round_trip_s, gpu.ffn_times) == ("a machine", 54.5e9, 7e-6, (TIMES,))
    MachineProfile("a CPU", 54.5e9, ffn_times=(TIMES,)).save(path)
    with pytest.raises(ConfigError, match="planning needs memory_bytes"):
        load_gpu("measured", path)


def test_times_belong_to_their_shape_and_size_of_dtype():
    assert find_times((TIMES,), 64, 160, False, 2) is TIMES
    for other in ((64, 160, True, 2), (64, 160, False, 4), (64, 161, False, 2), (63, 160, False, 2)):
        assert find_times((TIMES,), *other) is None
    assert TIMES.at(1) == 1.5e-6 and TIMES.at(4) == 2.5e-6 and TIMES.at(18) == 1e-5
    assert TIMES.at(2) == pytest.approx(1.5e-6 + 1e-6 / 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "holds a list"),
        ("{}", "link_bytes_per_s must be"),
        ('{"link_bytes_per_s": -1}', "got -1"),
        ('{"link_bytes_per_s": 1, "sidp_profile": 2}', "sidp_profile is 2"),
        ('{"link_bytes_per_s": 1, "round_trip_s": 0}', "round_trip_s must be a positive"),
        ('{"link_gbps": 3, "compute": []}', "link_bytes_per_s must be"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, words):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        MachineProfile.load(path)


def test_a_dtype_that_torch_does_not_have_is_named(tmp_path):
    path = tmp_path / "p.json"
    MachineProfile("a machine", 1.0, ffn_times=(TIMES,)).save(path)
    record = json.loads(path.read_text())
    record["ffn_times"][0]["dtype"] = "bf17"
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="'bf17'"):
        MachineProfile.load(path)
