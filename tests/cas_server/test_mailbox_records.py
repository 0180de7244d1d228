"""A mailbox takes anything a peer may write into it: nonsense is refused and counted, nothing is touched out of bounds.

One server in this process, its regions in plain memory between canaries; the test writes the words of mailbox.hpp.
"""

from __future__ import annotations

import random
import struct
import time

import pytest
import torch
from groups import error, formula, weights_of

import sidp
from sidp import cas_cpu
from sidp._native import C

SPEC = sidp.FFNSpec(16, 24, dtype=torch.float32)
WORLD, POOL_ID, CANARY = 3, 0x1234567890ABCDEF, 4096
TAIL = struct.Struct("<Q")
RECORD = struct.Struct("<QQIIIHH")  # sequence, pool, layer, rows, hidden, dtype, flags
REPLY = struct.Struct("<QIIIIQ")  # sequence, status, rows, batch_rows, batch_requests, service_ns
FLOAT32 = 2
OK, BAD_SEQUENCE, BAD_POOL, BAD_LAYER, BAD_ROWS, BAD_HIDDEN, BAD_DTYPE = range(7)


class Memory:
    """The regions of all ranks, and a server of rank 0 over them; layers 0 and 2 are held, layer 1 is not."""

    def __init__(self):
        self.geometry = C.CasGeometry(WORLD, 2, 8, 64, 64)
        self.blocks = [torch.full((2 * CANARY + self.geometry.bytes,), 0xA5, dtype=torch.uint8) for _ in range(WORLD)]
        for block in self.blocks:
            block[CANARY:-CANARY] = 0
        self.views = [memoryview(block.numpy())[CANARY:-CANARY] for block in self.blocks]
        regions = [block.data_ptr() + CANARY for block in self.blocks]
        for region in regions:
            self.geometry.write_header(region, POOL_ID)
        self.weights = {layer: weights_of(SPEC, layer) for layer in (0, 2)}
        self.before = {layer: {k: v.clone() for k, v in w.items()} for layer, w in self.weights.items()}
        held = {layer: _slice(w) for layer, w in self.weights.items()}
        self.arguments = {
            "geometry": self.geometry,
            "pool_id": POOL_ID,
            "striped": False,
            "regions": regions,
            "watch": None,
        }
        blas = C.open_blas(cas_cpu.blas_libraries())
        self.server = C.CasServer(
            0, layers=[held.get(layer, C.FfnSlice()) for layer in range(3)], blas=blas, **self.arguments
        )

    def requester(self, rank: int):
        layers = [C.RemoteLayer(16, "float32", 0) if layer != 1 else C.RemoteLayer() for layer in range(3)]
        return C.CasRequester(rank, layers=layers, **self.arguments)

    def write(self, requester: int, number: int, **changes) -> None:
        fields = {
            "sequence": number,
            "pool": POOL_ID,
            "layer": 0,
            "rows": 1,
            "hidden": 16,
            "dtype": FLOAT32,
            "flags": 0,
        }
        fields.update({"flags": 0, **changes})
        slot = (number - 1) % self.geometry.slots
        RECORD.pack_into(self.views[0], self.geometry.request(requester, slot), *fields.values())

    def set_tail(self, requester: int, tail: int) -> None:
        TAIL.pack_into(self.views[0], self.geometry.tail(requester), tail)

    def reply(self, requester: int, sequence: int) -> tuple:
        """Status and the rest of reply `sequence`, once it has come."""
        at = self.geometry.reply(0, (sequence - 1) % self.geometry.slots)
        end = time.monotonic() + 10
        while (words := REPLY.unpack_from(self.views[requester], at))[0] != sequence:
            assert time.monotonic() < end, f"no reply {sequence}, found {words}"
            time.sleep(0.001)
        return words[1:]

    def settle(self, condition) -> None:
        end = time.monotonic() + 10
        while not condition(self.server.stats()):
            assert time.monotonic() < end, "the server has not come to it"
            time.sleep(0.001)

    def check_untouched(self) -> None:
        for block in self.blocks:
            assert (block[:CANARY] == 0xA5).all() and (block[-CANARY:] == 0xA5).all()
        for layer, tensors in self.weights.items():
            assert all(torch.equal(tensor, self.before[layer][name]) for name, tensor in tensors.items())

    def check_serves(self, rank: int) -> None:
        """The server still answers an honest requester rightly."""
        requester = self.requester(rank)
        x, y = torch.randn(11, 16), torch.empty(11, 16)
        requester.finish(requester.submit(2, x.data_ptr(), y.data_ptr(), 11, 10.0), 10.0)
        reference = formula(x.double(), {k: v.double() for k, v in self.weights[2].items()}, SPEC)
        assert error(y, reference) < 5e-6


def _slice(w: dict[str, torch.Tensor]):
    gate, up, down = ((w[name].data_ptr(), w[name].shape[1], False) for name in ("gate", "up", "down"))
    return C.FfnSlice(16, 24, "silu", "float32", gate, up, down)


