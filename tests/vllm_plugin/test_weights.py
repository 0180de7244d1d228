"""Which parts of a checkpoint a tensor-parallel rank of an engine reads. Needs no vLLM."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from sidp._native import C
from sidp.config import FFNSpec, TensorSpec, Unit
from sidp.errors import ConfigError, LayoutError
from sidp.hf.checkpoint import Checkpoint
from sidp.shares import Shares, unit_layout
from sidp.vllm.weights import FFNTensors

LAYERS, HIDDEN, INNER = 3, 8, 24


class Share:
    """What one rank of a pool keeps, as WeightPool's loading calls see it, with no processes around it."""

    def __init__(self, units, placement, rank):
        self.units, self._placement, self._rank = units, placement, rank
        self.shares = Shares(units, placement, rank, torch.zeros(placement.arena_bytes(rank), dtype=torch.uint8))
        self.wants = self.shares.wants
        self.read = []  # (layer, name, index, tensor)

    def load_slice(self, layer, name, index, tensor):
        self.shares.load_slice(layer, name, index, tensor)
        self.read.append((layer, name, index, tensor))

    def owns(self, layer):
        return self._placement.share(layer, self._rank).bytes > 0


def unit(tp: int, bias: bool) -> Unit:
    inner = INNER // tp
    tensors = [
        TensorSpec("gate_up", (2 * inner, HIDDEN), torch.float32, "rows", 2, "gate_up"),
        TensorSpec("down", (HIDDEN, inner), torch.float32, "cols", 1, "down"),
    ]
    if bias:
        tensors.append(TensorSpec("gate_up_bias", (2 * inner,), torch.float32, "rows", 2, "gate_up_bias"))
        tensors.append(TensorSpec("down_bias", (HIDDEN,), torch.float32, "none", 1, "down_bias"))
    return Unit(tuple(tensors), FFNSpec(HIDDEN, inner, bias=bias, dtype=torch.float32))


def write(folder, bias: bool, **changes) -> dict[str, torch.Tensor]:
    tensors = {
        "model.embed_tokens.weight": torch.randn(5, HIDDEN),
        "model.layers.0.input_layernorm.weight": torch.ones(HIDDEN),
    }
    for layer in range(LAYERS):
        for part in ("gate", "up", "down"):
            shape = (HIDDEN, INNER) if part == "down" else (INNER, HIDDEN)
            tensors[f"model.layers.{layer}.mlp.{part}_proj.weight"] = torch.randn(shape)
            if bias:
                tensors[f"model.layers.{layer}.mlp.{part}_proj.bias"] = torch.randn(shape[0])
    for key, value in changes.items():
        tensors[key] = value
    tensors = {key: value for key, value in tensors.items() if value is not None}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def shard(tensors, layer: int, tp_rank: int, tp: int) -> dict[str, torch.Tensor]:
    """What vLLM's merged and row-parallel layers would hold on that rank."""
    own = slice(tp_rank * INNER // tp, (tp_rank + 1) * INNER // tp)
    part = lambda name, kind: tensors[f"model.layers.{layer}.mlp.{name}_proj.{kind}"]  # noqa: E731
    held = {
        "gate_up": torch.cat([part("gate", "weight")[own], part("up", "weight")[own]]),
        "down": part("down", "weight")[:, own],
    }
    if f"model.layers.{layer}.mlp.down_proj.bias" in tensors:
        held["gate_up_bias"] = torch.cat([part("gate", "bias")[own], part("up", "bias")[own]])
        held["down_bias"] = part("down", "bias") * (tp_rank == 0)
    return held


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind, world", [("layer", 1), ("layer", 2), ("layer", 3), ("striped", 2), ("striped", 3)])
def test_every_rank_reads_its_part_and_all_of_them_the_whole(tmp_path, bias, tp, kind, world):
    tensors = write(tmp_path, bias)
    units = [unit(tp, bias)] * LAYERS
    placement = C.Placement(kind, [unit_layout(one) for one in units], world, 0)
    for tp_rank in range(tp):
        source = FFNTensors(Checkpoint(tmp_path), tp_rank, tp)
        source.check(units)
        seen = [{spec.name: torch.full(spec.shape, torch.nan) for spec in one.tensors} for one in units]
        for rank in range(world):
            share = Share(units, placement, rank)
            source.load_share(share)
            share.shares.check_complete()
            for layer, name, index, tensor in share.read:
                assert seen[layer][name][index].isnan().all()  # nobody else has read it
                seen[layer][name][index] = tensor
        for layer in range(LAYERS):
            for name, expected in shard(tensors, layer, tp_rank, tp).items():
                assert torch.equal(seen[layer][name], expected), (layer, name)


def test_the_rest_is_everything_else(tmp_path):
    tensors = write(tmp_path, True)
    rest = dict(FFNTensors(Checkpoint(tmp_path), 0, 1).rest())
    assert set(rest) == {key for key in tensors if ".mlp." not in key}
    assert all(torch.equal(rest[key], tensors[key]) for key in rest)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, ConfigError, "no up_proj.weight of layer 1"),
        (
            {"model.layers.2.mlp.down_proj.weight": torch.zeros(HIDDEN, INNER + 1)},
            LayoutError,
            "down_proj.weight has shape",
        ),
        ({"model.layers.7.mlp.up_proj.weight": torch.zeros(INNER, HIDDEN)}, ConfigError, r"has 3 layers, and of \[7\]"),
        ({"layers.1.mlp.up_proj.weight": torch.zeros(INNER, HIDDEN)}, ConfigError, "has both"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, changes, error, words):
    write(tmp_path, False, **changes)
    with pytest.raises(error, match=words):
        FFNTensors(Checkpoint(tmp_path), 0, 1).check([unit(1, False)] * LAYERS)


def test_a_checkpoint_without_ffns_is_refused(tmp_path):
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="Hugging Face's naming"):
        FFNTensors(Checkpoint(tmp_path), 0, 1)
