"""A pool over N ranks, one GPU each (or all on one, under MPS): WaS, CaS and the choice between them, by real layers' shapes.

    python bench/group_gpu.py --ranks 2 [--parts was cas auto] [--shape qwen3-32b] [--json FILE]

Times are medians by CUDA events over iterations of all layers, milliseconds, of the slowest rank; all ranks run at once.
  was   iteration by layer and striped placement, in a graph and eager, over rows; floors: `compute` (the same FFNs on local
        weights) and `link` (the remote bytes at the rate of bare copies from the same peer in the same run);
        ratio = iteration / max(compute, link). Every layer's result is compared bit by bit first.
  cas   a remote layer asked for, over rows, against the local FFN by cuBLAS and against fetching the layer first (`gather`)
  auto  the rows from which WaS is expected to win, and from which it does
  incast  one owner read by several ranks, peak shifting on and off (bench/group_incast.py)
  tail  one rank has one row, the others nothing (the paper's ladder): gather in lockstep, CaS asked in lockstep with dummies, CaS
        as built
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from group_incast import incast
from was_gpu import timed

from sidp import FFNSpec, PoolConfig, WeightPool, ffn_forward
from sidp._native import C
from sidp.ffn import apply_formula
from sidp.policy import crossover_rows

SHAPES = {"qwen3-32b": (5120, 25600), "llama-3.1-70b": (8192, 28672), "tiny": (1024, 4096)}


def weights_of(spec: FFNSpec, layer: int) -> dict[str, torch.Tensor]:
    """The same on every rank."""
    generator = torch.Generator("cuda").manual_seed(100 + layer)
    made = {}
    for tensor in spec.unit().tensors:
        values = torch.randn(tensor.shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        made[tensor.name] = values.mul_(tensor.shape[-1] ** -0.5)
    return made


class Group:
    """One rank's side of a measurement."""

    def __init__(self, rank: int, args):
        self.rank, self.args = rank, args
        self.spec = FFNSpec(*SHAPES[args.shape])
        self.nbytes = self.spec.unit().nbytes
        self.rows: list[dict] = []
        self.deadline = time.monotonic() + args.budget_s

    def slowest(self, value: float) -> float:
        """Collective: the largest of the ranks' values; also keeps them in step."""
        values = [None] * self.args.ranks
        dist.all_gather_object(values, value)
        return max(values)

    def spent(self) -> bool:
        """Collective: whether the budget is used up."""
        return self.slowest(time.monotonic() - self.deadline) > 0

    def report(self, **fields) -> None:
        row = {k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items()}
        self.rows.append(row)
        if self.rank == 0:
            print(json.dumps(row), flush=True)

    def timed(self, run, repeats: int | None = None) -> float:
        dist.barrier()
        return self.slowest(timed(run, repeats or self.args.repeats))

    def open(self, **config) -> WeightPool:
        config = {"timeout_s": 60, "force_fetch": True, "device": "cuda"} | config
        pool = WeightPool([self.spec] * self.args.layers, config=PoolConfig(**config))
        for layer in range(self.args.layers):
            if pool.owns(layer):
                pool.load(layer, weights_of(self.spec, layer))
        torch.cuda.empty_cache()
        pool.commit()
        return pool

    def x(self, rows: int) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(rows + self.rank)
        return torch.randn(rows, self.spec.hidden_size, generator=generator, device="cuda").to(torch.bfloat16)

    def iterate(self, pool: WeightPool, x: torch.Tensor) -> torch.Tensor:
        for layer in range(self.args.layers):
            y = ffn_forward(x, pool, layer)
        return y

    def captured(self, run):
        run()
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            run()
        return graph

    def compare(self, pool: WeightPool, rows: int) -> tuple[bool, float, float]:
        """Whether all layers are bit-identical; the largest relative error against float64, here and without a pool."""
        same, worst, plain = True, 0.0, 0.0
        x = self.x(rows)
        for layer in range(self.args.layers):
            weights = weights_of(self.spec, layer)
            y, expected = ffn_forward(x, pool, layer), apply_formula(x, weights, self.spec)
            same = same and torch.equal(y, expected)
            if layer < 2:
                exact = apply_formula(x[:4].double(), {k: v.double() for k, v in weights.items()}, self.spec)
                worst = max(worst, ((y[:4] - exact).norm() / exact.norm()).item())
                plain = max(plain, ((expected[:4] - exact).norm() / exact.norm()).item())
            del weights
        torch.cuda.empty_cache()
        return same, worst, plain

    def copy_rate(self, pool: WeightPool, owner: int, reads: bool = True) -> float:
        """Collective: bytes/s of bare copies from `owner`, by all ranks that read at once; the slowest."""
        nbytes = min(512 << 20, pool.placement.arena_bytes(owner))
        dist.barrier()
        rate = (
            C.cuda_copy_rate(pool._transport.source(owner), nbytes, torch.cuda.current_device()) if reads else math.inf
        )
        return -self.slowest(-rate)

    # ---- parts ----

    incast = incast

    def floors(self, pool: WeightPool) -> float:
        """Collective: bytes/s of bare copies from the next rank, all ranks at once; the slowest."""
        return self.copy_rate(pool, (self.rank + 1) % self.args.ranks)

    def was(self) -> None:
        local = [weights_of(self.spec, 1000 + i) for i in range(2)]
        compute = {}
        for rows in self.args.rows:
            x = self.x(rows)

            def alone(x=x, local=local):
                for layer in range(self.args.layers):
                    apply_formula(x, local[layer % 2], self.spec)

            compute[rows] = self.timed(alone)
        del local, alone
        for placement in self.args.placements:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
            with self.open(mode="was", placement=placement, slots=self.args.slots) as pool:
                stats = pool.stats()
                taken = free - torch.cuda.mem_get_info()[0]
                same, _, _ = self.compare(pool, 64)
                rate = self.floors(pool)
                remote = sum(
                    op.width * op.height
                    for layer in range(self.args.layers)
                    for op in pool.placement.copies(layer, self.rank)
                    if op.owner != self.rank
                )
                link = self.slowest(remote / rate * 1e3)
                self.report(
                    part="was", placement=placement, slots=pool.slots, bit_identical=self.slowest(float(not same)) == 0,
                    link_gbps=rate / 1e9, freed_gb=stats.freed_bytes / 1e9, taken_gb=taken / 1e9,
                    said_gb=(stats.owned_bytes + stats.ring_bytes) / 1e9,
                )  # fmt: skip
                for rows in self.args.rows:
                    if self.spent():
                        break
                    x = self.x(rows)
                    eager = self.timed(lambda x=x, pool=pool: self.iterate(pool, x))
                    graph = self.captured(lambda x=x, pool=pool: self.iterate(pool, x))
                    replay = self.timed(graph.replay)
                    torch.cuda.synchronize()
                    del graph
                    floor = max(compute[rows], link)
                    self.report(
                        part="was", placement=placement, rows=rows, compute=compute[rows], link=link, eager=eager,
                        graph=replay, eager_ratio=eager / floor, graph_ratio=replay / floor,
                    )  # fmt: skip

    def cas(self) -> None:
        local = [weights_of(self.spec, 1000 + i) for i in range(2)]
        for placement in self.args.placements:
            with self.open(mode="cas", placement=placement, slots=1) as pool:
                _, worst, plain = self.compare(pool, 8)
                rate = self.floors(pool)
                asked = [layer for layer in range(self.args.layers) if pool._dispatch.client.reaches[layer]]
                self.report(
                    part="cas", placement=placement, error=self.slowest(worst), unpooled_error=self.slowest(plain)
                )
                for rows in self.args.cas_rows:
                    if self.spent():
                        break
                    x, count = self.x(rows), 2 * len(asked)

                    def ask(x=x, pool=pool, asked=asked):
                        for layer in asked + asked:
                            ffn_forward(x, pool, layer)

                    def here(x=x, count=count):
                        for layer in range(count):
                            apply_formula(x, local[layer % 2], self.spec)

                    graph, bare = self.captured(ask), self.captured(here)
                    together = self.timed(graph.replay) / count
                    dist.barrier()
                    if self.rank == 0:  # the others only serve
                        alone = timed(graph.replay, self.args.repeats) / count
                    alone = self.slowest(alone if self.rank == 0 else 0.0)
                    cublas = self.timed(bare.replay) / count
                    remote = self.nbytes * (1 if placement == "layer" else (self.args.ranks - 1) / self.args.ranks)
                    gather = cublas + remote / rate * 1e3
                    torch.cuda.synchronize()
                    del graph, bare
                    self.report(
                        part="cas", placement=placement, rows=rows, one_asks=alone, all_ask=together, cublas=cublas,
                        gather=gather, one_over_cublas=alone / cublas, all_over_cublas=together / cublas,
                        gather_over_one=gather / alone,
                    )  # fmt: skip
                pool.check()

    def auto(self) -> None:
        times = {}
        for mode in ("was", "cas"):
            with self.open(mode=mode, placement="layer", slots=self.args.slots) as pool:
                for rows in self.args.cross_rows:
                    x = self.x(rows)
                    graph = self.captured(lambda x=x, pool=pool: self.iterate(pool, x))
                    times[mode, rows] = self.timed(graph.replay)
                    torch.cuda.synchronize()
                    del graph
        with self.open(mode="auto", placement="layer", slots=self.args.slots) as pool:
            chooser = pool.chooser
            predicted = crossover_rows(chooser.model)
            chosen = {}
            for rows in self.args.cross_rows:
                before = pool.stats().calls["cas"]
                for _ in range(24):
                    self.iterate(pool, self.x(rows))
                torch.cuda.current_stream().synchronize()
                chosen[rows] = "cas" if pool.stats().calls["cas"] - before > 12 * self.args.layers / 2 else "was"
        measured = next((r for r in self.args.cross_rows if times["was", r] <= times["cas", r]), None)
        self.report(
            part="auto", predicted_rows=predicted, measured_rows=measured, chosen=chosen,
            was={r: round(times["was", r], 3) for r in self.args.cross_rows},
            cas={r: round(times["cas", r], 3) for r in self.args.cross_rows},
        )  # fmt: skip

    def tail(self) -> None:
        """Milliseconds of an iteration of one row on rank 0, the others without requests."""
        ladder, x = {}, self.x(1)
        with self.open(mode="was", placement="layer", slots=1) as pool:

            def lockstep(layer: int) -> None:
                ffn_forward(x, pool, layer)
                torch.cuda.current_stream().synchronize()
                dist.barrier()

            ladder["gather"] = self.timed(lambda: [lockstep(layer) for layer in range(self.args.layers)], 5)
        for name, placement in (("layer", "layer"), ("striped", "striped")):
            with self.open(mode="cas", placement=placement, slots=1) as pool:
                if name == "layer":
                    ladder["cas, lockstep, dummies"] = self.timed(
                        lambda pool=pool: [self._step(pool, x, layer) for layer in range(self.args.layers)], 5
                    )
                dist.barrier()
                took = timed(lambda pool=pool: self.iterate(pool, x), 9) if self.rank == 0 else 0.0
                ladder[f"cas, {name}"] = self.slowest(took)
        self.report(part="tail", ms=ladder, gain={k: ladder["gather"] / v for k, v in ladder.items()})

    def _step(self, pool, x, layer) -> None:
        ffn_forward(x, pool, layer)
        torch.cuda.current_stream().synchronize()
        dist.barrier()


