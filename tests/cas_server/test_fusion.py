"""What was fused into one batch makes no difference beyond rounding: batches made on purpose, not met by chance."""

from __future__ import annotations

import pytest
import torch
from groups import error, formula, rows_of, weights_of

import sidp
from sidp import cas, cas_cpu
from sidp._native import C

WORLD, POOL_ID, ROWS = 5, 0xF00D, 8
# Largest difference between a request computed in a batch and alone, relative to the largest value: float32 sums in
# another order, and where that crosses a rounding boundary one unit in the last place of the dtype.
BOUND = {torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def _serve(spec: sidp.FFNSpec, striped: bool, xs: list[torch.Tensor], fuse: bool) -> tuple[list[torch.Tensor], object]:
    """Requests that wait before their server starts, one of each rank but the owner; the server's statistics."""
    size = spec.dtype.itemsize
    geometry = C.CasGeometry(WORLD, 2, ROWS, spec.hidden_size * size, spec.hidden_size * (4 if striped else size))
    blocks = [torch.zeros(geometry.bytes + 256, dtype=torch.uint8) for _ in range(WORLD)]
    regions = [(block.data_ptr() + 255) // 256 * 256 for block in blocks]
    for region in regions:
        geometry.write_header(region, POOL_ID)
    common = {"geometry": geometry, "pool_id": POOL_ID, "striped": striped, "regions": regions, "watch": None}
    w = weights_of(spec, 0)
    whole = {name: (w[name].data_ptr(), w[name].shape[1], False) for name in ("gate", "up", "down")}
    held = C.FfnSlice(spec.hidden_size, spec.intermediate_size, "silu", cas.dtype_name(spec.dtype), **whole)
    empty = C.FfnSlice(
        spec.hidden_size, 0, "silu", cas.dtype_name(spec.dtype), (0, 0, False), (0, 0, False), (0, 0, False)
    )
    remote = [C.RemoteLayer(spec.hidden_size, cas.dtype_name(spec.dtype), 0)]
    requesters = [C.CasRequester(rank, layers=remote, **common) for rank in range(1, WORLD)]
    ys = [torch.empty_like(x) for x in xs]
    tickets = [
        requester.submit(0, x.data_ptr(), y.data_ptr(), x.shape[0], 10.0)
        for requester, x, y in zip(requesters, xs, ys, strict=True)
    ]
    blas = C.open_blas(cas_cpu.blas_libraries())
    # In `striped` all owners answer; the others hold nothing of the intermediate dimension.
    owners = range(WORLD) if striped else range(1)
    servers = [C.CasServer(rank, layers=[empty if rank else held], blas=blas, fuse=fuse, **common) for rank in owners]
    for requester, ticket in zip(requesters, tickets, strict=True):
        requester.finish(ticket, 20.0)
    for server in servers:
        server.stop()
    return ys, servers[0].stats()


@pytest.mark.parametrize("striped", [False, True])
@pytest.mark.parametrize("dtype", list(BOUND))
def test_a_batch_of_four_gives_what_each_gives_alone(dtype, striped):
    spec = sidp.FFNSpec(320, 1000, dtype=dtype)
    xs = [rows_of(spec, rows, seed=rows) for rows in (1, 3, 8, 5)]
    fused, together = _serve(spec, striped, xs, fuse=True)
    alone, apart = _serve(spec, striped, xs, fuse=False)
    assert (together.batches, together.fused_batches, together.rows) == (1, 1, 17)
    assert (apart.batches, apart.fused_batches, apart.rows) == (4, 0, 17)
    w = {name: tensor.double() for name, tensor in weights_of(spec, 0).items()}
    for x, y, z in zip(xs, fused, alone, strict=True):
        reference = formula(x.double(), w, spec)
        assert error(y, z.double()) <= BOUND[dtype]
        assert max(error(y, reference), error(z, reference)) <= BOUND[dtype] / 2 + 5e-6
