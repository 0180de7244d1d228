"""Measure what a pool stands on here: copies, links between GPUs, the ring's overlap, host time, opening a pool.

Every copy's bytes are verified after it was timed, every figure is the median of several rounds, and what this machine
cannot measure is "waived" with the reason. --profile writes what planning and the policy need (docs/profile.md).

  sidp bench
  sidp bench --json bench.json --profile machine.json --hidden 5120 --inner 25600
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import ConfigError
from .checks import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write every figure as JSON too")
    parser.add_argument("--profile", metavar="FILE", help="write a profile for sidp plan and SIDP_PROFILE")
    parser.add_argument("--hidden", type=positive, metavar="N", help="the FFN's width (default: 5120, on the CPU 512)")
    parser.add_argument("--inner", type=positive, metavar="N", help="its inner size on one GPU (default: 5 x hidden)")
    parser.add_argument("--mb", type=positive, metavar="N", help="MB of a copy (default: 256, on the CPU 64)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="rounds of each figure (default: 5)")
    parser.add_argument("--cpu", action="store_true", help="measure the CPU backend although there are GPUs")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when all that could be measured was, and every byte arrived."""
    for path in filter(None, (args.json, args.profile)):
        if not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"{path}: its folder does not exist; create it first")
    from ..device import choose_device
    from . import bench_copies, bench_pool

    device = choose_device("cpu" if args.cpu else None)
    on_gpu = device.type == "cuda"
    hidden = args.hidden or (5120 if on_gpu else 512)
    inner = args.inner or 5 * hidden
    nbytes = (args.mb or (256 if on_gpu else 64)) << 20
    results: list[dict] = []

    def add(found: list[dict]) -> None:
        for result in found:
            results.append(result)
            print(_line(result), flush=True)

    add(bench_copies.copies(device, nbytes, args.rounds))
    add(bench_copies.between_gpus(device, nbytes, args.rounds))
    add(bench_pool.pools(device, hidden, inner, args.rounds))
    times = bench_pool.ffn_times(device, hidden, inner, args.rounds)
    add([{"what": f"FFN {hidden} x {inner}, {rows} rows", "ms": s * 1e3} for rows, s in zip(*times, strict=True)])
    if args.json:
        record = {"device": bench_pool.device_name(device), "results": results}
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.profile:
        bench_pool.profile_of(device, results, times, hidden, inner, args.rounds).save(args.profile)
        print(f"profile: {args.profile}")
    return 0


_UNITS = {"gb_s": "GB/s", "ms": "ms", "us": "us"}


def _line(result: dict) -> str:
    if "waived" in result:
        return f"{result['what']:<52} waived: {result['waived']}"
    return f"{result['what']:<52} " + ", ".join(_figure(key, value) for key, value in list(result.items())[1:])


def _figure(key: str, value: float | bool) -> str:
    if key == "verified":
        return "bytes verified"
    name, _, unit = key.rpartition("_")
    if key in _UNITS:
        return f"{value:.4g} {_UNITS[key]}"
    return f"{name} {value:.4g} {_UNITS[unit]}" if unit in _UNITS else f"{key} {value:.4g}"
