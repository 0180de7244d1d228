"""Decode steps of the paged engine on CUDA: the cache is read where it lies, and a step is one CUDA graph.

A step in which every request has one new token is the same work step after step, thousands of small kernels whose
launching takes the host longer than the GPU needs for them. transformers' engine already keeps such steps apart, with a table of
pages instead of an index for every key, where the flash-attn package is installed; here torch's own kernel reads the pages
(attention.py), and the step is captured once for each size of batch and replayed. Steps with prompts in them run as before.
To capture a size costs as much as a few steps that are launched, so few sizes are (`Sizes`).
Where steps are captured, the engine lays out a step while the one before it runs (its asynchronous batching): it has two sets of
inputs then, which take turns, and each has graphs of its own.

A captured step keeps the mode (WaS or CaS) that it was captured with; where the pool may take either, trials.py finds which.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import SidpError
from . import attention
from .trials import ModeTrials

logger = logging.getLogger(__name__)

_KINDS = ("prompt_step", "launched_step", "replayed_step", "capture")
_LONGEST = 131072  # tokens of a request; longer ones decode as before


def in_place(model: Any) -> bool:
    """Whether decode steps of this model will be those of here; old releases of transformers do not keep them apart."""
    from transformers import ContinuousBatchingConfig

    apart = "max_blocks_per_request" in ContinuousBatchingConfig.__dataclass_fields__
    return apart and attention.decodes_in_place(model)


def prepare(manager: Any, page: int) -> None:
    """Before the engine allocates: have it keep decode steps apart, though it does not know the kernel that serves them."""
    manager.continuous_batching_config.max_blocks_per_request = _LONGEST // page


def round_up(count: int, limit: int) -> int:
    """The next of 1 ... 8, 10, 12, 14, 16, 20, 24, 28, 32, 40 ...: few graphs, and at most a fifth too much."""
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return min(-(-count // step) * step, limit)


class Sizes:
    """How many rows a decode step is laid out with.

    A batch that empties passes through every number of rows once or twice; a graph of its own for each would cost more than it
    gives, and a step takes hardly longer with half as many rows again. So a larger graph that exists is taken, until the step's
    own size has been wanted often. `exact`: always the step's own size, so that what a step computes depends on it alone.
    """

    PATIENCE = 24  # steps; with a graph more than twice too large, a quarter of them

    def __init__(self, limit: int, exact: bool) -> None:
        self._limit, self._exact = limit, exact
        self._wanted: Counter = Counter()

    def choose(self, rows: int, captured: set[int]) -> int:
        """`captured`: sizes that graphs exist of."""
        own = round_up(rows, self._limit)
        larger = min((size for size in captured if size >= own), default=own)
        if self._exact or larger == own:
            return own
        self._wanted[own] += 1
        patience = self.PATIENCE if larger <= 2 * own else self.PATIENCE // 4
        return own if self._wanted[own] > patience else larger


class DecodeSteps:
    """Takes over the decode steps of a manager that has been warmed up.

    Attributes:
        captures: whether steps are captured; on CUDA, until that fails.
        calls: FFN calls by mode in replayed steps, which the pool's own count does not see.
        times: how many steps there were and what they took, in seconds, by kind: "prompt" (with prompts in them), "launched" and
            "replayed"; and what was captured. A step lasts from the end of the one before it, or from its launch.
    """

    def __init__(self, manager: Any, pool: Any, page: int, graphs: bool, exact: bool) -> None:
        processor = manager.batch_processor
        self._runner, self._ios, cache = processor.model_runner, processor.inputs_and_outputs, processor.cache
        self._sets = getattr(self._ios, "io_pairs", None)  # of inputs, where the engine lays out steps ahead
        self._sizes = Sizes(self._runner.cb_config.max_requests_per_batch, exact)
        self._seen: Counter = Counter()  # steps by size; one that comes once is not captured
        self._pool, self._page = pool, page
        self._chooser = pool.chooser if pool is not None and pool.active else None
        self._trials = self._make_trials(exact)
        self._graphs: dict[tuple[int, int, int, str], tuple[torch.cuda.CUDAGraph, Counter]] = {}
        self.captures = graphs and self._ios.compute_stream is not None
        self._memory = torch.cuda.graph_pool_handle() if self.captures else None
        self.calls: Counter = Counter()
        self.times = {f"{kind}{what}": 0.0 for kind in _KINDS for what in ("s", "_seconds")}
        # Steps that are under way: kind, when they were launched, rows, mode of their graph.
        self._running: deque[tuple[str, float, int, str]] = deque()
        self._ended = 0.0
        self._rows: list[tuple[str, int] | None] = []  # (request, its pages) in the table
        self._filled = 0
        if self._sets is None:  # otherwise the engine's own table is on the host already
            pinned = self._ios.block_table.is_cuda
            self._table = torch.full(self._ios.block_table.shape, -1, dtype=torch.int32, pin_memory=pinned)
            self._rows = [None] * self._table.shape[1]
            self._fill_other, cache.fill_block_table = cache.fill_block_table, self._fill
        attention.copy_prompts_alone(cache)
        self._compute_other = self._runner.compute_batch
        self._take_tokens = self._ios.prepare_batch_update
        self._runner.maybe_pad_inputs = self._pad
        self._runner.compute_batch = self._compute
        self._ios.prepare_batch_update = self._tokens

    def _pad(self, rows: int, keys: int, use_decode_fast_path: bool) -> tuple[int, int]:
        """Called before the engine lays out a step."""
        self._runner.pad_inputs = use_decode_fast_path
        if not use_decode_fast_path:
            self._rows = [None] * len(self._rows)
            return rows, keys
        self._rows[self._filled :] = [None] * (len(self._rows) - self._filled)
        self._filled = 0
        return self._sizes.choose(rows, {size for place, size, *_ in self._graphs if place == self._place}), 0

    @property
    def _place(self) -> int:
        """Which set of inputs is being laid out, or is the step's that is about to run."""
        return 0 if self._sets is None else self._ios.current_pair

    def _fill(self, request: str, past: int, new: int, _row: torch.Tensor) -> None:
        """A request's pages, into a table on the host: one copy for all of them, and none for those that stay as they are.

        A request that was out of the batch for a step may have come back to other pages, so rows are remembered no longer
        than their requests take part.
        """
        row, self._filled = self._filled, self._filled + 1
        held = request, (past + new - 1) // self._page
        if self._rows[row] != held:
            self._rows[row] = held
            self._fill_other(request, past, new, self._table[:, row])

    def _compute(self, model: Any, batch_data: dict[str, Any]) -> None:
        laid_out = self._ios if self._sets is None else self._sets[self._place].host_io
        stream, rows = self._ios.compute_stream, laid_out.num_q_tokens
        if self._sets is None and laid_out.use_block_table:
            self._ios.block_table[:, :rows].copy_(self._table[:, :rows], non_blocking=True)
        if stream is not None:  # inputs were written in another stream
            stream.wait_stream(torch.cuda.current_stream())
        launched = time.perf_counter()
        if not laid_out.use_block_table:
            self._running.append(("prompt_step", launched, rows, ""))
            with self._single_apart(laid_out.requests_in_batch):
                self._compute_other(model, batch_data)
            return
        if self._runner.supports_logits_to_keep(model):
            batch_data["logits_to_keep"] = batch_data["logits_indices"]
        longest = max(future.state.position_offset for future in laid_out.requests_in_batch)
        pages = 2 * round_up(-(-longest // self._page // 2), _LONGEST // self._page // 2)
        mode = "" if self._trials is None else self._trials.mode(rows)
        size = (self._place, rows, pages)
        key = (*size, mode)
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            self._running.append(("replayed_step" if key in self._graphs else "launched_step", launched, rows, mode))
            if key in self._graphs:
                graph, calls = self._graphs[key]
                graph.replay()
                self.calls.update(calls)
                return
            attention.step.longest = pages * self._page
            args = (model, batch_data, *self._ios.get_cb_kwargs())
            self._runner._forward_process_and_sample(*args)
            self._seen[size] += 1
            if self.captures and self._seen[size] > 1:
                with self._pinned(mode):
                    self._capture(key, args, stream)

    @staticmethod
    @contextlib.contextmanager
    def _single_apart(futures: list) -> Iterator[None]:
        """Requests that go before a step's prompts, with one token each, are attention.py's to compute apart in here."""
        keys = [future.state.position_offset for future in itertools.takewhile(lambda f: f.query_length == 1, futures)]
        step = attention.step
        step.single, step.single_keys, step.single_longest = len(keys), sum(keys), max(keys, default=0)
        try:
            yield
        finally:
            step.single = 0

    def _make_trials(self, exact: bool) -> ModeTrials | None:
        """None where the mode is settled, and where no token may depend on timing."""
        chooser = self._chooser
        if chooser is None or exact or not chooser.captures_cas:
            return None
        return ModeTrials(chooser.best, chooser.expected)

    @contextlib.contextmanager
    def _pinned(self, mode: str) -> Iterator[None]:
        """What is captured in here takes this mode; "" leaves it to the policy."""
        if not mode:
            yield
            return
        self._chooser.pin(mode)
        try:
            yield
        finally:
            self._chooser.pin(None)

    def _capture(self, key: tuple[int, int, int, str], args: tuple, stream: torch.cuda.Stream) -> None:
        """The step has run already; this records it for the next time."""
        stream.synchronize()
        before, begin = self._count(), time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                self._runner._forward_process_and_sample(*args)
            finally:
                graph.capture_end()
        except SidpError:
            raise
        except RuntimeError as error:  # torch.OutOfMemoryError among them
            self.captures = False
            if self._trials is not None:
                self._trials.rule_out(key[-1], key[1])  # the other mode may have its graph already
            logger.warning("sidp: decode steps run without CUDA graphs from now on: %s", error)
            return
        self._graphs[key] = graph, self._count() - before
        self._add("capture", time.perf_counter() - begin)

    def figures(self) -> dict[str, float]:
        """`times`, and where the modes were both run: CaS was faster up to so many rows, WaS from so many on (0: not found)."""
        if self._trials is None:
            return dict(self.times)
        return {**self.times, "cas_up_to_rows": self._trials.cas_up_to, "was_from_rows": self._trials.was_from or 0}

    def _add(self, kind: str, seconds: float) -> None:
        self.times[f"{kind}s"] += 1
        self.times[f"{kind}_seconds"] += seconds

    def _count(self) -> Counter:
        return Counter() if self._pool is None else Counter(self._pool.stats().calls)

    def _tokens(self):
        """A replay raises nothing: what went wrong in it is looked for before its tokens are used."""
        tokens = self._take_tokens()
        if self._running:
            (kind, launched, rows, mode), now = self._running.popleft(), time.perf_counter()
            took, self._ended = now - max(launched, self._ended), now
            self._add(kind, took)
            if mode and kind == "replayed_step":
                self._trials.add(rows, mode, took)
        if self._pool is not None and self._pool.active:
            self._pool.check()
        return tokens

    def close(self) -> None:
        """Frees the graphs; the engine must have stopped."""
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()
