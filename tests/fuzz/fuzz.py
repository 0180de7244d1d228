"""Feeds a target of targets.py for a while: guided by coverage with atheris, else by chance.

    python tests/fuzz/fuzz.py lines --seconds 60

Exits with 1, and keeps the input as crash-<target>, where a target raises.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from pathlib import Path


def mutate(data: bytes, chance: random.Random, seeds: list[bytes]) -> bytes:
    """A few of: bytes changed, cut, repeated, numbers blown up, a piece of another seed."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at, count = chance.randint(0, len(data)), chance.choice((1, 1, 2, 4, 8, 40))
        kind = chance.randint(0, 4)
        if kind == 0:
            data[at : at + count] = chance.randbytes(count)
        elif kind == 1:
            del data[at : at + count]
        elif kind == 2:
            data[at:at] = data[at : at + count] * chance.choice((1, 2, 100))
        elif kind == 3:
            telling = (
                b"9" * 400,
                b"-1",
                b"1e999",
                b"NaN",
                b"null",
                b"[]",
                b"{}",
                b'"',
                b"\\ud800",
                b"true",
                b"[" * 3000,
            )
            data[at : at + count] = chance.choice(telling)
        else:
            other = chance.choice(seeds)
            begin = chance.randint(0, len(other))
            data[at : at + count] = other[begin : begin + chance.randint(1, 60)]
    return bytes(data)


def by_chance(target, seeds: list[bytes], seconds: float, seed: int, most: int | None = None) -> int:
    """Inputs tried."""
    chance = random.Random(seed)
    tried, end = 0, time.monotonic() + seconds
    while time.monotonic() < end and (most is None or tried < most):
        data = mutate(chance.choice(seeds), chance, seeds)
        try:
            target(data)
        except BaseException:
            print(f"input: {data[:2000]!r}", file=sys.stderr)
            raise
        tried += 1
    return tried


def guided(name: str, seconds: int, atheris) -> None:
    with atheris.instrument_imports(include=["sidp"]):  # what a target imports later is not looked into
        import targets

        import sidp.hf.checkpoint  # noqa: F401

    folder = Path(f"fuzz-{name}")
    folder.mkdir(exist_ok=True)
    for number, seed in enumerate(targets.seeds(name)):
        (folder / f"seed-{number}").write_bytes(seed)
    words = [sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096", "-verbosity=0", "-print_final_stats=1"]
    atheris.Setup([*words, f"-artifact_prefix=crash-{name}-", str(folder)], targets.TARGETS[name])
    atheris.Fuzz()  # ends the process


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    try:
        import atheris
    except ImportError:
        atheris = None
    # The parser of safetensors is compiled code that atheris cannot look into: changes by chance are the faster ones there.
    if atheris is not None and arguments.seed is None and arguments.target != "safetensors":
        guided(arguments.target, arguments.seconds, atheris)
        return 0
    import targets

    seed = time.time_ns() if arguments.seed is None else arguments.seed
    try:
        tried = by_chance(targets.TARGETS[arguments.target], targets.seeds(arguments.target), arguments.seconds, seed)
    except Exception:
        traceback.print_exc()
        print(f"{arguments.target}: failed with --seed {seed}", file=sys.stderr)
        return 1
    print(f"{arguments.target}: {tried} inputs by chance, seed {seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
