"""A plan as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from typing import Any

from .advice import Option, Plan

_ROWS_SHOWN = (1, 8, 64, 256)


def print_json(plan: Plan) -> None:
    """One JSON object on standard output; bytes, seconds and tokens, unrounded."""
    print(json.dumps(as_dict(plan), indent=2))


def as_dict(plan: Plan) -> dict[str, Any]:
    """What `--json` prints. Per-GPU figures are those of the rank with the least KV cache."""
    d, model = plan.deployment, plan.deployment.model
    return {
        "model": {
            "name": model.name,
            "model_type": model.model_type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "layers": model.layers,
            "parameters": model.parameters,
            "parameters_by_kind": model.by_kind(),
            "kv_bytes_per_token": model.kv_bytes_per_token(),
            "notes": list(model.notes),
        },
        "gpu": {
            "name": d.gpu.name,
            "source": d.gpu.source,
            "memory_bytes": d.gpu.memory_bytes,
            "hbm_bytes_per_s": d.gpu.hbm_bytes_per_s,
            "flops_per_s": d.gpu.flops_per_s,
            "link_bytes_per_s": d.gpu.link_bytes_per_s,
        },
        "deployment": {
            "dp": d.dp,
            "tp": d.tp,
            "seq": d.seq,
            "prompt": d.prompt_tokens,
            "utilization": d.utilization,
            "batched_tokens": d.batched_tokens,
            "backup": d.backup,
        },
        "options": [_option(plan, option) for option in plan.options],
        "advised": plan.best.name,
        "advice": list(plan.advice),
    }


def _option(plan: Plan, option: Option) -> dict[str, Any]:
    memory, rank = option.memory, option.memory.tightest
    found = {
        "kind": memory.kind,
        "active": memory.active,
        "reason": memory.reason,
        "slots": memory.slots[rank],
        "usable_bytes": memory.usable_bytes,
        "other_bytes": memory.other_bytes,
        "ffn_bytes": memory.ffn_bytes[rank],
        "ring_bytes": memory.ring_bytes[rank],
        "activation_bytes": memory.activation_bytes,
        "reserve_bytes": memory.reserve_bytes,
        "kv_bytes": memory.kv_bytes(rank),
        "kv_bytes_per_token": memory.kv_bytes_per_token,
        "fits": memory.fits,
        "kv_tokens_per_replica": memory.kv_tokens(rank),
        "kv_tokens_per_node": memory.node_kv_tokens,
        "kv_gain": plan.gain(option),
        "batch_per_replica": memory.batch,
        "requests_per_s": option.requests_per_s,
        "speedup": plan.speedup(option),
    }
    if memory.active:
        clock = option.clock
        found |= {
            "backup_bytes": memory.backup_bytes[rank],
            "backup_host_bytes": memory.backup_host_bytes,
            "fetch_layer_s": clock.fetch_of_a_layer(),
            "fetch_iteration_s": max(memory.fetched_bytes) / plan.deployment.gpu.link_bytes_per_s,
            "hidden_rows": clock.hidden_rows(),
            "prefill_rows": clock.prefill_rows(),
            "was_rows": clock.was_rows(),
        }
    if option.job is not None:
        found["iteration_s"] = min(option.job.was, option.job.cas)
        found["iteration_compute_s"] = option.job.compute
    return found


def print_tables(plan: Plan) -> None:
    """The plan on standard output."""
    from rich.console import Console

    console = Console()
    for line in _heading(plan):
        console.print(line, highlight=False)
    console.print(_capacity_table(plan))
    for option in plan.pooled:
        if option.memory.active:
            console.print(_crossover_table(option))
            console.print(_fetches(option), highlight=False)
            break  # both placements fetch the same bytes
    for line in (*plan.advice, *plan.deployment.model.notes):
        console.print(line, highlight=False)


def _heading(plan: Plan) -> list[str]:
    d, model = plan.deployment, plan.deployment.model
    kinds = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in model.by_kind().items() if count)
    return [
        f"{model.name}: {model.parameters / 1e9:.2f} B parameters ({kinds}), {model.layers} layers, "
        f"{model.kv_bytes_per_token() / 1024:,.0f} KiB of KV cache a token",
        f"{d.dp * d.tp} x {d.gpu.name}: {d.dp} replicas of {d.tp} GPU{'s' if d.tp > 1 else ''}, "
        f"{d.utilization:.0%} of {d.gpu.memory_bytes / 1e9:.1f} GB each; requests of {d.seq:,} tokens, "
        f"{d.prompt_tokens:,} of them prompt",
        f"rates: {d.gpu.source}",
    ]


def _table(title: str, columns: list[str]):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _capacity_table(plan: Plan):
    table = _table("one GPU, GB", [_title(option) for option in plan.options])

    def row(name: str, cell) -> None:
        table.add_row(name, *(cell(option) for option in plan.options))

    def gigabytes(read):
        return lambda option: f"{read(option.memory, option.memory.tightest) / 1e9:,.1f}"

    row("weights without FFN", gigabytes(lambda m, r: m.other_bytes))
    row("FFN weights", gigabytes(lambda m, r: m.ffn_bytes[r]))
    if plan.deployment.backup == "peer":
        row("  of it backups", gigabytes(lambda m, r: m.backup_bytes[r] if m.active else 0))
    if plan.deployment.backup == "host":
        row("  backups in host memory", gigabytes(lambda m, r: m.backup_host_bytes))
    row("ring", gigabytes(lambda m, r: m.ring_bytes[r]))
    row("activations, reserve", gigabytes(lambda m, r: m.activation_bytes + m.reserve_bytes))
    row("KV cache", lambda o: gigabytes(lambda m, r: m.kv_bytes(r))(o) if o.memory.fits else "does not fit")
    table.add_section()
    row("KV tokens a replica", lambda o: f"{o.memory.kv_tokens(o.memory.tightest):,}")
    row("KV tokens on the node", lambda o: f"{o.memory.node_kv_tokens:,}")
    row("  against replicated", lambda o: _times(plan.gain(o)))
    row("requests at once, a replica", lambda o: f"{o.memory.batch:,}")
    row("mean iteration, ms", lambda o: f"{min(o.job.was, o.job.cas) * 1e3:,.1f}" if o.job else "-")
    row("  of it compute, ms", lambda o: f"{o.job.compute * 1e3:,.1f}" if o.job else "-")
    row("requests/s on the node, est.", lambda o: f"{o.requests_per_s:,.1f}" if o.job else "-")
    row("  against replicated", lambda o: _times(plan.speedup(o)))
    return table


def _title(option: Option) -> str:
    memory = option.memory
    if not memory.active:
        return memory.kind if memory.kind == "replicated" else f"{memory.kind} (stays local)"
    few, many = min(memory.slots), max(memory.slots)
    return f"{memory.kind}, {many if few == many else f'{few}-{many}'} slot{'s' if many > 1 else ''}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _crossover_table(option: Option):
    clock = option.clock
    marks = {clock.was_rows(): "WaS no slower than CaS", clock.hidden_rows(): "fetches hidden"}
    if option.memory.batch:
        marks.setdefault(option.memory.batch, "the full batch")
    table = _table("iteration of decoding requests, ms", ["compute", "fetch", "WaS", "CaS", "mode", ""])
    for rows in sorted({*_ROWS_SHOWN, *(n for n in marks if n)}):
        t = clock.at(rows)
        cells = (f"{seconds * 1e3:,.1f}" for seconds in (t.compute, t.fetch, t.was, t.cas))
        table.add_row(
            f"{rows:,} row{'s' if rows > 1 else ''}", *cells, {"was": "WaS", "cas": "CaS"}[t.mode], marks.get(rows, "")
        )
    return table


def _fetches(option: Option) -> str:
    clock = option.clock
    return (
        f"A layer's fetch: {clock.fetch_of_a_layer() * 1e3:.2f} ms: {_rows(clock.hidden_rows())} decoding requests "
        f"or {_rows(clock.prefill_rows())} prompt tokens in an iteration hide all fetches."
    )


def _rows(count: int | None) -> str:
    return "no number of" if count is None else f"{count:,}"
