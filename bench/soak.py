"""A long run of a small group under everything that may happen to it; every result is checked, nothing may leak.

    python bench/soak.py --seconds 1200                   4 processes on the CPU, the long form
    python bench/soak.py --seconds 75                     the form of the gate
    python bench/soak.py --seconds 300 --device cuda      on a GPU (several ranks on one need MPS)

The group runs round after round in the same processes: pools of random placement, mode, slots and backups are made, used
with random batch sizes, replays and delays, closed and made again. Between rounds, and in them, one rank is stopped for a while
(SIGSTOP), or killed: with backups the others must go on and check their results, without them they must name it. A killed
rank ends the job; it is started anew. Prints a table of the faults and ends with 1 where anything was not as it must be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import torch

from launch import start
from sidp import FFNSpec, PeerError, PoolConfig, WeightPool, ffn_forward
from sidp.ffn import apply_formula

LAYERS, HIDDEN, INNER = 8, 64, 192
_TIMEOUT_S = 20.0
_ROUND_S = 2.5
_SEEN_WITHIN_S = 10.0  # fault to error or recovery; the machine may be busy
_ROWS = (1, 1, 2, 5, 17, 64)
_MODES = ("was", "cas", "auto")
_GROWTH = {"fds": 0, "threads": 0, "rss_mib": 40}  # allowed between the third round of a job and its last


def spec_of(device: str) -> FFNSpec:
    return FFNSpec(HIDDEN, INNER, dtype=torch.bfloat16 if device == "cuda" else torch.float32)


def weights(spec: FFNSpec, layer: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + layer)
    return {t.name: (torch.randn(t.shape, generator=generator) / 8).to(t.dtype) for t in spec.unit().tensors}


def used() -> dict[str, float]:
    status = Path("/proc/self/statm").read_text().split()
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "rss_mib": int(status[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
    }


def left_by(pids: list[int]) -> list[str]:
    """Files in /dev/shm that these processes made: sidp.<user>.<pid namespace>.<pid>.<start time>.<random>."""
    names = (name.split(".") for name in os.listdir("/dev/shm") if name.startswith("sidp."))
    return [".".join(parts) for parts in names if len(parts) > 3 and parts[3] in map(str, pids)]


def draw(chance: random.Random, device: str) -> dict:
    """One round's settings, the same on all ranks but for the mode."""
    redundancy = 0 if device == "cuda" else chance.choice((0, 1))
    return {
        "placement": chance.choice(("layer", "striped")),
        "slots": chance.choice((1, 2, 3)),
        "redundancy": redundancy,
        "backup": chance.choice(("peer", "host", "file")),
        "peak_shifting": chance.random() < 0.7,
        "resident_layers": chance.choice((0, 0, 1)),
        "force_fetch": device == "cuda",  # several ranks on one GPU would read each other's layers in place
    }


def check(y, x, tensors, spec, mode: str) -> None:
    """WaS and local to the bit; CaS within the rounding of the dtype."""
    expected = apply_formula(x, tensors, spec)
    if mode == "cas":
        limit = 2e-2 if spec.dtype is torch.bfloat16 else 1e-4
        difference = (y.double() - expected.double()).abs().max() / expected.double().abs().max()
        if not difference < limit:
            raise AssertionError(f"a result of CaS is off by {difference:.2e} of the largest value")
    elif not torch.equal(y, expected):
        raise AssertionError(f"a result of {mode} is not the reference's")


def forwards(pool, chance: random.Random, generator, reference, spec, device: str) -> int:
    """One forward of random batch sizes, or the same one several times over in the same buffers, as a graph is replayed."""
    order = list(range(LAYERS))
    if chance.random() < 0.1:
        chance.shuffle(order)
    batches = [(layer, torch.empty(chance.choice(_ROWS), HIDDEN, dtype=spec.dtype)) for layer in order]
    batches = [(layer, x.to(device)) for layer, x in batches]
    replays = chance.choice((1, 1, 1, 5))
    for _ in range(replays):
        for layer, x in batches:
            x.copy_(torch.randn(x.shape, generator=generator))
            y = ffn_forward(x, pool, layer)
            if device == "cuda":  # calls return before their work is done; what went wrong in it is said first
                torch.cuda.synchronize()
                pool.check()
            check(y, x, reference[layer], spec, pool.stats().last_mode)
    return replays * LAYERS


