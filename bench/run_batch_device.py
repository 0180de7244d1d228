"""The machine under bench/run_batch_gpu.py: an MPS of its own, what a process takes of a GPU, what is installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time

_CONTEXT = """
import sys, torch, transformers
config = transformers.Qwen3Config(
    vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
)
with torch.inference_mode():
    model = transformers.Qwen3ForCausalLM(config).to("cuda", torch.bfloat16)
    model(input_ids=torch.zeros((1, 2), dtype=torch.int64, device="cuda"), use_cache=False)
torch.cuda.synchronize()
del model
torch.cuda.empty_cache()
free, total = torch.cuda.mem_get_info()
print(total - free, total, flush=True)
sys.stdin.readline()
"""


def measure_context(ranks: int, eager: bool) -> tuple[int, int]:
    """(bytes that one of `ranks` processes on a GPU takes before it holds anything, the GPU's), with the kernels of a
    first forward loaded, as `sidp run-batch` loads them before it looks at what is left. `eager`: with all kernels loaded.

    Processes are started one after another, all alive at the end, whose memory is divided by their number.
    """
    started, used, total = [], 0, 0
    environment = os.environ | {"CUDA_MODULE_LOADING": "EAGER" if eager else "LAZY"}
    try:
        for _ in range(ranks):
            process = subprocess.Popen(
                [sys.executable, "-c", _CONTEXT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            started.append(process)
            used, total = map(int, process.stdout.readline().split())
    finally:
        for process in started:
            process.communicate("\n", timeout=30)
    return used // ranks, total


@contextlib.contextmanager
def mps(wanted: bool):
    """An MPS of our own for the rows' processes, stopped at the end."""
    if not wanted:
        yield
        return
    folders = {name: tempfile.mkdtemp() for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")}
    os.environ.update(folders)
    subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True, timeout=30)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # the daemon's clients count among the devices that it sees
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    try:
        yield
    finally:
        subprocess.run(["nvidia-cuda-mps-control"], input="quit\n", text=True, timeout=30, check=False)
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        for name, folder in folders.items():
            os.environ.pop(name)
            shutil.rmtree(folder, ignore_errors=True)


def device_memory() -> int:
    """Bytes of the smallest GPU, without a CUDA context of our own."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    return min(int(line) for line in lines) << 20


def environment(dry_run: bool) -> dict:
    """Without a CUDA context of our own, which would take memory from the rows."""
    import torch
    import transformers

    names = ["cpu"]
    if not dry_run:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "devices": names,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
