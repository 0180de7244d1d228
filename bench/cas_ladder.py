"""The ladder of one small request on the CPU backend: what each step of CaS brings. Run: python bench/cas_ladder.py

One of four ranks has rows to compute, the others have none. Links are capped (SIDP_CPU_LINK_GBPS), so that moving
weights costs what it costs on a real link beside the arithmetic. Figures are the median iteration of the busy rank.

    gather    weights of every layer fetched in lockstep, nothing ahead of use, idle ranks run dummy iterations
    cas v1    CaS, every request by itself, idle ranks run dummy iterations in lockstep
    cas v2    the same, waiting requests fused
    cas v3    CaS as built: fused, idle ranks send nothing
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from launch import parallel_launch

RANKS, LAYERS, ITERATIONS = 4, 8, 9
HIDDEN, INNER = 512, 2048


def _iterations(ctx, mode: str, dummies: bool, lockstep_layers: bool, rows: int) -> float:
    import torch
    import torch.distributed as dist

    import sidp

    spec = sidp.FFNSpec(HIDDEN, INNER, dtype=torch.float32)
    config = sidp.PoolConfig(mode=mode, slots=1 if mode == "was" else None, timeout_s=60)
    times = []
    with sidp.WeightPool([spec] * LAYERS, config=config) as pool:
        for layer in range(LAYERS):
            if pool.owns(layer):
                pool.load(layer, {t.name: torch.full(t.shape, 1e-3) for t in spec.unit().tensors})
        pool.commit()
        works = ctx.rank == 0 or dummies
        for _ in range(ITERATIONS):
            dist.barrier()  # the start of the measurement, for all steps of the ladder alike
            begin = time.perf_counter()
            x = torch.ones(rows if ctx.rank == 0 else 1, HIDDEN)
            for layer in range(LAYERS if works else 0):
                if lockstep_layers:
                    dist.barrier()
                x = sidp.ffn_forward(x, pool, layer)
            times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def main() -> None:
    print(f"{RANKS} ranks, {LAYERS} layers of {HIDDEN} x {INNER} float32, {os.cpu_count()} cores")
    print(f"{'link GB/s':>9} {'rows':>5} {'gather ms':>10} {'v1 ms':>8} {'v2 ms':>8} {'v3 ms':>8} {'gather/v3':>9}")
    for link in ("0.5", "2"):
        os.environ["SIDP_CPU_LINK_GBPS"] = link
        for rows in (1, 16):
            took = []
            for mode, dummies, lockstep, fuse in (
                ("was", True, True, "1"),
                ("cas", True, True, "0"),
                ("cas", True, True, "1"),
                ("cas", False, False, "1"),
            ):
                os.environ["SIDP_CAS_FUSE"] = fuse
                values = parallel_launch(_iterations, RANKS, mode, dummies, lockstep, rows, timeout=120)
                took.append(values[0] * 1e3)
            steps = f"{took[0]:>10.1f} {took[1]:>8.2f} {took[2]:>8.2f} {took[3]:>8.2f}"
            print(f"{link:>9} {rows:>5} {steps} {took[0] / took[3]:>9.1f}")


if __name__ == "__main__":
    main()
