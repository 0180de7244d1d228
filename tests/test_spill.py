"""A share in two memories: the cut runs between extents, offsets go on through both parts, and every byte is where it belongs."""

from __future__ import annotations

import pytest
import torch

from sidp import ConfigError, FFNSpec, PoolConfig
from sidp._native import C
from sidp.shares import Shares, unit_layout
from sidp.spill import SplitMemory, cut_of, on_device

_SPECS = [FFNSpec(16, 24 * (1 + layer % 3), bias=layer % 2 == 0, dtype=torch.float32) for layer in range(9)]
_UNITS = [spec.unit() for spec in _SPECS]


def _placement(kind: str, world: int, resident: int):
    return C.Placement(kind, [unit_layout(unit) for unit in _UNITS], world, resident)


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["layer", "striped"])
def test_the_cut_holds_the_most_whole_extents(kind, world, resident):
    placement, layers = _placement(kind, world, resident), range(len(_UNITS))
    for rank in range(world):
        whole = placement.arena_bytes(rank)
        for wish in (0, 1, whole // 3, whole // 2, whole - 1, whole, whole + 1):
            cut = cut_of(placement, rank, len(_UNITS), wish)
            shares = [placement.share(layer, rank) for layer in layers]
            assert 0 <= cut <= min(wish, whole)
            for share in shares:
                assert share.offset + share.bytes <= cut or share.offset >= cut  # no extent lies on both sides
            after = [share.offset + share.bytes for share in shares if share.bytes and share.offset >= cut]
            assert not after or min(after) > wish  # the next one would not have fitted
            here = [on_device(placement, rank, layer, cut) for layer in layers]
            assert sum(share.bytes for share, there in zip(shares, here, strict=True) if there) <= cut
        assert cut_of(placement, rank, len(_UNITS), whole) == whole


@pytest.mark.parametrize("kind", ["layer", "striped"])
@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_a_split_share_holds_what_a_whole_one_holds(kind, part):
    placement = _placement(kind, 2, 1)
    for rank in range(2):
        nbytes = placement.arena_bytes(rank)
        cut = cut_of(placement, rank, len(_UNITS), int(part * nbytes))
        whole = torch.zeros(nbytes, dtype=torch.uint8)
        split = SplitMemory(torch.zeros(cut, dtype=torch.uint8), torch.zeros(nbytes - cut, dtype=torch.uint8))
        stores = [Shares(_UNITS, placement, rank, memory) for memory in (whole, split)]
        for layer, unit in enumerate(_UNITS):
            tensors = {t.name: torch.randn(t.shape, dtype=t.dtype) for t in unit.tensors}
            for store in stores:
                store.load(layer, tensors)
            if kind == "layer" and placement.local(layer, rank):
                assert all(torch.equal(tensors[name], got) for name, got in stores[1].whole_unit(layer).items())
        for store in stores:
            store.check_complete()
        assert torch.equal(torch.cat((split.device, split.host)), whole)


def test_device_bytes_goes_with_the_host_tier():
    assert PoolConfig(host_tier=True, device_bytes=0).device_bytes == 0
    with pytest.raises(ConfigError, match="set both"):
        PoolConfig(device_bytes=1 << 20)
    with pytest.raises(ConfigError, match="device_bytes must be an integer of 0 or more"):
        PoolConfig(host_tier=True, device_bytes=-1)