def load_kernels(spec: FFNSpec, device: torch.device) -> None:
    """CUDA loads a kernel at its first use, tens of MB at times, which would look like a leak in whichever round that is."""
    tensors = {name: tensor.to(device) for name, tensor in weights(spec, 0, 0).items()}
    for rows in _ROWS:
        x = torch.ones(rows, HIDDEN, dtype=spec.dtype, device=device)
        check(apply_formula(x, tensors, spec), x, tensors, spec, "cas")


def body(ctx, seed: int, device: str, end: float) -> dict:
    """Rounds until `end` (time.time) or a loss; what was seen."""
    shared, own = random.Random(seed), random.Random(seed * 31 + ctx.rank)
    spec, done, ready = spec_of(device), 0, []
    torch_device = torch.device(device)
    rounds = 0
    if device == "cuda":
        load_kernels(spec, torch_device)
    while True:
        round_end = time.time() + _ROUND_S
        settings = draw(shared, device)
        mode = own.choice(_MODES) if shared.random() < 0.7 else "was"
        if rounds < len(_MODES):  # each once before what is in use is first looked at
            mode = _MODES[(rounds + ctx.rank) % len(_MODES)]
        generator = torch.Generator().manual_seed(own.randrange(1 << 30))
        config = PoolConfig(mode=mode, device=device, timeout_s=_TIMEOUT_S, **settings)
        version = shared.randrange(1 << 20)
        reference = [weights(spec, layer, version) for layer in range(LAYERS)]
        pool = WeightPool([spec] * LAYERS, config=config)
        for layer in range(LAYERS):
            pool.load(layer, reference[layer])
        pool.backup_from(lambda layer, name, index, reference=reference: reference[layer][name][index])
        pool.commit()
        reference = [{name: tensor.to(torch_device) for name, tensor in layer.items()} for layer in reference]
        after, went_on = 0, None
        ctx.say(f"round {rounds}", settings)
        try:
            while time.time() < round_end or (pool.stats().lost_rank >= 0 and after < 3):
                done += forwards(pool, own, generator, reference, spec, device)
                if pool.stats().lost_rank >= 0:
                    after += 1
                    if after == 1:
                        went_on = time.time()
                if own.random() < 0.05:
                    time.sleep(own.random() * 0.2)
        except PeerError as error:
            seen = time.time()
            with contextlib.suppress(PeerError):  # on GPUs it tells of the same loss again
                pool.close()
            return {
                "calls": done,
                "rounds": rounds,
                "lost": error.rank,
                "seen": seen,
                "use": ready,
                "settings": settings,
            }
        stats = pool.stats()
        pool.close()
        del reference
        if stats.lost_rank >= 0:
            return {"calls": done, "rounds": rounds, "lost": stats.lost_rank, "seen": None, "use": ready,
                    "settings": settings, "recovery_s": stats.recovery_seconds, "went_on": went_on}  # fmt: skip
        rounds += 1
        time.sleep(0.15)  # the store's thread ends by itself
        ready.append(used())
        ctx.say(f"ended {rounds}")
        if ctx.rank == 0:  # one clock decides for all whether this was the last round
            ctx.say(f"goes on {rounds}", time.time() < end)
        if not ctx.hear(f"round {rounds}", timeout=60):
            return {"calls": done, "rounds": rounds, "lost": -1, "seen": None, "use": ready, "settings": settings}


