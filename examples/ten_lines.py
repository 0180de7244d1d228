"""A pool in a script of your own. Run it with: torchrun --nproc-per-node 4 examples/ten_lines.py"""

import torch
import torch.distributed as dist

from sidp import FFNSpec, WeightPool, ffn_forward

LAYERS, HIDDEN, INTERMEDIATE = 8, 512, 2048


def weights(layer: int) -> dict[str, torch.Tensor]:
    """Stands for reading a checkpoint: the same numbers on every rank, in Linear's layout [out, in]."""
    seed = torch.Generator().manual_seed(layer)
    shapes = {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
    return {name: torch.randn(shape, generator=seed).bfloat16() * 0.02 for name, shape in shapes.items()}


dist.init_process_group("gloo")
with WeightPool([FFNSpec(HIDDEN, INTERMEDIATE)] * LAYERS) as pool:
    for layer in range(LAYERS):
        if pool.owns(layer):  # a rank reads and keeps only its share
            pool.load(layer, weights(layer))
    pool.commit()
    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(pool.rank)).bfloat16()
    for layer in range(LAYERS):
        x = x + ffn_forward(x, pool, layer)  # fetched ahead from the rank that owns it
    stats = pool.stats()
    print(
        f"rank {pool.rank}: keeps {stats.owned_bytes / 1e6:.1f} of {stats.replicated_bytes / 1e6:.1f} MB, "
        f"fetched {stats.fetched_bytes / 1e6:.1f} MB, |y| = {x.float().norm().item():.6f}\n",
        end="",
    )
dist.destroy_process_group()
