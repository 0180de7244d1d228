"""Every BLAS that CaS looks for: torch's own, numpy's, scipy-openblas32, and what SIDP_BLAS names."""

from __future__ import annotations

import importlib.util
import threading
import time
from pathlib import Path

import pytest
import torch
from groups import error, exact, formula, open_pool, rows_of, weights_of

import sidp
from launch import parallel_launch
from sidp import cas, cas_cpu
from sidp._native import C


def _library(package: str) -> str:
    found = [path for path in cas_cpu.blas_libraries() if f"/{package}" in path]
    if not found:
        there = importlib.util.find_spec(package.split(".")[0]) is not None
        pytest.skip(f"{package} {'brings no library with an sgemm' if there else 'is not installed'}")
    return found[0]


@pytest.fixture(params=["torch/lib", "numpy.libs", "scipy_openblas32"])
def library(request, monkeypatch) -> str:
    monkeypatch.delenv("SIDP_BLAS", raising=False)
    return _library(request.param)


def _slice(spec: sidp.FFNSpec, w: dict[str, torch.Tensor], transposed: bool):
    matrices = {name: w[name].T.contiguous() if transposed else w[name] for name in ("gate", "up", "down")}
    entries = {name: (m.data_ptr(), m.shape[1], transposed) for name, m in matrices.items()}
    made = C.FfnSlice(spec.hidden_size, spec.intermediate_size, spec.activation, cas.dtype_name(spec.dtype), **entries)
    return made, matrices


def _run(piece, blas, x: torch.Tensor) -> torch.Tensor:
    x = x.float().contiguous()
    y = torch.empty_like(x)
    C.run_slice(piece, blas, x.data_ptr(), x.shape[0], y.data_ptr())
    return y


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_computes_the_formula(library, dtype, transposed):
    blas = C.open_blas([library])
    assert blas.name.startswith(library)
    for hidden, inner, rows in ((33, 65, 1), (256, 700, 17), (96, 1025, 128)):
        spec = sidp.FFNSpec(hidden, inner, dtype=dtype)
        w, x = weights_of(spec, 0), rows_of(spec, rows)
        piece, _keep = _slice(spec, w, transposed)
        reference = formula(x.double(), {name: tensor.double() for name, tensor in w.items()}, spec)
        assert error(_run(piece, blas, x), reference) < 5e-6


def test_two_threads_at_once(library):
    """As the server's thread and the application's own."""
    blas, spec = C.open_blas([library]), sidp.FFNSpec(128, 512, dtype=torch.float32)
    wrong: list[int] = []

    def work(layer: int) -> None:
        piece, _keep = _slice(spec, weights_of(spec, layer), False)
        for rows in range(1, 60):
            x = rows_of(spec, rows, seed=rows)
            if error(_run(piece, blas, x), exact(x, spec, layer)) >= 5e-6:
                wrong.append(rows)

    threads = [threading.Thread(target=work, args=(layer,)) for layer in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and wrong == []


def _group(ctx, placement: str):
    spec = sidp.FFNSpec(64, 200, dtype=torch.bfloat16, bias=True)
    with open_pool([spec] * 4, mode="cas", placement=placement, slots=1) as pool:
        worst = 0.0
        for layer in range(4):
            x = rows_of(spec, 9, seed=layer)
            worst = max(worst, error(sidp.ffn_forward(x, pool, layer), exact(x, spec, layer)))
        end = time.monotonic() + 30  # the other rank may not have asked yet
        while not pool.stats().requests_served and time.monotonic() < end:
            time.sleep(0.01)
        return worst, pool.stats().calls["cas"], pool.stats().requests_served


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_a_group_serves_with_the_one_that_was_named(library, placement, monkeypatch):
    monkeypatch.setenv("SIDP_BLAS", library)
    for worst, sent, served in parallel_launch(_group, 2, placement, timeout=60):
        assert worst < 2**-7 and sent > 0 and served > 0


def _refused(ctx):
    try:
        _group(ctx, "layer")
    except sidp.SidpError as refusal:
        return type(refusal).__name__, str(refusal)


@pytest.mark.parametrize("name", ["missing.so", "no_blas.so"])
def test_a_library_that_is_none_is_named(name, tmp_path, monkeypatch):
    path = tmp_path / name
    if name == "no_blas.so":  # a library, but without an sgemm
        path.symlink_to(Path(C.__file__))
    monkeypatch.setenv("SIDP_BLAS", str(path))
    for kind, text in parallel_launch(_refused, 2, timeout=60):
        assert kind == "ConfigError" and str(path) in text and "SIDP_BLAS" in text
