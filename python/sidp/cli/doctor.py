"""Say in plain words what this machine can do for a pool, what sidp chooses, and why."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

_SHM = "/dev/shm"
_FEW_FDS = 256  # a rank needs a few descriptors a peer, and torch and the tokenizers bring their own


@dataclass(frozen=True)
class Finding:
    """One line of the report. `level` is "ok", "note" (works, with a limit) or "fail" (a pool cannot start)."""

    level: str
    subject: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 where a pool can start here, 1 where it cannot."""
    findings = list(examine())
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            print(f"{finding.level:<4}  {finding.subject:<{width}}  {finding.text}")
    return 1 if any(finding.level == "fail" for finding in findings) else 0


def examine() -> Iterator[Finding]:
    """Look at everything a pool stands on, the choice of backend last."""
    yield _python()
    native, module = _native()
    yield native
    yield _cores()
    yield _shared_memory()
    yield _pidfd()
    yield _descriptors()
    gpus, torch_finding = _torch()
    yield torch_finding
    if gpus and module is not None and _built_with_cuda(module):
        yield from _devices()
    else:
        yield from _gpus(gpus)
    yield _choice(module, gpus)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("ok", "python", f"{version} on {sys.platform}")


def _native():
    from .. import __version__

    try:
        from .._native import C
    except ImportError as error:
        return Finding(
            "fail", "native module", f"cannot be imported ({error}); reinstall sidp with a C++17 compiler"
        ), None
    built = "with" if _built_with_cuda(C) else "without"
    return Finding("ok", "native module", f"sidp {__version__}, built {built} CUDA"), C


def _built_with_cuda(module) -> bool:
    return bool(getattr(module, "with_cuda", False))


def _cores() -> Finding:
    from ..launch import threads_per_rank

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Finding(
        "ok", "cores, memory", f"{threads_per_rank(1)} cores, {memory / 1e9:.0f} GB; N ranks get cores/N threads each"
    )


def _shared_memory() -> Finding:
    try:
        usage = shutil.disk_usage(_SHM)
    except OSError as error:
        return Finding(
            "fail", "shared memory", f"{_SHM} cannot be used ({error}); the CPU backend keeps its arenas there"
        )
    left = sorted(name for name in os.listdir(_SHM) if name.startswith("sidp"))
    text = f"{_SHM} has {usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free; all ranks' shares must fit"
    if not os.access(_SHM, os.W_OK):
        return Finding("fail", "shared memory", f"{_SHM} is not writable for this user")
    if left:
        return Finding(
            "note", "shared memory", f"{text}; files there now: {', '.join(left)} (of a pool that is starting?)"
        )
    if usage.total < 1e9:
        return Finding("note", "shared memory", f"{text}; that is little: in a container, raise --shm-size")
    return Finding("ok", "shared memory", text)


def _pidfd() -> Finding:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as error:
        reason = getattr(error, "strerror", None) or "no pidfd_open here"
        return Finding("note", "pidfd", f"not available ({reason}): a rank's death is seen by its heartbeat, later")
    return Finding("ok", "pidfd", "available: a rank's death is seen at once")


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} open files a process (hard limit {hard})"
    if soft < _FEW_FDS:
        return Finding("note", "file limit", f"{text}: little for a large group; raise it with ulimit -n")
    return Finding("ok", "file limit", text)


def _torch():
    try:
        import torch
    except ImportError as error:
        return [], Finding("fail", "torch", f"cannot be imported ({error}); pip install torch")
    names = []
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if not torch.distributed.is_available():
        return names, Finding(
            "fail", "torch", f"{torch.__version__}, built without torch.distributed; install another build"
        )
    return names, Finding("ok", "torch", torch.__version__)


def _gpus(names: list[str]) -> Iterator[Finding]:
    if not names:
        yield Finding("note", "GPUs", "torch sees none")
    for index, name in enumerate(names):
        yield Finding("ok", f"GPU {index}", name)


