"""Loading only a rank's share: the same bits as transformers' own loader, and what a bad folder gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sidp
from launch import parallel_launch
from sidp import ConfigError, LayoutError, PoolConfig, from_pretrained, unpool_model

FAMILIES = ["llama", "llama_bias_tied", "gemma3_text", "phi3", "gpt2", "opt", "falcon_bias", "gpt_neox"]


def _count_reads() -> list[int]:
    """From here on, the bytes of every part of an FFN tensor that is read (in this process only)."""
    from sidp.hf.checkpoint import Checkpoint

    read, counted = Checkpoint.read, []

    def counting(self, key, index):
        part = read(self, key, index)
        counted.append(part.numel())
        return part

    Checkpoint.read = counting
    return counted


def _load_and_compare(ctx, folders: list[str]) -> list[dict]:
    counted = _count_reads()
    transformers.logging.set_verbosity_error()
    seen = []
    for number, folder in enumerate(folders):
        dtype = (None, torch.bfloat16)[number % 2]
        placement = ("layer", "striped")[number // 2 % 2]
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
        expected = models.answers(plain, ctx.rank)
        counted.clear()
        config = PoolConfig(placement=placement, slots=None if ctx.world_size == 1 else 1, timeout_s=30)
        pool, model = from_pretrained(folder, config=config, dtype=dtype)
        with pool:
            ffns = sum(t.nbytes for unit in pool.units for t in unit.tensors) // pool.units[0].tensors[0].dtype.itemsize
            actual = models.answers(model, ctx.rank)
            frozen = not any(p.requires_grad for p in model.parameters()) and not model.training
            unpool_model(model)
            bits, wanted = model.state_dict(), plain.state_dict()
            seen.append(
                {
                    "what": f"{Path(folder).name}, {dtype}, {placement}",
                    "type": type(model) is type(plain),
                    "same": [torch.equal(a, b) for a, b in zip(actual, expected, strict=True)],
                    "undone": list(bits) == list(wanted) and all(torch.equal(bits[k], wanted[k]) for k in wanted),
                    "frozen": frozen,
                    "read": sum(counted),
                    "all": ffns,
                }
            )
    return seen


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_reads_its_share_and_gets_the_same_bits(world_size, tmp_path):
    folders = []
    for number, family in enumerate(FAMILIES):
        for shards in ("1GB", "20KB"):
            folder = tmp_path / f"{family}-{shards}"
            models.build(family, seed=number).save_pretrained(folder, max_shard_size=shards)
            assert (folder / "model.safetensors").exists() == (shards == "1GB")
            folders.append(str(folder))
    outcomes = parallel_launch(_load_and_compare, world_size, folders, timeout=200)
    for loaded in zip(*outcomes, strict=True):
        for rank, seen in enumerate(loaded):
            what = f"rank {rank}: {seen}"
            assert all(seen["same"]) and seen["undone"] and seen["type"] and seen["frozen"], what
            assert seen["read"] < seen["all"] or world_size == 1, what
        assert sum(seen["read"] for seen in loaded) == loaded[0]["all"], loaded[0]["what"]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    models.build("llama").save_pretrained(path)
    return path


@pytest.fixture
def sharded(tmp_path):
    path = tmp_path / "sharded"
    models.build("llama").save_pretrained(path, max_shard_size="20KB")
    return path


def _change(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_names_that_transformers_renames_are_found(tmp_path):
    model = models.build("llama_bias_tied")
    model.model.save_pretrained(tmp_path / "base")  # without the prefix "model."
    with from_pretrained(tmp_path / "base")[0] as pool:
        assert pool.num_layers == 5

    model.save_pretrained(tmp_path / "renamed")
    _change(tmp_path / "renamed", lambda t: [t.update({k.replace(".mlp.", ".ffn."): t.pop(k)}) for k in list(t)])
    with pytest.raises(ConfigError, match=r"no tensor for model\.layers\.0\.mlp\.gate_proj\.weight"):
        from_pretrained(tmp_path / "renamed")
    pool, renamed = from_pretrained(tmp_path / "renamed", key_mapping={r"\.ffn\.": ".mlp."})
    with pool:
        assert torch.equal(models.logits(renamed, 1), models.logits(model, 1))


def test_a_checkpoint_that_needs_a_conversion_is_refused(folder, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Concatenate, WeightConverter

    fused = WeightConverter(["mlp.gate.weight", "mlp.up.weight"], "mlp.gate_up_proj.weight", [Concatenate(dim=0)])
    own = conversion_mapping.get_model_conversion_mapping
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *a, **k: [*own(*a, **k), fused])
    models.build("phi3").save_pretrained(folder)

    def split(tensors):
        for key in [key for key in tensors if "gate_up_proj" in key]:
            gate, up = tensors.pop(key).chunk(2)
            tensors[key.replace("gate_up_proj", "gate")] = gate.clone()
            tensors[key.replace("gate_up_proj", "up")] = up.clone()

    _change(folder, split)
    with pytest.raises(
        ConfigError, match=r"model\.safetensors: .*mlp\.(gate|up)\.weight needs a conversion.*pool_model"
    ):
        from_pretrained(folder)


def _shrink(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


@pytest.mark.parametrize(
    "change,error,message",
    [
        (
            lambda t: t.pop("model.layers.3.mlp.up_proj.weight"),
            ConfigError,
            r"no tensor for model\.layers\.3\.mlp\.up_proj",
        ),
        (
            lambda t: t.pop("model.layers.3.self_attn.q_proj.weight"),
            ConfigError,
            r"lacks 1 .*layers\.3\.self_attn\.q_proj",
        ),
        (
            _shrink("model.layers.2.mlp.down_proj.weight"),
            LayoutError,
            r"layers\.2\.mlp\.down_proj.*\(31, 48\).*\(32, 48\)",
        ),
        (_shrink("model.norm.weight"), LayoutError, r"model\.safetensors: model\.norm\.weight has shape \(31,\)"),
    ],
)
def test_tensors_that_are_missing_or_of_another_shape_are_named(folder, change, error, message):
    _change(folder, change)
    with pytest.raises(error, match=message):
        from_pretrained(folder)


def _write_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "spoil,message",
    [
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"no model\.safetensors.*save_pretrained",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"junk" * 100), r"model\.safetensors cannot be read"),
        (lambda f: (f / "config.json").unlink(), r"no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json.*cannot read"),
        (lambda f: _write_config(f, model_type="unheard_of"), "unheard_of"),
        (lambda f: _write_config(f, quantization_config={"quant_method": "fp8"}), "quantised"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "PEFT adapter"),
    ],
)
def test_a_bad_folder_is_refused_by_file(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        from_pretrained(folder)


def test_a_bad_index_is_refused_by_file(sharded):
    index = sharded / "model.safetensors.index.json"
    own = json.loads(index.read_text())
    key, name = next(iter(own["weight_map"].items()))
    other = next(n for n in own["weight_map"].values() if n != name)
    index.write_text(json.dumps({"weight_map": {**own["weight_map"], key: other}}))
    with pytest.raises(ConfigError, match=rf"says that {other} holds {key}"):
        from_pretrained(sharded)
    index.write_text(json.dumps({"weight_map": {**own["weight_map"], key: "../model.safetensors"}}))
    with pytest.raises(ConfigError, match="which is not in"):
        from_pretrained(sharded)
    index.write_text("[]")
    with pytest.raises(ConfigError, match="not an index"):
        from_pretrained(sharded)
    index.write_text(json.dumps(own))
    (sharded / name).unlink()
    with pytest.raises(ConfigError, match=f"{name}.*Download"):
        from_pretrained(sharded)


def test_a_path_that_is_no_folder_is_refused(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path in (folder / "config.json", folder / "nothing", "nothing", "no-such-user/no-such-model"):
        with pytest.raises(ConfigError, match="folder"):
            from_pretrained(path)


def test_arguments_that_place_weights_are_refused(folder):
    with pytest.raises(ConfigError, match=r"takes no device_map.*pool_model"):
        from_pretrained(folder, device_map="auto")
    with pytest.raises(ConfigError, match="cannot load it"):
        from_pretrained(folder, dtype="float17")


def test_a_mixture_of_experts_is_refused(tmp_path):
    models.build("mixtral").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="mixture of experts"):
        from_pretrained(tmp_path)


def test_the_class_itself_stays_as_it_was(folder):
    init = transformers.LlamaForCausalLM.__init__
    with from_pretrained(folder)[0]:
        pass
    assert transformers.LlamaForCausalLM.__init__ is init
    plain = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert all(not p.is_meta for p in plain.parameters())


def _one_folder_is_broken(ctx, good: str, bad: str) -> tuple[str, str]:
    try:
        from_pretrained(bad if ctx.rank == 1 else good, config=PoolConfig(timeout_s=30))
    except sidp.SidpError as error:
        return type(error).__name__, str(error)
    return "", "loaded"


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"])
def test_a_folder_that_is_broken_for_one_rank_is_refused_on_all(folder, tmp_path, tensor):
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    _change(bad, lambda tensors: tensors.pop(tensor))
    outcomes = parallel_launch(_one_folder_is_broken, 2, str(folder), str(bad), timeout=120)
    assert [kind for kind, _ in outcomes] == ["ConfigError", "ConfigError"]
    assert outcomes[0][1].startswith("rank 1:") and tensor in outcomes[0][1] and tensor in outcomes[1][1]
