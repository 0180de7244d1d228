"""Median SM clock and power of the GPU while something runs, by nvidia-smi; nothing where it is not there."""

from __future__ import annotations

import shutil
import statistics
import subprocess

_QUERY = ("nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "20", "-i", "0")


class Clock:
    """``with Clock() as clock: ...`` and then ``clock.figures()``."""

    def __enter__(self) -> Clock:
        self._process = None
        self._text = ""
        if shutil.which(_QUERY[0]):
            self._process = subprocess.Popen(_QUERY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._text, _ = self._process.communicate(timeout=10)

    def figures(self) -> dict[str, float]:
        samples = [line.split(",") for line in self._text.splitlines()]
        try:
            clocks = [float(clock) for clock, power in samples if float(power) > 0]
            powers = [float(power) for _, power in samples]
        except ValueError:  # "[N/A]", or a line that was cut
            return {}
        if not clocks:
            return {}
        return {"sm_mhz": statistics.median(clocks), "watts": statistics.median(powers), "samples": len(clocks)}