def rank_main(rank: int, args, port: int) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(args.ranks),
    }
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("gloo")
    group = Group(rank, args)
    with torch.no_grad():
        for part in args.parts:
            if group.spent():
                group.report(part=part, skipped="the budget is used up")
                continue
            getattr(group, part)()
    if rank == 0 and args.json:
        facts = {"device": torch.cuda.get_device_name(), "devices": torch.cuda.device_count(), "arguments": vars(args)}
        with open(args.json, "w") as file:
            json.dump(facts | {"rows": group.rows}, file, indent=1)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--parts", nargs="+", default=["was", "cas", "auto", "tail"], choices=["was", "cas", "auto", "tail", "incast"]
    )
    parser.add_argument("--placements", nargs="+", default=["layer", "striped"])
    parser.add_argument("--shape", default="qwen3-32b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--slots", type=int, default=None)
    parser.add_argument("--rows", nargs="+", type=int, default=[256, 1024, 2048, 4096, 8192])
    parser.add_argument("--cas-rows", nargs="+", type=int, default=[1, 4, 16, 32, 64, 128])
    parser.add_argument("--cross-rows", nargs="+", type=int, default=[16, 64, 128, 192, 256, 384, 512, 768, 1024, 1536])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--budget-s", type=float, default=240)
    parser.add_argument("--json")
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_main, (args, port), nprocs=args.ranks)


if __name__ == "__main__":
    main()
