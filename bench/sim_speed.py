"""How long simulating takes: 1,000 requests of 1K tokens on 8 ranks, every mode, one core. Run: python bench/sim_speed.py"""

from __future__ import annotations

import os
import platform
import statistics
import time

from sidp.simulate import workload
from sidp.simulate.paper import node
from sidp.simulate.setup import Setup, run

ROUNDS = 3


def main() -> None:
    requests = workload.job(1000, 512, 512, spread=0.5, ranks=8)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; seconds of the process, median of {ROUNDS}"
    )
    print("| model, GPU | mode | placement | events | seconds |\n|---|---|---|---|---|")
    for model, gpu in (("Qwen3-32B", "h20-141"), ("Llama-3.1-70B", "b200")):
        for mode in ("was", "cas", "auto"):
            for placement in ("layer", "striped"):
                setup = Setup(node(model, gpu, 8, 1), mode=mode, placement=placement)
                took = []
                for _ in range(ROUNDS):
                    began = time.process_time()
                    outcome = run(setup, requests)
                    took.append(time.process_time() - began)
                seconds = statistics.median(took)
                print(f"| {model}, {gpu} | {mode} | {placement} | {outcome.native.events:,} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
