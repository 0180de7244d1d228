"""Say in plain words what this machine can do for a pool, what sidp chooses, and why."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
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


def _choice(module, gpus: list[str]) -> Finding:
    if module is None:
        return Finding("fail", "backend", "none: the native module is missing")
    if gpus and _built_with_cuda(module):
        return Finding("ok", "backend", "CUDA: torch sees a GPU and the native module has the CUDA backend")
    if gpus:
        why = "the native module was built without CUDA; reinstall with nvcc on PATH and SIDP_CUDA=ON to use the GPUs"
        return Finding("note", "backend", f"CPU: {why}")
    return Finding("ok", "backend", "CPU over shared memory: there is no GPU that torch can use")
