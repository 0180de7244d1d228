"""The table of faults (docs/faults.md): each fault tried several times on a small group of processes on the CPU.

    python bench/faults.py --tries 4                     about 2 s a try
    python bench/faults.py --tries 2 --only "SIGSTOP"    rows whose name has that word

Every result before and after the fault is checked: bit for bit in WaS, within rounding in CaS. "Seen within" is the time from
the fault to the error, or to the moment when a survivor knew of the loss; "going on within" that to the end of its first
whole forward after the loss. "Lost" counts wrong results, ranks that named another one or hung, and things left in
/dev/shm. Ends with 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import torch
from soak import check, left_by, weights

from launch import RankFailed, start
from sidp import FFNSpec, PeerError, PoolConfig, WeightPool, ffn_forward

LAYERS, SPEC = 8, FFNSpec(128, 512, dtype=torch.float32)
_STALL_S = 1.5  # the timeout where a rank is stopped for longer
_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Fault:
    """`asks`: who sends requests or fetches, "all", all "but the victim", or the "victim" alone (the others seldom)."""

    name: str
    signal: int = signal.SIGKILL
    mode: str = "was"
    backup: str = ""  # "": redundancy=0
    asks: str = "all"
    before_commit: bool = False
    victims: tuple[int, ...] = (0, 1, 2)
    placement: str = "layer"

    def config(self) -> PoolConfig:
        timeout_s = _STALL_S if self.signal == signal.SIGSTOP else _TIMEOUT_S
        kept = {"redundancy": 1, "backup": self.backup} if self.backup else {}
        return PoolConfig(mode=self.mode, placement=self.placement, slots=2, device="cpu", timeout_s=timeout_s, **kept)


def faults() -> list[Fault]:
    rows = [Fault("SIGKILL before commit"), Fault("SIGKILL before commit, of the store's host", victims=(0,))]
    rows = [Fault(row.name, before_commit=True, victims=row.victims) for row in rows]
    for backup in ("", "peer", "host", "file"):
        kept = f"backup={backup}" if backup else "no backups"
        rows += [
            Fault(f"SIGKILL in WaS, {kept}", backup=backup),
            Fault(f"SIGKILL in WaS, striped, {kept}", backup=backup, placement="striped"),
            Fault(f"SIGKILL in use, of the store's host, {kept}", backup=backup, victims=(0,)),
            Fault(f"SIGKILL of an idle owner, {kept}", backup=backup, asks="but the victim"),
            Fault(f"SIGKILL of an owner amid CaS requests, {kept}", mode="cas", backup=backup),
            Fault(f"SIGKILL of a requester amid a CaS request, {kept}", mode="cas", backup=backup, asks="victim"),
            Fault(f"SIGSTOP beyond the timeout, CaS, {kept}", signal.SIGSTOP, mode="cas", backup=backup),
        ]
    return rows


def body(ctx, fault: Fault, victim: int) -> dict:
    reference = [weights(SPEC, layer, 1) for layer in range(LAYERS)]
    generator = torch.Generator().manual_seed(ctx.rank)
    calls = after = 0
    seen = went_on = None
    try:
        pool = WeightPool([SPEC] * LAYERS, config=fault.config())
        for layer in range(LAYERS):
            pool.load(layer, reference[layer])
        pool.backup_from(lambda layer, name, index: reference[layer][name][index])
        if fault.before_commit and ctx.rank == victim:
            ctx.say("here")
            time.sleep(60)
        with pool:
            pool.commit()
            ctx.say("here")
            if fault.asks == "but the victim" and ctx.rank == victim:
                time.sleep(60)
            while after < 3:
                for layer in range(LAYERS):
                    x = torch.randn(64, SPEC.hidden_size, generator=generator)
                    check(ffn_forward(x, pool, layer), x, reference[layer], SPEC, pool.stats().last_mode)
                    calls += 1
                stats = pool.stats()
                if stats.lost_rank >= 0:
                    after += 1
                    went_on = went_on or time.time()
                    seen = seen or went_on - stats.recovery_seconds
                if fault.asks == "victim" and ctx.rank != victim:
                    time.sleep(0.05)
    except PeerError as error:
        return {"calls": calls, "names": error.rank, "seen": time.time(), "went_on": None}
    return {"calls": calls, "names": stats.lost_rank, "seen": seen, "went_on": went_on}


@dataclass
class Row:
    times: int = 0
    calls: int = 0
    seen_s: list[float] = field(default_factory=list)
    going_on_s: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def try_once(self, fault: Fault, world: int, victim: int, chance: random.Random) -> None:
        self.times += 1
        try:
            with start(body, world, fault, victim, timeout=60) as ranks:
                ranks.wait_for("here", [victim] if fault.before_commit else None)
                time.sleep(0.1 + 0.2 * chance.random())
                ranks.kill(victim, fault.signal)
                at = time.time()
                if fault.signal == signal.SIGSTOP:
                    time.sleep(4 * _STALL_S)
                    ranks.kill(victim, signal.SIGCONT)
                outcomes = ranks.join()
        except RankFailed as error:
            self.lost.append(str(error)[-600:])
            return
        for outcome in outcomes:
            if outcome.rank != victim:
                self._take(outcome, fault, victim, at)
            elif fault.signal == signal.SIGSTOP and not (outcome.value and outcome.value["went_on"] is None):
                self.lost.append(f"the stopped rank, which lives, was not told that it is out: {outcome}")
        if left := left_by(ranks.pids):
            self.lost.append(f"left in /dev/shm: {left}")

    def _take(self, outcome, fault: Fault, victim: int, at: float) -> None:
        value = outcome.value
        if not value or value["names"] != victim or (value["went_on"] is None) != (not fault.backup):
            self.lost.append(f"{fault.name}, rank {victim}: rank {outcome.rank}: {outcome}"[:800])
            return
        self.calls += value["calls"]
        self.seen_s.append(value["seen"] - at)
        if value["went_on"] is not None:
            self.going_on_s.append(value["went_on"] - at)

    def line(self, name: str) -> str:
        def span(times: list[float]) -> str:
            return f"{max(times):.2f} (median {sorted(times)[len(times) // 2]:.2f})" if times else "-"

        going_on = span(self.going_on_s) if self.going_on_s else "ends"
        return f"| {name} | {self.times} | {span(self.seen_s)} | {going_on} | {len(self.lost)} |"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tries", type=int, default=4, help="of each fault; the victims take turns")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--only", default="", help="faults whose name has these words")
    arguments = parser.parse_args()
    chance, wrong, calls = random.Random(time.time_ns()), [], 0
    print("| fault | times tried | seen within, s | going on within, s | lost |\n|---|---|---|---|---|")
    for fault in faults():
        if arguments.only not in fault.name:
            continue
        row = Row()
        for number in range(arguments.tries):
            row.try_once(fault, arguments.ranks, fault.victims[number % len(fault.victims)], chance)
        print(row.line(fault.name), flush=True)
        calls += row.calls
        wrong += row.lost
    print(f"{arguments.ranks} ranks, {calls} FFN calls checked by survivors")
    for line in wrong:
        print(f"LOST: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
