"""`sidp run-batch --load-format dummy` of one replicated rank whose FFN weights accelerate keeps in host memory.

For bench/run_batch_gpu.py: the same engine, requests and summary, with accelerate's hooks in place of a pool.
"""

from __future__ import annotations

import os
import socket
import sys

import torch
from torch import nn

from sidp.hf import dummy
from sidp.hf.recognize import find_ffns


def offloaded_model(source: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    from accelerate import cpu_offload

    model = dummy.skeleton(source, dtype)
    ffns = find_ffns(model, allow_meta=True)
    here = []
    for ffn in ffns:
        for spec, (name, module, leaf) in zip(ffn.unit.tensors, ffn.parameters(), strict=True):
            value = dummy.made_up(f"{ffn.path}.{name}", spec.shape, spec.dtype, device, seed).cpu()
            here.append((module, leaf, nn.Parameter(value, requires_grad=False)))
            module._parameters[leaf] = None
    dummy.fill(model, device, seed)
    for module, leaf, value in here:
        module._parameters[leaf] = value
    for ffn in ffns:
        cpu_offload(ffn.module, execution_device=device)
    return model


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As torchrun's only rank, all of it runs in this process.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dummy.dummy_model = offloaded_model
    from sidp.cli import main as command

    words = sys.argv[1:]
    del words[words.index("--dp") : words.index("--dp") + 2]
    sys.exit(command(["run-batch", *words]))


if __name__ == "__main__":
    main()