class Soak:
    """The parent: starts jobs, plays the faults, counts."""

    def __init__(self, world: int, device: str, seconds: float, seed: int, calm: int):
        self.world, self.device, self.end, self.calm = world, device, time.time() + seconds, calm
        self.settings: dict = {}  # of the round that is on
        self.chance = random.Random(seed)
        self.table: dict[str, dict] = defaultdict(lambda: {"times": 0, "seen_s": [], "recovered_s": [], "lost": 0})
        self.calls = self.jobs = self.rounds = 0
        self.pids: list[int] = []  # of the job that is on
        self.wrong: list[str] = []
        self.growth: dict[str, float] = {}

    def run(self) -> None:
        while time.time() < self.end - _ROUND_S or not self.jobs:
            self.jobs += 1
            try:
                self._job(self.chance.randrange(1 << 30))
            except AssertionError as error:
                self.wrong.append(f"job {self.jobs}: {str(error)[-1500:]}")
            if left := left_by(self.pids):
                self.wrong.append(f"job {self.jobs} left {left} in /dev/shm")

    def _job(self, seed: int) -> None:
        with start(body, self.world, seed, self.device, self.end, timeout=600) as ranks:
            self.pids = ranks.pids
            number = 0
            while True:
                self.settings = settings = ranks.wait_for(f"round {number}")[0]
                if (number >= self.calm and self.chance.random() < 0.5) or time.time() > self.end:
                    if self._kill(ranks, settings, number):
                        return
                elif self.chance.random() < 0.4:
                    self._stop_for_a_while(ranks)
                ranks.wait_for(f"ended {number + 1}")
                number += 1
                more = ranks.wait_for(f"goes on {number}", [0])[0]
                ranks.tell(f"round {number}", more)
                if not more:
                    self._count([outcome for outcome in ranks.join()], -1, None)
                    return

    def _kill(self, ranks, settings, number: int) -> bool:
        victim = self.chance.randrange(self.world)
        time.sleep(self.chance.random() * _ROUND_S / 2)
        killed = time.time()
        ranks.kill(victim)
        ranks.tell(f"round {number + 1}", False)  # for ranks that had ended the round and needed nobody any more
        name = f"SIGKILL, backup={settings['backup']}" if settings["redundancy"] else "SIGKILL, no backups"
        outcomes = [outcome for outcome in ranks.join() if outcome.rank != victim]
        self._count(outcomes, victim, killed)
        row = self.table[name]
        row["times"] += 1
        for outcome in outcomes:
            if not outcome.value or outcome.value["lost"] < 0:
                continue
            if outcome.value["seen"] is not None:
                row["seen_s"].append(outcome.value["seen"] - killed)
                row["lost"] += bool(settings["redundancy"])
                if settings["redundancy"]:
                    self.wrong.append(f"rank {outcome.rank} did not outlive rank {victim}: {settings}")
            else:
                row["recovered_s"].append(outcome.value["went_on"] - killed)
        return True

    def _stop_for_a_while(self, ranks) -> None:
        victim = self.chance.randrange(self.world)
        pause = self.chance.random() * 1.5
        ranks.kill(victim, signal.SIGSTOP)
        time.sleep(pause)
        ranks.kill(victim, signal.SIGCONT)
        self.table["SIGSTOP below the timeout"]["times"] += 1

    def _count(self, outcomes, victim: int, killed: float | None) -> None:
        for outcome in outcomes:
            if outcome.error or not outcome.value:
                after = "" if killed is None else f", {outcome.ended - killed:.2f} s after rank {victim} was killed"
                self.wrong.append(
                    f"job {self.jobs}{after}, {self.settings}: rank {outcome.rank}: {outcome.error} "
                    f"{outcome.message[:300]} {outcome.traceback[-800:]}"
                )
                continue
            value = outcome.value
            self.calls += value["calls"]
            if value["lost"] not in (victim, -1):
                self.wrong.append(f"rank {outcome.rank} names rank {value['lost']}, but {victim} was killed")
            if value["seen"] is not None and value["seen"] - killed > _SEEN_WITHIN_S:
                self.wrong.append(f"rank {outcome.rank} took {value['seen'] - killed:.1f} s to see the death")
            self._flat(outcome.rank, value["use"])
        self.rounds += max((outcome.value or {}).get("rounds", 0) for outcome in outcomes)

    def _flat(self, rank: int, use: list[dict]) -> None:
        if len(use) < 4:
            return
        for name, allowed in _GROWTH.items():
            grown = use[-1][name] - use[2][name]
            self.growth[name] = max(self.growth.get(name, -1e9), grown)
            if grown > allowed:
                self.wrong.append(f"rank {rank}: {name} grew by {grown:g} over {len(use) - 3} rounds")

    def report(self) -> int:
        print(f"{self.calls} FFN calls checked, {self.jobs} jobs, {self.rounds} rounds of pools, {self.world} ranks")
        print(f"largest growth after the third round of a job: {json.dumps(self.growth)}")
        print("| fault | times | seen within, s | going on within, s | lost |\n|---|---|---|---|---|")
        for name, row in sorted(self.table.items()):
            seen, recovered = (f"{max(row[key]):.2f}" if row[key] else "-" for key in ("seen_s", "recovered_s"))
            print(f"| {name} | {row['times']} | {seen} | {recovered} | {row['lost']} |")
        for line in self.wrong:
            print(f"WRONG: {line}")
        return 1 if self.wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--calm", type=int, default=4, help="rounds of a job in which nobody is killed")
    arguments = parser.parse_args()
    seed = time.time_ns() % (1 << 30) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    watchdog = threading.Timer(arguments.seconds + 300, lambda: os._exit(3))
    watchdog.daemon = True
    watchdog.start()
    soak = Soak(arguments.ranks, arguments.device, arguments.seconds, seed, arguments.calm)
    soak.run()
    return soak.report()


if __name__ == "__main__":
    sys.exit(main())
