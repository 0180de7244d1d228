"""The policy's arithmetic, its hysteresis, and a pool that switches by it."""

from __future__ import annotations

import pytest
import torch
from groups import error, exact, open_pool, rows_of

import sidp
from launch import parallel_launch
from sidp import policy
from sidp._native import C
from sidp.profile import FFNTimes, MachineProfile


def _model(link: float = 1e9, compute=((1, 1e-3), (64, 2e-3), (128, 4e-3))):
    model = C.PolicyModel()
    model.layers, model.remote_layers = 8, 6
    model.fetch_bytes, model.link_bytes_per_s = 60e6, link  # 60 ms at 1 GB/s
    model.round_trip_s, model.row_bytes = 1e-4, 1e3
    model.compute = C.TimeTable(list(compute))
    return model


def test_times_between_the_points():
    table = C.TimeTable([(1, 1.0), (3, 2.0), (10, 9.0)])
    assert [table.at(rows) for rows in (0.5, 1, 2, 3, 10, 20)] == pytest.approx([1, 1, 1.5, 2, 9, 18])
    for points in ([], [(2, 1.0), (1, 1.0)], [(1, 0.0)]):
        with pytest.raises(sidp.ConfigError):
            C.TimeTable(points)


def test_the_crossing_is_where_the_modes_cost_the_same():
    model = _model()
    crossing = policy.crossover_rows(model)
    assert crossing is not None and crossing > 1
    for rows, was_is_better in ((crossing - 1, False), (crossing, True)):
        _, was, cas = C.predict(model, rows)
        assert (was <= cas) == was_is_better
    assert policy.crossover_rows(_model(link=1e15)) == 1
    assert policy.crossover_rows(_model(link=1e3), limit=128) is None


def _drive(chooser, rows: int, iterations: int, seconds: dict[str, float], clock: float) -> tuple[list[str], float]:
    """Iterations that take what `seconds` says for the mode they run in; the mode of each."""
    modes = []
    for _ in range(iterations):
        for layer in range(8):
            chooser.enter(layer, rows, clock)
            clock += seconds[chooser.mode] / 8
            chooser.leave(clock)
        modes.append(chooser.mode)
    return modes, clock


def test_switches_down_and_back_with_the_rows():
    chooser = C.ModePolicy(_model())
    modes, clock = _drive(chooser, 1, 20, {"was": 60e-3, "cas": 9e-3}, 0.0)
    assert modes[0] == "was" and modes[-1] == "cas"
    modes, clock = _drive(chooser, 4096, 20, {"was": 1.0, "cas": 1.7}, clock)
    assert modes[-1] == "was"
    assert chooser.switches == 2
    assert "WaS" in chooser.reason and "4096 rows" in chooser.reason


def test_a_wrong_guess_is_taken_back_and_not_repeated():
    chooser = C.ModePolicy(_model())
    modes, _ = _drive(chooser, 1, 300, {"was": 60e-3, "cas": 200e-3}, 0.0)  # CaS promises 7 ms and takes 200
    assert modes[-1] == "was"
    assert chooser.switches == 2
    assert modes.count("cas") < 30


def test_a_small_promise_changes_nothing():
    model = _model()
    crossing = policy.crossover_rows(model)
    chooser = C.ModePolicy(model)
    modes, _ = _drive(chooser, crossing - 1, 50, {"was": 60e-3, "cas": 58e-3}, 0.0)
    assert set(modes) == {"was"}


def test_the_policy_takes_its_own_shape_from_a_machine_profile(tmp_path):
    path = tmp_path / "profile.json"
    units = [sidp.FFNSpec(64, 256, dtype=torch.float32).unit()]
    other = FFNTimes(64, 256, True, (1, 8), (1e-3, 2e-3))  # bfloat16
    mine = FFNTimes(64, 256, True, (1, 8), (3e-3, 4e-3), torch.float32)
    MachineProfile("here", 12.5e9, ffn_times=(other, mine)).save(path)
    assert policy.Profile.load(path, units) == policy.Profile(12.5, ((1, 3e-3), (8, 4e-3)))
    MachineProfile("here", 0, round_trip_s=7e-6, ffn_times=(mine,)).save(path)
    assert policy.Profile.load(path, units) == policy.Profile(0, ((1, 3e-3), (8, 4e-3)), 7e-6)
    MachineProfile("here", 12.5e9, ffn_times=(other,)).save(path)
    with pytest.raises(sidp.ConfigError, match="no ffn_times for hidden_size=64"):
        policy.Profile.load(path, units)


def _plain_auto(ctx):
    specs = [sidp.FFNSpec(32, 64, dtype=torch.float32)] * 8
    with open_pool(specs, mode="auto") as pool:
        for layer in range(8):
            sidp.ffn_forward(rows_of(specs[0], 1), pool, layer)
        return pool.stats().calls["cas"], pool._dispatch is None


def test_without_a_cap_or_a_profile_auto_is_was(monkeypatch):
    for name in ("SIDP_CPU_LINK_GBPS", "SIDP_CPU_OWNER_GBPS", "SIDP_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    assert parallel_launch(_plain_auto, 2) == [(0, True)] * 2


def _auto_with_a_slow_link(ctx):
    spec = sidp.FFNSpec(128, 512, dtype=torch.float32)
    specs = [spec] * 8
    worst = 0.0
    with open_pool(specs, mode="auto", slots=1) as pool:
        references = [exact(rows_of(spec, 1), spec, layer) for layer in range(8)]
        for _ in range(12):
            for layer in range(8):
                worst = max(worst, error(sidp.ffn_forward(rows_of(spec, 1), pool, layer), references[layer]))
        stats = pool.stats()
    return worst, stats.calls, stats.mode_switches, stats.pauses


def test_auto_takes_cas_where_the_link_is_slow(monkeypatch):
    monkeypatch.setenv("SIDP_CPU_LINK_GBPS", "0.05")  # 4 units of 0.8 MB: 63 ms an iteration
    for worst, calls, switches, pauses in parallel_launch(_auto_with_a_slow_link, 2, timeout=120):
        assert worst < 5e-6
        assert calls["cas"] > 0 and calls["was"] > 0
        assert switches >= 1 and pauses >= 1
