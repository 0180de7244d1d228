"""The demo's figures: a table for people, JSON for programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .demo_rank import Job, RankReport, Run

_ANSWERS_SHOWN = 3
_ANSWER_CHARS = 600


@dataclass(frozen=True)
class Comparison:
    """Tokens of the pooled run that equal the unpooled model's, out of the longer of both."""

    equal: int
    total: int
    first_difference: tuple[int, int] | None  # (prompt, token position)

    @property
    def all_equal(self) -> bool:
        return self.equal == self.total


def compare(pooled: Run, unpooled: Run) -> Comparison:
    """Token by token, prompt by prompt; a missing token counts as different."""
    equal = total = 0
    first = None
    for ours, theirs in zip(pooled.answers, unpooled.answers, strict=True):
        length = max(len(ours.tokens), len(theirs.tokens))
        total += length
        for position in range(length):
            same = ours.tokens[position : position + 1] == theirs.tokens[position : position + 1]
            equal += same
            if not same and first is None:
                first = (ours.prompt, position)
    return Comparison(equal, total, first)


def all_equal(reports: list[RankReport]) -> bool:
    """True where nothing was compared, too: `--no-verify` is no failure."""
    return all(compare(r.pooled, r.unpooled).all_equal for r in reports if r.unpooled is not None)


def group_rate(runs: list[Run]) -> float:
    """Tokens/s of the group: all tokens over the slowest rank's seconds; 0.0 where nothing ran."""
    seconds = max((run.seconds for run in runs), default=0.0)
    return sum(run.tokens for run in runs) / seconds if seconds > 0 else 0.0


def kv_tokens(report: RankReport) -> int:
    """How many tokens of KV cache fit into what this rank freed."""
    return max(0, report.stats["freed_bytes"]) // report.kv_bytes_per_token


def print_tables(job: Job, reports: list[RankReport]) -> None:
    """A few answers, then the figures, on standard output."""
    from rich.console import Console

    console = Console()
    _print_answers(console, job, reports)
    console.print(_memory_table(reports))
    for line in _notes(job, reports):
        console.print(line, highlight=False)


def _print_answers(console, job: Job, reports: list[RankReport]) -> None:
    if job.model.path is None:
        return  # a random model's bytes tell a reader nothing
    from rich.markup import escape

    answers = sorted((answer for report in reports for answer in report.pooled.answers), key=lambda a: a.prompt)
    for answer in answers[:_ANSWERS_SHOWN]:
        prompt = job.prompts[answer.prompt]
        lines = [line.strip() for line in prompt.text.splitlines() if line.strip()]
        console.print(f"[bold]{escape(prompt.name)}[/bold] {escape(lines[-1] if len(lines) == 1 else _title(lines))}")
        console.print(escape(answer.text.strip()[:_ANSWER_CHARS]), style="dim", highlight=False)
        console.print()


def _title(lines: list[str]) -> str:
    """Of a prompt with code in it, the line that says what is asked."""
    return next((line for line in lines if line.startswith("def ")), lines[0])


def _memory_table(reports: list[RankReport]):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="FFN weights of each rank", title_justify="left", pad_edge=False)
    table.add_column("")
    for report in reports:
        table.add_column(f"rank {report.rank}", justify="right")
    for name, cell in _ROWS:
        table.add_row(name, *(cell(report) for report in reports))
    return table


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


_ROWS = (
    ("replicated (unpooled)", lambda r: _megabytes(r.stats["replicated_bytes"])),
    ("pooled: its share", lambda r: _megabytes(r.stats["owned_bytes"])),
    ("pooled: ring", lambda r: f"{_megabytes(r.stats['ring_bytes'])} ({r.stats['slots']} slots)"),
    ("memory freed", lambda r: _megabytes(r.stats["freed_bytes"])),
    ("  as KV cache", lambda r: f"{kv_tokens(r):,} tokens"),
    ("fetches", lambda r: f"{r.stats['fetches']:,}"),
    ("bytes fetched", lambda r: _megabytes(r.stats["fetched_bytes"])),
    ("stalls", lambda r: f"{r.stats['stalls']:,}"),
    ("stall time", lambda r: f"{r.stats['stall_seconds'] * 1e3:,.1f} ms"),
    ("  of its run", lambda r: f"{100 * r.stats['stall_seconds'] / max(r.pooled.seconds, 1e-9):.2f} %"),
    ("answers", lambda r: f"{len(r.pooled.answers):,}"),
    ("tokens", lambda r: f"{r.pooled.tokens:,}"),
    ("tokens/s", lambda r: f"{r.pooled.tokens / max(r.pooled.seconds, 1e-9):,.1f}"),
)


def _notes(job: Job, reports: list[RankReport]) -> list[str]:
    lines = []
    if not reports[0].active:
        lines.append(f"not pooled: {reports[0].reason}")
    rate = f"throughput: {group_rate([r.pooled for r in reports]):.1f} tokens/s pooled"
    unpooled = [report.unpooled for report in reports if report.unpooled is not None]
    if unpooled:
        rate += f", {group_rate(unpooled):.1f} unpooled (this machine's ranks share cores and memory bandwidth)"
    return [*lines, rate, _verdict(job, reports)]


def _verdict(job: Job, reports: list[RankReport]) -> str:
    results = [compare(r.pooled, r.unpooled) for r in reports if r.unpooled is not None]
    if not results:
        return "tokens equal to the unpooled model: not checked (--no-verify)"
    equal, total = sum(r.equal for r in results), sum(r.total for r in results)
    if equal == total:
        return f"tokens equal to the unpooled model: yes, {equal}/{total}"
    prompt, position = next(r.first_difference for r in results if r.first_difference)
    return (
        f"tokens equal to the unpooled model: NO, {equal}/{total}; the first difference is in "
        f"{job.prompts[prompt].name} at token {position}"
    )


def print_json(job: Job, reports: list[RankReport]) -> None:
    """One JSON object on standard output; bytes, seconds and tokens, unrounded."""
    print(json.dumps(as_dict(job, reports), indent=2))


def as_dict(job: Job, reports: list[RankReport]) -> dict[str, Any]:
    """What `--json` prints."""
    verified = [compare(r.pooled, r.unpooled) for r in reports if r.unpooled is not None]
    answers = sorted((answer for report in reports for answer in report.pooled.answers), key=lambda a: a.prompt)
    return {
        "model": job.model.name,
        "placement": job.placement,
        "pooled": reports[0].active,
        "reason": reports[0].reason,
        "ranks": [_rank_dict(report) for report in reports],
        "tokens_per_s": group_rate([r.pooled for r in reports]),
        "unpooled_tokens_per_s": group_rate([r.unpooled for r in reports]) if verified else None,
        "verified": bool(verified),
        "tokens_equal": sum(r.equal for r in verified) if verified else None,
        "tokens_compared": sum(r.total for r in verified) if verified else None,
        "all_equal": all(r.all_equal for r in verified) if verified else None,
        "answers": [{"name": job.prompts[a.prompt].name, "tokens": list(a.tokens), "text": a.text} for a in answers],
    }


def _rank_dict(report: RankReport) -> dict[str, Any]:
    return {
        "rank": report.rank,
        **report.stats,
        "kv_bytes_per_token": report.kv_bytes_per_token,
        "freed_kv_tokens": kv_tokens(report),
        "tokens": report.pooled.tokens,
        "seconds": report.pooled.seconds,
    }
