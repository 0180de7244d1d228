"""Which mode captured decode steps take with mode="auto": both are captured and run, and the faster one stays.

A graph keeps its mode, and while one is captured the policy knows nothing of a step's time outside of the FFNs, nor how far the
engine's own kernels hide a fetch. So the steps themselves are asked, but where the other mode cannot be faster.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

_RUN = 6  # replays in one mode before the other's turn
_UNSETTLED = 2  # of them, that are not counted: the ring is cold, the servers asleep
_RUNS = 4  # WaS, CaS, WaS, CaS, or the other way round
_FAR = 3.0  # CaS that is expected to take so many times WaS's time is not run
_GAIN = 0.02  # CaS must take this much less than WaS, which is bit-identical


@dataclass
class _Trial:
    mode: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"was": [], "cas": []})
    replays: int = 0
    runs: int = 0


class ModeTrials:
    """The mode of a step by its rows, for one rank.

    More rows only ever favour WaS, whose fetch is the same for all of them: what is found for one size holds for the larger
    ones if it is WaS, and for the smaller ones if it is CaS.

    Args:
        best: rows -> the mode that the policy expects to be faster.
        expected: rows -> what it expects, in seconds: (the fetches of a step in WaS, a step's FFNs in WaS, in CaS).

    Attributes:
        cas_up_to: rows up to which CaS was found to be faster; 0 where that was not found.
        was_from: rows from which WaS was; None where that was not found.
    """

    def __init__(self, best: Callable[[int], str], expected: Callable[[int], tuple[float, float, float]]) -> None:
        self._best, self._expected = best, expected
        self.cas_up_to, self.was_from = 0, None
        self._trials: dict[int, _Trial] = {}

    def mode(self, rows: int) -> str:
        """Of a step that is about to run."""
        if rows <= self.cas_up_to:
            return "cas"
        if self.was_from is not None and rows >= self.was_from:
            return "was"
        if rows not in self._trials:
            best, (_, was_s, cas_s) = self._best(rows), self._expected(rows)
            if best == "was" and cas_s > _FAR * was_s:
                return best
            self._trials[rows] = _Trial(best)
        return self._trials[rows].mode

    def add(self, rows: int, mode: str, seconds: float) -> None:
        """A replayed step of so many rows took so long in that mode."""
        trial = self._trials.get(rows)
        if trial is None or mode != trial.mode:
            return
        trial.replays += 1
        if trial.replays > _UNSETTLED:
            trial.seconds[mode].append(seconds)
        if trial.replays < _RUN:
            return
        trial.replays, trial.runs = 0, trial.runs + 1
        trial.mode = "was" if mode == "cas" else "cas"
        if trial.runs == 1 and mode == "cas" and self._expected(rows)[0] >= statistics.median(trial.seconds["cas"]):
            self._keep("cas", rows)  # no step in WaS ends before its fetches
        elif trial.runs == _RUNS:
            self._decide(rows, trial)

    def _decide(self, rows: int, trial: _Trial) -> None:
        was_s, cas_s = (statistics.median(trial.seconds[mode]) for mode in ("was", "cas"))
        logger.info("sidp: decode steps of %d rows: %.1f ms by WaS, %.1f ms by CaS", rows, 1e3 * was_s, 1e3 * cas_s)
        self._keep("cas" if cas_s < (1 - _GAIN) * was_s else "was", rows)

    def rule_out(self, mode: str, rows: int) -> None:
        """Steps of so many rows cannot be captured in this mode: the other one stays."""
        self._keep("was" if mode == "cas" else "cas", rows)

    def _keep(self, mode: str, rows: int) -> None:
        self._trials.pop(rows, None)
        if mode == "cas":
            self.cas_up_to = max(rows, self.cas_up_to)
        else:
            self.was_from = min(rows, self.was_from or rows)
