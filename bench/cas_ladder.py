"""The ladder of one small request: what each step of CaS brings. Run: python bench/cas_ladder.py [--device cuda]

One rank has rows to compute, the others have none. Figures are the median iteration of the busy rank.

    gather    weights of every layer fetched in lockstep, nothing ahead of use, idle ranks run dummy iterations
    cas v1    CaS, every request by itself, idle ranks run dummy iterations in lockstep (CPU: the CUDA server always fuses)
    cas v2    the same, waiting requests fused
    cas v3    CaS as built: fused, idle ranks send nothing

On the CPU links are capped (SIDP_CPU_LINK_GBPS), so that moving weights costs what it costs on a real link beside the
arithmetic. With several ranks on one GPU there is no NCCL (it takes one rank a device), so that the gather step copies every
layer's remote extents out of the other ranks' memory, all ranks in step; start MPS first, or ranks only take turns there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from launch import parallel_launch

ITERATIONS = 9
STEPS = {  # mode, dummy iterations, lockstep layers, fusion
    "gather": ("was", True, True, "1"),
    "v1": ("cas", True, True, "0"),
    "v2": ("cas", True, True, "1"),
    "v3": ("cas", False, False, "1"),
}
SHAPES = {"cpu": (4, 8, 512, 2048), "cuda": (4, 8, 5120, 25600)}  # ranks, layers, hidden, inner


def _iterations(ctx, device: str, step: str, layers: int, hidden: int, inner: int, rows: int) -> float:
    import torch
    import torch.distributed as dist

    import sidp

    mode, dummies, lockstep, _ = STEPS[step]
    if device == "cuda":
        torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    spec = sidp.FFNSpec(hidden, inner, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    # force_fetch: ranks that share a GPU stand for ranks that do not
    slots = 1 if mode == "was" else None
    config = sidp.PoolConfig(mode=mode, slots=slots, device=device, force_fetch=device == "cuda", timeout_s=60)
    times = []
    with torch.inference_mode(), sidp.WeightPool([spec] * layers, config=config) as pool:
        for layer in range(layers):
            if pool.owns(layer):
                shapes = {tensor.name: tensor.shape for tensor in spec.unit().tensors}
                pool.load(layer, {n: torch.full(s, 1e-3, dtype=spec.dtype, device=device) for n, s in shapes.items()})
        pool.commit()
        works = ctx.rank == 0 or dummies
        for _ in range(ITERATIONS):
            _in_step(device)  # the start of the measurement, for all steps of the ladder alike
            begin = time.perf_counter()
            x = torch.ones(rows if ctx.rank == 0 else 1, hidden, dtype=spec.dtype, device=device)
            for layer in range(layers if works else 0):
                if lockstep:
                    _in_step(device)
                x = sidp.ffn_forward(x, pool, layer)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        calls = pool.stats().calls
        if works and (calls[mode] == 0 or calls["was" if mode == "cas" else "cas"] > 0):
            raise AssertionError(f"{step} is to run in {mode} and made calls {calls}")
        dist.barrier()
    return statistics.median(times[2:])


def _in_step(device: str) -> None:
    import torch
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--shape", type=int, nargs=4, metavar=("RANKS", "LAYERS", "HIDDEN", "INNER"))
    parser.add_argument("--links", nargs="+", default=["0.5", "2"], help="GB/s, CPU only")
    args = parser.parse_args()
    ranks, *shape = args.shape or SHAPES[args.device]
    steps = [step for step in STEPS if step != "v1" or args.device == "cpu"]
    print(f"{ranks} ranks, {shape[0]} layers of {shape[1]} x {shape[2]} on {args.device}, {os.cpu_count()} cores; ms")
    print(
        f"{'link GB/s':>9} {'rows':>5} " + " ".join(f"{step:>9}" for step in steps) + f" {'gather/v3':>9}", flush=True
    )
    for link in args.links if args.device == "cpu" else ["as is"]:
        if args.device == "cpu":
            os.environ["SIDP_CPU_LINK_GBPS"] = link
        for rows in args.rows:
            took = {}
            for step in steps:
                os.environ["SIDP_CAS_FUSE"] = STEPS[step][3]
                took[step] = parallel_launch(_iterations, ranks, args.device, step, *shape, rows, timeout=120)[0] * 1e3
            cells = " ".join(f"{took[step]:>9.2f}" for step in steps)
            print(f"{link:>9} {rows:>5} {cells} {took['gather'] / took['v3']:>9.1f}", flush=True)


if __name__ == "__main__":
    main()
