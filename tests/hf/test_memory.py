"""A rank never holds the whole model: the peak of what it really occupies while it loads, and after a forward.

Judged is RssAnon + RssShmem (its heap, and the shared memory it touched) over what the same process had after
loading a tiny model. Pages of the checkpoint itself are file cache, which the system can take back (RssFile), and do
not count; so that nothing hides there (transformers keeps weights of the file's own dtype in place), everything is
loaded in another dtype than the file's. Up to commit() a rank has mapped nothing of its peers; afterwards it reads
their arenas, so shared pages are counted by their share (Pss), which sums to the truth over the ranks.
"""

from __future__ import annotations

import contextlib
import re
import threading
from pathlib import Path

import models
import pytest
import torch
import transformers

from launch import start
from sidp import PoolConfig, WeightPool, from_pretrained, pool_model

MIB = 1 << 20
_SLACK = 24 * MIB  # the interpreter's own growth, and blocks that malloc keeps
_SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8}
_PERIOD_S = 0.002


def _fields(path: str, pattern: str) -> int:
    return 1024 * sum(int(kib) for kib in re.findall(rf"^(?:{pattern}):\s+(\d+) kB", Path(path).read_text(), re.M))


def _occupied(pid: int | str) -> int:
    return _fields(f"/proc/{pid}/status", "RssAnon|RssShmem")


def _proportional(pid: int | str) -> int:
    return _fields(f"/proc/{pid}/smaps_rollup", "Pss_Anon|Pss_Shmem")


@contextlib.contextmanager
def _peaks(pids: list[int]):
    """The largest _occupied() of each process while the block runs, sampled from this process so as not to disturb."""
    peaks, done = dict.fromkeys(pids, 0), threading.Event()

    def sample():
        while not done.wait(_PERIOD_S):
            for pid in pids:
                with contextlib.suppress(OSError):
                    peaks[pid] = max(peaks[pid], _occupied(pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peaks
    finally:
        done.set()
        sampler.join()


def _load(ctx, how: str, tiny: str, folder: str, placement: str) -> dict:
    """Says "tiny" with its baseline, "loaded" right before commit(), "used" after a forward; returns the arithmetic."""
    transformers.logging.set_verbosity_error()
    config = PoolConfig(placement=placement, slots=1, timeout_s=60)

    def load(path):
        if how == "share":
            return from_pretrained(path, config=config, dtype=torch.float32)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return pool_model(model, config=config), model

    pool, model = load(tiny)
    with pool:
        models.logits(model, 1)
    del pool, model
    ctx.say("tiny", _occupied("self"))
    ctx.hear("load")
    commit = WeightPool.commit

    def commit_when_told(self):
        ctx.say("loaded")
        ctx.hear("commit")
        commit(self)

    WeightPool.commit = commit_when_told
    pool, model = load(folder)
    with pool:
        models.logits(model, 1)
        ctx.say("used", _proportional("self"))
        ctx.hear("close")
        stats = pool.stats()
        pooled = {id(m._parameters[leaf]) for f in model._sidp_pooled.ffns for _, m, leaf in f.parameters()}
        rest = sum(p.nbytes for p in model.parameters() if id(p) not in pooled)
        unit = max(u.nbytes for u in pool.units)
        return {
            "rest": rest,
            "share": stats.owned_bytes,
            "ring": stats.ring_bytes,
            "unit": unit,
            "all": stats.replicated_bytes + rest,
        }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("memory")
    models.build("llama", torch.bfloat16).save_pretrained(tmp / "tiny")
    config = models.config_of("llama")
    config.update({**_SIZES, "head_dim": None, "vocab_size": 1000})
    big = type(config)(**{**config.to_dict(), "head_dim": 128})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(big, dtype=torch.bfloat16).save_pretrained(
        tmp / "big", max_shard_size="80MB"
    )
    return str(tmp / "tiny"), str(tmp / "big")


def _measure(how: str, world_size: int, folders: tuple[str, str], placement: str) -> list[dict]:
    with start(_load, world_size, how, *folders, placement, timeout=200) as ranks:
        baselines = ranks.wait_for("tiny")
        with _peaks(ranks.pids) as peaks:
            ranks.tell("load")
            ranks.wait_for("loaded")
        ranks.tell("commit")
        used = ranks.wait_for("used")
        ranks.tell("close")
        outcomes = ranks.join()
    for rank, out in enumerate(outcomes):
        assert out.finished and not out.error, out.traceback
        loading = peaks[ranks.pids[rank]] - baselines[rank]
        out.value.update(loading=loading, used=used[rank] - baselines[rank], baseline=baselines[rank])
        print(f"{how} {placement} rank {rank}:", {key: f"{value / MIB:.0f} MiB" for key, value in out.value.items()})
    return [out.value for out in outcomes]


@pytest.mark.parametrize("world_size,placement", [(4, "layer"), (2, "striped")])
def test_a_rank_holds_the_rest_its_share_the_ring_and_one_layer(folders, world_size, placement):
    measured = _measure("share", world_size, folders, placement)
    for seen in measured:
        bound = seen["rest"] + seen["share"] + seen["ring"] + seen["unit"]
        assert seen["loading"] <= bound + _SLACK, seen
        assert bound + _SLACK < seen["all"], "the bound must tell a share from the whole model"
        assert seen["loading"] > seen["rest"] + seen["share"] - _SLACK, "the measurement must see what is there"
    bounds = sum(seen["rest"] + seen["share"] + seen["ring"] + seen["unit"] + _SLACK for seen in measured)
    assert sum(seen["used"] for seen in measured) <= bounds, measured


def test_pooling_a_loaded_model_frees_what_the_rank_does_not_own(folders):
    for seen in _measure("whole", 2, folders, "layer"):
        assert seen["loading"] > seen["all"], "the whole model was there, or the measurement cannot see it"
        assert seen["used"] <= seen["rest"] + seen["share"] + seen["ring"] + seen["unit"] + _SLACK, seen
