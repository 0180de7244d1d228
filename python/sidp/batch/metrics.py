"""What a run shows while it runs and at its end: all of it read from the board, by the process that started it."""

from __future__ import annotations

import logging
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .queue import RANK_FIELDS, Board

logger = logging.getLogger(__name__)

_REFRESH_S = 0.5
_LOG_EVERY_S = 10.0


@dataclass(frozen=True)
class Snapshot:
    """The board at one moment. `ranks`: one dict of RANK_FIELDS each; the rest summed over them."""

    when: float
    total: int
    answered: int
    ranks: list[dict[str, float]]

    @classmethod
    def of(cls, board: Board) -> Snapshot:
        ranks = [board.rank_figures(rank) for rank in range(board.world_size)]
        return cls(time.monotonic(), board.items, board.counts()["done"], ranks)

    def sum(self, name: str) -> float:
        return sum(rank[name] for rank in self.ranks)

    def shares(self) -> dict[str, float]:
        """Part of all FFN calls that went each way."""
        calls = {mode: self.sum(f"calls_{mode}") for mode in ("local", "was", "cas")}
        total = sum(calls.values())
        return {mode: round(count / total, 4) if total else 0.0 for mode, count in calls.items()}


def describe(now: Snapshot, before: Snapshot) -> str:
    """Figures in a few words; rates are since `before`."""
    seconds = max(1e-9, now.when - before.when)
    into = (now.sum("prompt_tokens") - before.sum("prompt_tokens")) / seconds
    out = (now.sum("output_tokens") - before.sum("output_tokens")) / seconds
    parts = [
        f"run {now.sum('running'):.0f}",
        f"in {into:.0f} tok/s",
        f"out {out:.0f} tok/s",
        f"KV {now.sum('kv_tokens'):.0f}/{now.sum('kv_capacity'):.0f}",
    ]
    if now.sum("pool_active"):
        shares = now.shares()
        parts += [f"WaS {shares['was']:.0%}", f"CaS {shares['cas']:.0%}", f"stalls {now.sum('stall_seconds'):.1f} s"]
    return ", ".join(parts)


class Timeline:
    """A run in a few hundred samples, however long it is: where there are too many, every second one goes."""

    MOST = 512
    COLUMNS = ("running", "kv_tokens", "output_tokens", "calls_local", "calls_was", "calls_cas", "stall_seconds")

    def __init__(self) -> None:
        self._rows: list[list[float]] = []
        self._begin = time.monotonic()
        self._every, self._seen = 1, 0

    def add(self, now: Snapshot) -> None:
        if self._seen % self._every == 0:
            figures = [round(now.sum(name), 3) for name in self.COLUMNS]
            self._rows.append([round(now.when - self._begin, 2), now.answered, *figures])
            if len(self._rows) > self.MOST:
                self._rows, self._every = self._rows[::2], 2 * self._every
        self._seen += 1

    def table(self) -> dict[str, list]:
        """`columns`: seconds since the start, requests answered, figures summed over the ranks; `rows`: one list a sample."""
        return {"columns": ["seconds", "answered", *self.COLUMNS], "rows": self._rows}


class Progress:
    """A thread that follows the board into a timeline and shows it: a tqdm bar on a terminal, log lines elsewhere. Use it as a
    context manager.
    """

    def __init__(self, board: Board, timeline: Timeline, show: bool = True) -> None:
        self._board, self._timeline = board, timeline
        self._bar = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sidp-progress", daemon=True)
        if show and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                logger.info("no progress bar: pip install 'sidp[batch]'")
            else:
                self._bar = tqdm(total=board.items, unit="req", desc="sidp run-batch", smoothing=0.1, file=sys.stderr)
        self._show = show
        self._first = self._last = Snapshot.of(board)
        self._shown = time.monotonic()

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5.0)
        self._update(last=True)
        if self._bar is not None:
            self._bar.close()

    def _run(self) -> None:
        while not self._stop.wait(_REFRESH_S):
            self._update(last=False)

    def _update(self, last: bool) -> None:
        now = Snapshot.of(self._board)
        self._timeline.add(now)
        if self._bar is not None:
            self._bar.update(now.answered - self._bar.n)
            self._bar.set_postfix_str(describe(now, self._last))
        elif self._show and (last or now.when - self._shown >= _LOG_EVERY_S):
            since = self._first if last else self._last
            say(f"{now.answered} of {now.total} requests, {describe(now, since)}")
            self._shown = now.when
        else:
            return  # rates are over the time between two lines
        self._last = now


def say(line: str) -> None:
    """A line for people, on standard error."""
    print(f"sidp run-batch: {line}", file=sys.stderr, flush=True)


# ---- Prometheus ---------------------------------------------------------------------------------------------------

