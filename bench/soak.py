"""A long run of a small group under everything that may happen to it; every result is checked, nothing may leak.

    python bench/soak.py --seconds 1200                   4 processes on the CPU, the long form
    python bench/soak.py --seconds 75                     the form of the gate
    python bench/soak.py --seconds 300 --device cuda      on a GPU (several ranks on one need MPS)

The group runs round after round in the same processes: pools of random placement, mode, slots and backups are made, used
with random batch sizes, replays and delays, closed and made again. Between rounds, and in them, one rank is stopped for a while
(SIGSTOP), or killed: with backups the others must go on and check their results, without them they must name it. A killed
rank ends the job; it is started anew. Prints a table of the faults and ends with 1 where anything was not as it must be.
Under MPS, which promises nothing to those who share it with a killed process, a survivor may lose its CUDA context; it must
name the dead rank all the same, and is counted apart.
"""

from __future__ import annotations

import argparse
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
from soak_ranks import ROUND_S, body

from launch import start

_SEEN_WITHIN_S = 10.0  # fault to error or recovery; the machine may be busy
_GROWTH = {"fds": 0, "threads": 0, "rss_mib": 40}  # allowed between the third round of a job and its last


def left_by(pids: list[int]) -> list[str]:
    """Files in /dev/shm that these processes made: sidp.<user>.<pid namespace>.<pid>.<start time>.<random>."""
    names = (name.split(".") for name in os.listdir("/dev/shm") if name.startswith("sidp."))
    return [".".join(parts) for parts in names if len(parts) > 3 and parts[3] in map(str, pids)]


class Soak:
    """The parent: starts jobs, plays the faults, counts."""

    def __init__(self, world: int, device: str, seconds: float, seed: int, calm: int):
        self.world, self.device, self.end, self.calm = world, device, time.time() + seconds, calm
        self.shared = device == "cuda" and "CUDA_MPS_PIPE_DIRECTORY" in os.environ  # by processes of one MPS server
        self.settings: dict = {}  # of the round that is on
        self.chance = random.Random(seed)
        self.table: dict[str, dict] = defaultdict(
            lambda: {"times": 0, "seen_s": [], "recovered_s": [], "lost": 0, "contexts": 0}
        )
        self.calls = self.jobs = self.rounds = 0
        self.pids: list[int] = []  # of the job that is on
        self.wrong: list[str] = []
        self.growth: dict[str, float] = {}

    def run(self) -> None:
        while time.time() < self.end - ROUND_S or not self.jobs:
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
        time.sleep(self.chance.random() * ROUND_S / 2)
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
            if outcome.value.get("context"):
                row["contexts"] += 1
                if not self.shared:
                    self.wrong.append(
                        f"rank {outcome.rank} lost its CUDA context with rank {victim}, without MPS: {settings}"
                    )
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
        print(
            "| fault | times | seen within, s | going on within, s | lost | contexts lost with it |\n|---|---|---|---|---|---|"
        )
        for name, row in sorted(self.table.items()):
            seen, recovered = (f"{max(row[key]):.2f}" if row[key] else "-" for key in ("seen_s", "recovered_s"))
            print(f"| {name} | {row['times']} | {seen} | {recovered} | {row['lost']} | {row['contexts']} |")
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
