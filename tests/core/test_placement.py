"""Unit layout and placement: every byte of a unit has one home, and the copies bring each to its place."""

import itertools
import random

import pytest

from sidp import ConfigError
from sidp._native import C

WORLDS = range(1, 10)


def gated(hidden, inner, element_bytes=2, bias=True):
    tensors = [
        C.TensorLayout("gate", inner, hidden, element_bytes, "rows", 1),
        C.TensorLayout("up", inner, hidden, element_bytes, "rows", 1),
        C.TensorLayout("down", hidden, inner, element_bytes, "cols", 1),
    ]
    if bias:
        tensors += [
            C.TensorLayout("up_bias", inner, 1, element_bytes, "rows", 1),
            C.TensorLayout("down_bias", hidden, 1, element_bytes, "none", 1),
        ]
    return C.UnitLayout(tensors)


def fused(hidden, inner):
    """A fused gate_up of [2I, H], a Conv1D-like fused [H, 2I], and a down projection."""
    return C.UnitLayout(
        [
            C.TensorLayout("gate_up", 2 * inner, hidden, 4, "rows", 2),
            C.TensorLayout("c_fc", hidden, 2 * inner, 2, "cols", 2),
            C.TensorLayout("down", inner, hidden, 2, "rows", 1),
        ]
    )


def payload_bytes(unit):
    return sum(tensor.bytes for tensor in unit.tensors)


def simulate_copies(placement, layer, rank, world):
    """Runs the copies byte by byte on random arenas; returns (slot, what the slot must hold)."""
    unit = placement.unit(layer)
    rng = random.Random(layer * 31 + rank)
    whole = bytearray(rng.randbytes(unit.bytes))
    arenas = [bytearray(placement.arena_bytes(r)) for r in range(world)]
    scatter(placement, layer, whole, arenas)
    slot = bytearray(unit.bytes)
    for op in placement.copies(layer, rank):
        for row in range(op.height):
            source = op.source + row * op.source_pitch
            target = op.target + row * op.target_pitch
            slot[target : target + op.width] = arenas[op.owner][source : source + op.width]
    return slot, whole


def scatter(placement, layer, whole, arenas):
    """What loading does: writes each owner's pieces of the unit compactly into its extent."""
    unit = placement.unit(layer)
    sizes = {t.name: t for t in unit.tensors}
    for rank, arena in enumerate(arenas):
        extent = placement.share(layer, rank)
        for piece in extent.pieces:
            tensor = unit.tensors[piece.tensor]
            assert tensor.name in sizes
            element = tensor.element_bytes
            pitch = tensor.cols * element
            at = extent.offset + piece.offset
            for row in range(piece.row, piece.row + piece.rows):
                begin = tensor.offset + row * pitch + piece.col * element
                width = piece.cols * element
                arena[at : at + width] = whole[begin : begin + width]
                at += width


@pytest.mark.parametrize("kind", ["layer", "striped"])
@pytest.mark.parametrize("world", WORLDS)
def test_shares_partition_every_unit(kind, world):
    units = [gated(8, 40 + 3 * layer) for layer in range(2 * world + 1)]
    placement = C.Placement(kind, units, world)
    for layer, unit in enumerate(units):
        held = 0
        for rank in range(world):
            extent = placement.share(layer, rank)
            for piece in extent.pieces:
                held += piece.rows * piece.cols * unit.tensors[piece.tensor].element_bytes
            assert extent.offset % 256 == 0
        assert held == payload_bytes(unit)


@pytest.mark.parametrize("kind", ["layer", "striped"])
@pytest.mark.parametrize("world", [2, 3, 4, 5])
@pytest.mark.parametrize("make", [gated, fused])
def test_copies_bring_every_byte_to_its_place(kind, world, make):
    units = [make(6, 24 + 7 * layer) for layer in range(world + 2)]
    placement = C.Placement(kind, units, world)
    for layer, rank in itertools.product(range(len(units)), range(world)):
        if placement.local(layer, rank):
            assert placement.copies(layer, rank) == []
            continue
        slot, whole = simulate_copies(placement, layer, rank, world)
        for tensor in placement.unit(layer).tensors:
            span = slice(tensor.offset, tensor.offset + tensor.bytes)
            assert slot[span] == whole[span], (layer, rank, tensor.name)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("layers", [1, 2, 7, 16, 33])
def test_equal_layers_belong_to_layer_mod_world(world, layers):
    placement = C.Placement("layer", [gated(4, 8)] * layers, world)
    assert [placement.owner(layer) for layer in range(layers)] == [layer % world for layer in range(layers)]


@pytest.mark.parametrize("world", WORLDS)
def test_every_cycle_has_one_layer_of_each_owner_and_bytes_are_balanced(world):
    rng = random.Random(world)
    units = [gated(4, rng.choice([16, 32, 64, 128])) for _ in range(world * 12)]
    placement = C.Placement("layer", units, world)
    for cycle in range(12):
        owners = {placement.owner(cycle * world + i) for i in range(world)}
        assert owners == set(range(world))
    held = [placement.arena_bytes(rank) for rank in range(world)]
    assert max(held) - min(held) <= placement.largest_unit_bytes


@pytest.mark.parametrize("world", [2, 3, 8])
def test_striped_shares_are_even_and_aligned_to_matrix_tiles(world):
    inner = 64 * world * 3
    placement = C.Placement("striped", [gated(16, inner, bias=False)], world)
    sizes = {placement.share(0, rank).bytes for rank in range(world)}
    assert len(sizes) == 1
    for rank in range(world):
        assert [p.row % 64 for p in placement.share(0, rank).pieces] == [0, 0, 0]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_striped_copies_walk_the_owners_from_the_ranks_own_offset(world):
    placement = C.Placement("striped", [gated(16, 64 * world, bias=False)], world)
    walks = []
    for rank in range(world):
        owners = [op.owner for op in placement.copies(0, rank)]
        walks.append([owner for owner, _ in itertools.groupby(owners)])
    for step in range(world):
        assert {walk[step] for walk in walks} == set(range(world))
    assert [walk[-1] for walk in walks] == list(range(world))


@pytest.mark.parametrize("resident", [0, 1, 3, 8])
def test_resident_layers_are_whole_on_every_rank(resident):
    placement = C.Placement("layer", [gated(4, 8)] * 8, 3, resident)
    kept = [layer for layer in range(8) if placement.resident(layer)]
    assert len(kept) == resident
    for layer, rank in itertools.product(kept, range(3)):
        assert placement.local(layer, rank)
        assert placement.share(layer, rank).bytes == placement.unit(layer).bytes


def test_bad_arguments_name_the_value_and_the_expectation():
    unit = gated(4, 8)
    with pytest.raises(ConfigError, match="placement must be 'layer' or 'striped', got 'ring'"):
        C.Placement("ring", [unit], 2)
    with pytest.raises(ConfigError, match="at least one layer"):
        C.Placement("layer", [], 2)
    with pytest.raises(ConfigError, match=r"resident_layers must be 0 \.\.\. 1 .*got 2"):
        C.Placement("layer", [unit], 2, 2)
    with pytest.raises(ConfigError, match="layer 1 does not exist"):
        C.Placement("layer", [unit], 2).owner(1)
    with pytest.raises(ConfigError, match="does not divide into 2 groups"):
        C.UnitLayout([C.TensorLayout("odd", 5, 2, 2, "rows", 2)])