@pytest.fixture
def memory():
    made = Memory()
    yield made
    made.server.stop()
    made.check_untouched()


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, OK),
        ({"sequence": 7}, BAD_SEQUENCE),
        ({"sequence": 0}, BAD_SEQUENCE),
        ({"pool": 1}, BAD_POOL),
        ({"layer": 1}, BAD_LAYER),
        ({"layer": 3}, BAD_LAYER),
        ({"layer": 0xFFFFFFFF}, BAD_LAYER),
        ({"rows": 0}, BAD_ROWS),
        ({"rows": 9}, BAD_ROWS),
        ({"rows": 0xFFFFFFFF}, BAD_ROWS),
        ({"hidden": 17}, BAD_HIDDEN),
        ({"hidden": 0}, BAD_HIDDEN),
        ({"dtype": 0}, BAD_DTYPE),
        ({"dtype": 99}, BAD_DTYPE),
        ({"flags": 1}, BAD_DTYPE),
        ({"flags": 0x8000}, BAD_DTYPE),
    ],
)
def test_each_field_is_checked(memory, changes, status):
    memory.write(1, 1, **changes)
    memory.set_tail(1, 1)
    answer, rows, *_ = memory.reply(1, 1)
    assert answer == status and rows == (1 if status == OK else 0)
    assert memory.server.stats().refused == (status != OK)
    memory.check_serves(2)


@pytest.mark.parametrize("tail", [3, 1 << 32, (1 << 64) - 1])
def test_a_tail_that_runs_ahead_breaks_its_mailbox_only(memory, tail):
    memory.set_tail(1, tail)
    memory.check_serves(2)
    memory.settle(lambda stats: stats.broken == 1)


def test_a_tail_that_runs_backwards_breaks_its_mailbox(memory):
    memory.write(1, 1)
    memory.write(1, 2)
    memory.set_tail(1, 2)
    assert memory.reply(1, 2)[0] == OK
    memory.set_tail(1, 1)
    memory.check_serves(2)
    memory.settle(lambda stats: stats.broken == 1)


def test_good_requests_behind_bad_ones_are_answered_in_order(memory):
    memory.write(1, 1, rows=77)
    memory.write(1, 2, rows=2)
    memory.set_tail(1, 2)
    assert memory.reply(1, 2)[0] == OK
    assert memory.reply(1, 1)[0] == BAD_ROWS


def test_a_refusal_reaches_the_requester_and_the_channel_goes_on(memory):
    layers = [C.RemoteLayer(16, "float32", 0), C.RemoteLayer(16, "float32", 0), C.RemoteLayer(16, "float32", 0)]
    requester = C.CasRequester(1, layers=layers, **memory.arguments)  # believes that rank 0 holds layer 1
    x, y = torch.randn(20, 16), torch.empty(20, 16)
    with pytest.raises(sidp.LayoutError, match=r"rank 0 refused .* a layer that it does not hold"):
        requester.finish(requester.submit(1, x.data_ptr(), y.data_ptr(), 20, 10.0), 10.0)
    requester.finish(requester.submit(2, x.data_ptr(), y.data_ptr(), 20, 10.0), 10.0)
    assert error(y, formula(x.double(), {k: v.double() for k, v in memory.weights[2].items()}, SPEC)) < 5e-6


def test_several_layers_in_flight(memory):
    requester = memory.requester(1)
    xs, ys = torch.randn(8, 12, 16), torch.empty(8, 12, 16)
    tickets = [requester.submit(2 * (i % 2), xs[i].data_ptr(), ys[i].data_ptr(), 12, 10.0) for i in range(8)]
    for ticket in reversed(tickets):
        requester.finish(ticket, 10.0)
    for i in range(8):
        w = {k: v.double() for k, v in memory.weights[2 * (i % 2)].items()}
        assert error(ys[i], formula(xs[i].double(), w, SPEC)) < 5e-6


@pytest.mark.parametrize("seed", range(40))
def test_random_words_anywhere_in_a_requesters_lines(seed):
    """Rank 1 scribbles over its tail, its records, its rows and the doorbell while rank 2 asks properly."""
    noise, memory = random.Random(seed), Memory()
    geometry, view = memory.geometry, memory.views[0]
    areas = [(geometry.request(1, 0), 256), (geometry.request_rows(1, 0), 2 * 8 * 128), (128, 16)]
    tail = 0
    for _ in range(60):
        begin, length = noise.choice(areas)
        at = begin + noise.randrange(length - 8)
        view[at : at + 8] = noise.randbytes(8)
        if noise.random() < 0.7:  # mostly plausible, so that the check has to find what is wrong
            changes = {"rows": noise.choice([0, 1, 8, 9, 1 << 31]), "layer": noise.choice([0, 1, 2, 3, 1 << 31])}
            memory.write(1, tail + 1, **changes)
        if noise.random() < 0.8:
            tail += 1
        memory.set_tail(1, tail if noise.random() < 0.97 else noise.getrandbits(64))
    try:
        memory.check_serves(2)
        stats = memory.server.stats()
        assert stats.refused + stats.broken > 0 or stats.requests > 2
    finally:
        memory.server.stop()
    memory.check_untouched()
