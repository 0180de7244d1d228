"""Has engine.py start one process a rank, and collects what they did."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

_ENGINE = Path(__file__).with_name("engine.py")
# The same for plain and pooled engines: two of them share the cores; freed memory leaves the process at once, so that
# what vLLM sizes the KV cache by (the resident set) is what is in use.
_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # all requests are there at the first step, so batches are the same
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def _forks() -> subprocess.Popen:
    """The process that has imported vLLM; it ends with its standard input."""
    return subprocess.Popen(
        [sys.executable, str(_ENGINE)],
        env={**os.environ, **_ENVIRONMENT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_ranks(
    folder: Path, jobs: list[list[dict[str, Any]]], *, timeout_s: float = 600, **environment: str
) -> list[list[dict[str, Any]]]:
    """Job r on rank r of ``len(jobs)``, all at once; their results by rank. AssertionError with the log of a rank that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    environment |= {"SIDP_VLLM_WORLD_SIZE": str(len(jobs)), "SIDP_VLLM_MASTER_PORT": str(free_port())}
    ranks = []
    for rank, job in enumerate(jobs):
        (folder / f"job{rank}.json").write_text(json.dumps(job))
        ranks.append(
            {
                "job": str(folder / f"job{rank}.json"),
                "result": str(folder / f"result{rank}.json"),
                "log": str(folder / f"log{rank}"),
                "environment": {**environment, "SIDP_VLLM_RANK": str(rank)},
            }
        )
    forks = _forks()
    forks.stdin.write(json.dumps({"ranks": ranks, "timeout_s": timeout_s}) + "\n")
    forks.stdin.flush()
    answer = forks.stdout.readline()
    assert answer, f"{_ENGINE.name} ended with exit code {forks.wait()}"
    for rank, code in enumerate(json.loads(answer)):
        assert code == 0, f"rank {rank}: exit {code}\n{_tail(folder / f'log{rank}')}"
    return [json.loads((folder / f"result{rank}.json").read_text()) for rank in range(len(jobs))]


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if " INFO " not in line]
    return "\n".join(lines[-60:])