def _devices() -> Iterator[Finding]:
    """Each GPU as a pool sees it: what it is, whom it reaches and how, and what a group of them would use."""
    from ..device import device_report
    from ..transport_cuda import HANDLES

    report = device_report()
    yield _driver()
    links = _nvlink_table()
    for gpu in report:
        text = (
            f"{gpu['name']}, {gpu['free_bytes'] / 1e9:.1f} of {gpu['total_bytes'] / 1e9:.1f} GB free, "
            f"{gpu['multiprocessors']} SMs, {gpu['copy_engines']} copy engines, {gpu['pci']}"
        )
        yield Finding("ok", f"GPU {gpu['index']}", text)
    yield _reach(report, links)
    yield _mps(report)
    refusals = sorted({gpu["vmm_refusal"] for gpu in report if gpu["vmm_refusal"]})
    wish = os.environ.get("SIDP_P2P", "auto")
    order = " then ".join((*HANDLES, "host")) if wish == "auto" else wish
    vmm = f"; vmm is not offered here: {'; '.join(refusals)}" if refusals else ""
    text = (
        f"SIDP_P2P={wish}: {order}. Ranks open and read each other's memory when a pool starts, and all of them take the "
        f"next kind where one fails (ipc: cudaIpc; vmm: descriptors over unix sockets; host: pinned host memory){vmm}"
    )
    yield Finding("ok", "peer memory", text)


def _driver() -> Finding:
    output = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    if output is None:
        return Finding("note", "driver", "nvidia-smi does not answer here: version and NVLink are not known")
    import torch

    return Finding("ok", "driver", f"{output.splitlines()[0].strip()}, torch's CUDA {torch.version.cuda}")


def _nvidia_smi(*arguments: str) -> str | None:
    """What nvidia-smi prints; None where it is missing, fails or does not end."""
    try:
        done = subprocess.run(("nvidia-smi", *arguments), capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.stdout.strip() else None


def _nvlink_table() -> dict[tuple[int, int], str]:
    """(GPU, GPU) -> "NV18" and the like, from nvidia-smi's topology; empty where CUDA numbers the GPUs otherwise."""
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        return {}
    lines = [line.split() for line in (_nvidia_smi("topo", "-m") or "").splitlines()]
    header = next((words for words in lines if words and words[0].endswith("GPU0")), [])
    columns = [word for word in header if re.fullmatch(r"\W*(\[4m)?GPU\d+", word)]
    links = {}
    for words in lines:
        if words and (row := re.fullmatch(r"GPU(\d+)", words[0])) and len(words) > len(columns):
            for column, kind in enumerate(words[1 : 1 + len(columns)]):
                links[int(row[1]), column] = kind
    return links


def _reach(report: list[dict], links: dict[tuple[int, int], str]) -> Finding:
    if len(report) == 1:
        return Finding(
            "note", "peer access", "one GPU: ranks on it read each other's memory in place, there is no link"
        )
    lines, far = [], []
    for gpu in report:
        for other, rank in zip(gpu["reaches"], gpu["reaches_rank"], strict=True):
            kind = links.get((gpu["index"], other), f"performance rank {rank}")
            lines.append(f"{gpu['index']}->{other} {'NVLink ' + kind if kind.startswith('NV') else kind}")
        missing = {other["index"] for other in report} - {gpu["index"], *gpu["reaches"]}
        far += [f"{gpu['index']}->{other}" for other in sorted(missing)]
    text = ", ".join(lines) or "none"
    if far:
        return Finding(
            "note", "peer access", f"{text}; not reached: {', '.join(far)} (pools over these use host memory)"
        )
    return Finding("ok", "peer access", text)


def _mps(report: list[dict]) -> Finding:
    if any(gpu["mps"] for gpu in report):
        return Finding("ok", "MPS", "a control daemon seems to run: several ranks can share a GPU at full speed")
    return Finding(
        "note", "MPS", "does not run: give each rank a GPU of its own (ranks that share one take turns by milliseconds)"
    )


def _choice(module, gpus: list[str]) -> Finding:
    if module is None:
        return Finding("fail", "backend", "none: the native module is missing")
    if gpus and _built_with_cuda(module):
        return Finding("ok", "backend", "CUDA: torch sees a GPU and the native module has the CUDA backend")
    if gpus:
        why = "the native module was built without CUDA; reinstall with nvcc on PATH and SIDP_CUDA=ON to use the GPUs"
        return Finding("note", "backend", f"CPU: {why}")
    return Finding("ok", "backend", "CPU over shared memory: there is no GPU that torch can use")
