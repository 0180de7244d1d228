"""What bench/run_batch_gpu.py runs: rows for one GPU that ranks share, for host memory, for two GPUs and for a node."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

_START_S = 27.0  # of a row, until it generates


@dataclass(frozen=True)
class Row:
    """`estimate_s`: of the whole row, loading included; it is stopped after twice that."""

    name: str
    pair: str
    model: str
    ranks: int
    pooled: bool
    requests: int
    prompt: int
    answer: int
    estimate_s: float
    utilization: float = 0.9
    layers: int | None = None  # of the model's, where not all
    max_batch: int = 512
    options: tuple[str, ...] = ()
    offload: str = ""  # "accelerate": a replicated rank whose FFN weights accelerate keeps in host memory
    ranks_per_gpu: int = 1
    tp: int = 1  # GPUs of a replica, not pooled, with tensor parallelism; `ranks` counts GPUs there
    tags: tuple[str, ...] = field(default=(), repr=False)


def one_gpu() -> list[Row]:
    """Several ranks on one GPU. Pooled ones read the others' layers in place: no ring, no link."""
    fourteen = Row("14B x2 1K replicated", "14B x2 1K", "Qwen3-14B", 2, False, 256, 768, 256, 85, ranks_per_gpu=2)
    eight = Row(
        "8B x4 1K replicated", "8B x4 1K", "Qwen3-8B", 4, False, 192, 768, 256, 70, utilization=0.97, ranks_per_gpu=4
    )
    same = Row(
        "14B x2 identity replicated", "14B x2 identity", "Qwen3-14B", 2, False, 32, 64, 24, 16, layers=6, ranks_per_gpu=2,
        options=("--batching", "grouped", "--group-size", "8"),
    )  # fmt: skip
    middle = _longer(fourteen, "2K", 1536, 512, 100, 90)
    long = _longer(fourteen, "4K", 3584, 512, 50, 85)
    return [
        fourteen,
        _pooled(fourteen, 65),
        eight,
        _pooled(eight, 55),
        same,
        _pooled(same, 16),
        middle,
        _pooled(middle, 65),
        long,
        _pooled(long, 60),
    ]


def host_tier() -> list[Row]:
    """One rank. Utilization is set so that weights and cache stand to each other as those of all layers on 80 GB."""
    resident = Row(
        "32B/24 resident", "32B/24", "Qwen3-32B", 1, False, 512, 64, 16, 25, utilization=0.36, layers=24,
        max_batch=1024, options=("--max-batched-tokens", "8192"),
    )  # fmt: skip
    tier = replace(
        resident, name="32B/24 host tier", pooled=True, options=(*resident.options, "--host-tier", "--slots", "3"),
        estimate_s=35,
    )  # fmt: skip
    return [tier, replace(resident, name="32B/24 accelerate", offload="accelerate", estimate_s=60), resident]


def two_gpus() -> list[Row]:
    """One rank on each GPU, over the link between them."""
    large = Row("32B x2 1K replicated", "32B x2 1K", "Qwen3-32B", 2, False, 224, 768, 256, 90)
    # The room for a cache that 80 GB cards have, on cards of 141 GB; as many requests as the pool takes at once.
    tight = Row("32B x2 1K at 0.55 replicated", "32B x2 1K at 0.55", "Qwen3-32B", 2, False, 280, 768, 256, 110, 0.55)
    capped = Row("14B x2 1K at 0.6 replicated", "14B x2 1K at 0.6", "Qwen3-14B", 2, False, 256, 768, 256, 50, 0.6)
    return [
        large,
        _pooled(large, 75, "was"),
        _pooled(large, 65, "auto"),
        replace(
            _pooled(large, 75, "was"), name="32B x2 1K striped was", options=("--mode", "was", "--placement", "striped")
        ),
        tight,
        _pooled(tight, 80, "was"),
        _pooled(tight, 80, "auto"),
        capped,
        _pooled(capped, 45, "was"),
        _pooled(capped, 45, "auto"),
    ]


def node(gpus: int, memory: int) -> list[Row]:
    """One rank on each of `gpus` GPUs of `memory` bytes. 32B as 80 GB cards have it, and 70B, which no rank of them can hold alone."""
    here = f"x{gpus}"
    # On 80 GB four batches of a replicated rank, and no more than one of a pooled rank of four.
    utilization = 0.9 if memory < 100e9 else 0.51
    short = Row(
        f"32B {here} 1K replicated", f"32B {here} 1K", "Qwen3-32B", gpus, False, 136 * gpus, 768, 256, 85, utilization
    )
    middle = _longer(short, "2K", 1536, 512, 68 * gpus, 125)
    long = _longer(short, "4K", 3584, 512, 32 * gpus, 135)
    large = replace(
        short, name=f"70B {here} 1K replicated", pair=f"70B {here} 1K", model="Llama-3.1-70B", requests=28 * gpus, estimate_s=25
    )  # fmt: skip
    rows = []
    for row, estimate_s in ((short, 80), (large, 80), (middle, 105), (long, 95)):
        striped = _pooled(row, estimate_s, "auto")
        striped = replace(striped, name=striped.name + " striped", options=(*striped.options, "--placement", "striped"))
        rows.append(row)
        if row is large:
            name = row.name.replace("replicated", f"TP=2 x DP={gpus // 2}")
            rows.append(replace(row, name=name, tp=2, estimate_s=90))
        rows += [_pooled(row, estimate_s, "was"), _pooled(row, estimate_s, "auto"), striped]
    return rows


def _longer(row: Row, length: str, prompt: int, answer: int, requests: int, estimate_s: float) -> Row:
    name, pair = (text.replace("1K", length) for text in (row.name, row.pair))
    return replace(row, name=name, pair=pair, prompt=prompt, answer=answer, requests=requests, estimate_s=estimate_s)


def _pooled(row: Row, estimate_s: float, mode: str = "") -> Row:
    options = (*row.options, "--mode", mode) if mode else row.options
    name = row.name.replace("replicated", f"pooled {mode}".strip())
    return replace(row, name=name, pooled=True, estimate_s=estimate_s, options=options)


TINY = {
    "model_type": "qwen3", "vocab_size": 500, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
    "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip


def shortened(row: Row, answer: int) -> Row:
    """The same row with answers of `answer` tokens."""
    generating = max(0.0, row.estimate_s - _START_S) * answer / row.answer
    return replace(row, answer=answer, estimate_s=min(row.estimate_s, _START_S) + generating)


def small(row: Row) -> Row:
    """The same row for a CPU, to try the script itself."""
    options = tuple(word for word in row.options if word != "--host-tier")
    return replace(row, requests=8, prompt=12, answer=6, max_batch=8, layers=row.layers and 6, options=options)
