"""A run from its files to its summary: prepare the work, start the ranks or join torchrun's, watch, sum up."""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SidpError
from ..launch import RankContext, RankFailed, launch
from . import metrics
from .queue import Board
from .records import Defaults
from .spool import Work, prepare_work
from .worker import Job, serve

_JOB_KEY = "sidp/run-batch/job"
_JOIN_S = 600.0  # rank 0 checks the whole input before the others can begin


@dataclass(frozen=True)
class Options:
    """What the command line says. `model` is a folder, or None for the tiny random model."""

    input: str
    output: str
    model: str | None
    model_name: str
    ranks: int
    load_format: str = "auto"
    resume: bool = False
    overwrite: bool = False
    pooled: bool = True
    pool_config: dict[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    dtype: str = "auto"
    batching: str = "auto"
    max_batch: int | None = None
    group: int = 8
    kv_bytes: int | None = None
    utilization: float = 0.9
    batch_tokens: int | None = None
    graphs: bool = True
    defaults: Defaults = field(default_factory=Defaults)
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    progress: bool = True


def in_torchrun() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ


def run(options: Options) -> dict[str, Any]:
    """Do all of it and return the summary; `failed_ranks` in it names ranks that died, or is empty."""
    with tempfile.TemporaryDirectory(prefix="sidp-batch-") as scratch:
        job, work = _prepare(options, Path(scratch))
        begin = time.monotonic()
        with _watched(job, options) as (board, timeline):
            failures = _launch(job, options) if work.extents else {}
            return metrics.summarise(board, timeline, job, work, time.monotonic() - begin, failures)


def run_in_torchrun(options: Options) -> dict[str, Any] | None:
    """Collective: one rank of a group that torchrun started. The summary on rank 0, None elsewhere.

    What rank 0 finds wrong with the arguments is raised by all ranks.
    """
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a pool spans one host
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=_JOIN_S))
    rank, world = dist.get_rank(), dist.get_world_size()
    context = RankContext(rank, world, 1, lambda message: None)
    store = dist.distributed_c10d._get_default_store()
    try:
        if rank != 0:
            kind, _, text = store.get(_JOB_KEY).partition(b"\0")
            if kind == b"error":
                raise ConfigError(f"rank 0: {text.decode()}")
            if kind == b"job":
                serve(context, Job.from_json(text))
            return None
        return _lead(options, context, world, store)
    finally:
        dist.destroy_process_group()


def _lead(options: Options, context: RankContext, world: int, store) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sidp-batch-") as scratch:
        try:
            job, work = _prepare(options, Path(scratch), world)
        except SidpError as error:
            store.set(_JOB_KEY, b"error\0" + str(error).encode())
            raise
        store.set(_JOB_KEY, b"job\0" + job.to_json() if work.extents else b"none\0")
        begin = time.monotonic()
        with _watched(job, options) as (board, timeline):
            if work.extents:
                serve(context, job)
                _wait_for_others(board)
            return metrics.summarise(board, timeline, job, work, time.monotonic() - begin, {})


def _wait_for_others(board: Board) -> None:
    """The summary is of all ranks; without a pool nothing else waits for them. A dead one is torchrun's to report."""
    while any(board.alive(r) and not board.rank_figures(r)["finished"] for r in range(board.world_size)):
        time.sleep(0.1)


def _prepare(options: Options, scratch: Path, world: int | None = None) -> tuple[Job, Work]:
    world = options.ranks if world is None else world
    spool, board = scratch / "spool.jsonl", scratch / "board"
    work = prepare_work(
        options.input, options.output, spool, options.defaults, resume=options.resume, overwrite=options.overwrite
    )
    Board.create(board, world, work.extents)
    # Fixed groups: as large as asked for, but not so large that a rank gets none.
    group = max(1, min(options.group, -(-len(work.extents) // world)))
    job = Job(
        model=options.model,
        load_format=options.load_format,
        model_name=options.model_name,
        board=str(board),
        spool=str(spool),
        output=str(Path(options.output).absolute()),
        pooled=options.pooled,
        pool_config=options.pool_config,
        backend=options.backend,
        dtype=options.dtype,
        batching=options.batching,
        max_batch=options.max_batch,
        kv_bytes=options.kv_bytes,
        utilization=options.utilization,
        batch_tokens=options.batch_tokens,
        group=group,
        samples=work.samples,
        filters=work.filters,
        mean_cost=work.mean_cost,
        graphs=options.graphs,
    )
    if options.progress:
        already = f", {work.done_before} answered before" if work.done_before else ""
        refused = f", {work.refused} refused" if work.refused else ""
        metrics.say(f"{job.model_name}: {len(work.extents)} requests over {world} ranks{already}{refused}; loading ...")
    return job, work


@contextlib.contextmanager
def _watched(job: Job, options: Options) -> Iterator[tuple[Board, metrics.Timeline]]:
    timeline = metrics.Timeline()
    with contextlib.closing(Board(job.board)) as board, contextlib.ExitStack() as stack:
        if options.metrics_port is not None:
            server = metrics.serve_metrics(board, job.model_name, options.metrics_host, options.metrics_port)
            stack.callback(metrics.stop_metrics, server)
            if options.progress:
                host, port = server[0].server_address[:2]
                metrics.say(f"metrics on http://{host}:{port}/metrics")
        if board.items:
            stack.enter_context(metrics.Progress(board, timeline, options.progress))
        yield board, timeline


def _launch(job: Job, options: Options) -> dict[int, str]:
    """Start the ranks; {rank: reason} of those that failed. Pooled ranks without backups fail together, others do not."""
    try:
        results = launch(serve, options.ranks, (job,), survivors=job.survives)
    except RankFailed as error:
        return {error.rank: error.reason}
    return {result.rank: result.reason for result in results if isinstance(result, RankFailed)}
