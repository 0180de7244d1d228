"""The README's example under torchrun: each rank's result equals the FFN formula on unpooled weights."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "ten_lines.py"
LINE = re.compile(r"rank (\d): keeps ([\d.]+) of ([\d.]+) MB, fetched ([\d.]+) MB, \|y\| = ([\d.]+)")


def weights_of_the_example():
    """The example's own `weights`, with its group and its pool replaced by nothing."""
    source = EXAMPLE.read_text().split("dist.init_process_group")[0]
    namespace = {}
    exec(compile(source, str(EXAMPLE), "exec"), namespace)
    return namespace


def expected_norm(rank, example):
    x = torch.randn(4, example["HIDDEN"], generator=torch.Generator().manual_seed(rank)).bfloat16()
    for layer in range(example["LAYERS"]):
        w = example["weights"](layer)
        gate, up = x @ w["gate"].T, x @ w["up"].T
        x = x + (torch.nn.functional.silu(gate) * up) @ w["down"].T
    return x.float().norm().item()


@pytest.mark.timeout(200)
def test_ten_lines_under_torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(EXAMPLE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert ran.returncode == 0, ran.stderr
    found = {int(match[1]): match for match in map(LINE.search, ran.stdout.splitlines()) if match}
    assert sorted(found) == [0, 1, 2, 3]
    example = weights_of_the_example()
    for rank, match in found.items():
        assert float(match[2]) == pytest.approx(float(match[3]) / 4, abs=0.1)
        assert float(match[4]) > 0
        assert float(match[5]) == pytest.approx(expected_norm(rank, example), rel=1e-4)
