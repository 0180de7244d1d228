"""The output file: whole lines, appended and visible at once, and what a cut file already holds.

Several ranks append to one file. Each line is one write under the run's lock; whoever finds the end of the file torn
(a rank died in the middle of its write) cuts it back to the last whole line first, so that the file is valid at every
moment in which nobody writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path

from ..errors import ConfigError, SidpError

_BLOCK = 1 << 16


class Output:
    """The output file open for appending; `lock` makes a context in which no other rank appends."""

    def __init__(self, path: str | Path, lock: Callable[[], AbstractContextManager] = contextlib.nullcontext):
        self.path = Path(path)
        self._lock = lock
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def append(self, line: bytes) -> None:
        """Add one line, its newline included. SidpError where the disk is full; the file then ends as it did before."""
        with self._lock():
            self._append(line)

    def append_locked(self, line: bytes) -> None:
        """`append` for a caller that holds the lock already."""
        self._append(line)

    def _append(self, line: bytes) -> None:
        assert line.endswith(b"\n") and line.count(b"\n") == 1
        end = cut_torn_end(self._fd)
        try:
            view = memoryview(line)
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, end)
            raise SidpError(
                f"cannot write to {self.path}: {error.strerror}; what was written is whole, so make room and run again "
                "with --resume"
            ) from error

    def close(self) -> None:
        """Idempotent; the bytes are on the disk afterwards."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1


def cut_torn_end(fd: int) -> int:
    """Drop what follows the last newline; the file's length afterwards."""
    size = os.fstat(fd).st_size
    if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
        return size
    end = _after_last_newline(fd, size)
    os.ftruncate(fd, end)
    return end


def _after_last_newline(fd: int, size: int) -> int:
    end = size
    while end > 0:
        begin = max(0, end - _BLOCK)
        found = os.pread(fd, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def prepare(path: str | Path, keys: Collection[str], *, resume: bool, overwrite: bool = False) -> set[str]:
    """Make `path` ready for appending and return the keys that need no work, those whose lines it holds.

    A last line that was cut is dropped, or gets its newline where only that is missing. ConfigError, before anything
    is changed, for a file that holds something and is not to be resumed or overwritten, or that is no output of these
    rows.
    """
    path = Path(path)
    _check_target(path)
    if not path.exists() or path.stat().st_size == 0:
        return set()
    if overwrite:
        os.truncate(path, 0)
        return set()
    if not resume:
        raise ConfigError(
            f"output {path} exists and is not empty: add --resume to go on with it, --overwrite to start over, or give "
            "another name"
        )
    with open(path, "r+b") as file:
        done, whole = _done_keys(path, file, keys)
        file.truncate(whole)
        file.seek(0, os.SEEK_END)
        if whole:
            file.seek(whole - 1)
            if file.read(1) != b"\n":  # all of the last line but its newline
                file.write(b"\n")
    return done


def _done_keys(path: Path, file, keys: Collection[str]) -> tuple[set[str], int]:
    """(keys of the whole lines, bytes of the file to keep)."""
    done: set[str] = set()
    whole = 0
    for number, line in enumerate(file, 1):
        torn = not line.endswith(b"\n")
        key = _key_of(line)
        if key is None and torn:
            break
        if key is None:
            raise ConfigError(
                f"--resume: line {number} of {path} is no output line of sidp; drop that line, or use another output"
            )
        if key not in keys:
            if torn:  # not a line of ours that lost its newline: leave nothing to chance
                break
            raise ConfigError(
                f"--resume: line {number} of {path} answers a row ({key}) that the input does not have: it belongs to "
                "another input, or that row was changed since; use another output, or drop the line"
            )
        done.add(key)
        whole += len(line)
    return done, whole


def _key_of(line: bytes) -> str | None:
    try:
        key = json.loads(line)["id"]
    except (ValueError, KeyError, TypeError):
        return None
    return key if isinstance(key, str) else None


def written_keys(path: str | Path) -> set[str]:
    """The keys of all whole lines; for a caller that holds the lock."""
    with open(path, "rb") as file:
        return {key for line in file if line.endswith(b"\n") and (key := _key_of(line)) is not None}


def _check_target(path: Path) -> None:
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ConfigError(f"output {path} is not a regular file: give a file's name")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"output {path}: the folder {path.absolute().parent} does not exist; create it first")
    probe = path if path.exists() else path.absolute().parent
    if not os.access(probe, os.W_OK):
        raise ConfigError(f"output {path}: no permission to write to {probe}")