# (name, kind, help, field of the board); vLLM's names where it has one.
_SERIES = (
    ("vllm:num_requests_running", "gauge", "Requests in the running batch", "running"),
    ("vllm:prompt_tokens", "counter", "Prompt tokens of answered requests", "prompt_tokens"),
    ("vllm:generation_tokens", "counter", "Tokens generated", "output_tokens"),
    ("vllm:num_preemptions", "counter", "Requests taken out of the batch for want of KV cache", "preemptions"),
    ("sidp_kv_tokens", "gauge", "Tokens in the KV cache", "kv_tokens"),
    ("sidp_kv_capacity_tokens", "gauge", "Tokens the KV cache can hold", "kv_capacity"),
    ("sidp_request_errors", "counter", "Requests answered with an error", "failed"),
    ("sidp_ring_stalls", "counter", "FFN calls that waited for their weights", "stalls"),
    ("sidp_ring_stall_seconds", "counter", "Time FFN calls waited for their weights", "stall_seconds"),
    ("sidp_fetched_bytes", "counter", "Weights fetched from other ranks", "fetched_bytes"),
    ("sidp_owned_bytes", "gauge", "FFN weights this rank keeps", "owned_bytes"),
    ("sidp_ring_bytes", "gauge", "Bytes of the ring's slots", "ring_bytes"),
    ("sidp_freed_bytes", "gauge", "FFN weights this rank does not keep, less the ring", "freed_bytes"),
)


def serve_metrics(board: Board, model_name: str, host: str, port: int):
    """Serve Prometheus on http://host:port/metrics; the server, to be given to `stop_metrics`. ConfigError where it
    cannot.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise ConfigError("--metrics-port needs prometheus-client: pip install 'sidp[batch]'") from error
    registry = CollectorRegistry()
    registry.register(_Collector(board, model_name))
    try:
        return start_http_server(port, addr=host, registry=registry)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--metrics-port {port}: cannot listen on {host}: {error}") from error


def stop_metrics(server) -> None:
    httpd, thread = server
    httpd.shutdown()
    httpd.server_close()
    thread.join(5.0)


class _Collector:
    """Reads the board at each scrape, so that nothing has to be counted twice."""

    def __init__(self, board: Board, model_name: str) -> None:
        self._board = board
        self._model = model_name

    def collect(self):
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}
        snapshot, counts = Snapshot.of(self._board), self._board.counts()
        names = ["model_name", "engine"]
        labels = [[self._model, str(rank)] for rank in range(len(snapshot.ranks))]
        for name, kind, text, field in _SERIES:
            family = families[kind](name, text, labels=names)
            for label, rank in zip(labels, snapshot.ranks, strict=True):
                family.add_metric(label, rank[field])
            yield family
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1", labels=names)
        success = CounterMetricFamily("vllm:request_success", "Requests answered", labels=[*names, "finished_reason"])
        calls = CounterMetricFamily("sidp_ffn_calls", "FFN calls by mode", labels=[*names, "mode"])
        for label, rank in zip(labels, snapshot.ranks, strict=True):
            usage.add_metric(label, rank["kv_tokens"] / rank["kv_capacity"] if rank["kv_capacity"] else 0.0)
            for reason in ("stop", "length"):
                success.add_metric([*label, reason], rank[f"finished_{reason}"])
            for mode in ("local", "was", "cas"):
                calls.add_metric([*label, mode], rank[f"calls_{mode}"])
        yield from (usage, success, calls)
        # Not yet handed out: of the run, of no rank.
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests not yet started", labels=["model_name"])
        waiting.add_metric([self._model], counts["free"] + snapshot.sum("waiting"))
        yield waiting


# ---- the end ------------------------------------------------------------------------------------------------------


def summarise(board: Board, timeline: Timeline, job, work, seconds: float, failures: dict[int, str]) -> dict[str, Any]:
    """The run as plain values, for JSON. Rates are over the time from the first request taken to the last settled;
    the tail is the part of it with fewer than 5 % of the requests left.
    """
    last = Snapshot.of(board)
    begin = min((r["first_taken"] for r in last.ranks if r["first_taken"]), default=0.0)
    busy = max(0.0, max((r["last_settled"] for r in last.ranks), default=0.0) - begin) if begin else 0.0
    tail = min((r["tail_began"] for r in last.ranks if r["tail_began"]), default=0.0)
    outputs, prompts = int(last.sum("output_tokens")), int(last.sum("prompt_tokens"))
    return {
        "model": job.model_name,
        "pooled": job.pooled,
        "pool_active": bool(last.sum("pool_active")),
        "ranks": board.world_size,
        "requests": {
            "input": work.rows,
            "done_before": work.done_before,
            "succeeded": int(last.sum("succeeded")),
            "failed": int(last.sum("failed")) + work.refused,
            "unanswered": board.items - last.answered,
        },
        "prompt_tokens": prompts,
        "output_tokens": outputs,
        "seconds": round(seconds, 3),
        "generation_seconds": round(busy, 3),
        "tail_seconds": round(max(0.0, begin + busy - tail), 3) if tail else 0.0,
        "prompt_tokens_per_s": round(prompts / busy, 2) if busy else 0.0,
        "output_tokens_per_s": round(outputs / busy, 2) if busy else 0.0,
        "kv_capacity_tokens": int(last.sum("kv_capacity")),
        "kv_peak_tokens": int(last.sum("kv_peak")),
        "peak_running": int(last.sum("peak_running")),
        "preemptions": int(last.sum("preemptions")),
        "mode_shares": last.shares(),
        "ring_stalls": int(last.sum("stalls")),
        "ring_stall_seconds": round(last.sum("stall_seconds"), 4),
        "failed_ranks": {str(rank): reason for rank, reason in failures.items()},
        "per_rank": [{name: rank[name] for name in RANK_FIELDS} for rank in last.ranks],
        "timeline": timeline.table(),
    }
