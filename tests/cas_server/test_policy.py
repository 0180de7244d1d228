"""The policy's arithmetic, its hysteresis, and a pool that switches by it."""

from __future__ import annotations

import time

import pytest
import torch
from groups import error, exact, open_pool, policy_model, rows_of

import sidp
from launch import parallel_launch
from sidp import policy
from sidp._native import C
from sidp.profile import FFNTimes, MachineProfile


def test_times_between_the_points():
    table = C.TimeTable([(1, 1.0), (3, 2.0), (10, 9.0)])
    assert [table.at(rows) for rows in (0.5, 1, 2, 3, 10, 20)] == pytest.approx([1, 1, 1.5, 2, 9, 18])
    for points in ([], [(2, 1.0), (1, 1.0)], [(1, 0.0)]):
        with pytest.raises(sidp.ConfigError):
            C.TimeTable(points)


def test_the_crossing_is_where_the_modes_cost_the_same():
    model = policy_model()
    crossing = policy.crossover_rows(model)
    assert crossing is not None and crossing > 1
    for rows, was_is_better in ((crossing - 1, False), (crossing, True)):
        _, was, cas = C.predict(model, rows)
        assert (was <= cas) == was_is_better
    assert policy.crossover_rows(policy_model(link=1e15)) == 1
    assert policy.crossover_rows(policy_model(link=1e3), limit=128) is None


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
    chooser = C.ModePolicy(policy_model())
    modes, clock = _drive(chooser, 1, 20, {"was": 60e-3, "cas": 9e-3}, 0.0)
    assert modes[0] == "was" and modes[-1] == "cas"
    modes, clock = _drive(chooser, 4096, 20, {"was": 1.0, "cas": 1.7}, clock)
    assert modes[-1] == "was"
    assert chooser.switches == 2
    assert "WaS" in chooser.reason and "4096 rows" in chooser.reason


def test_every_decision_says_why():
    chooser = C.ModePolicy(policy_model())
    assert chooser.reason == "" and chooser.decisions == []
    _, clock = _drive(chooser, 1, 20, {"was": 60e-3, "cas": 9e-3}, 0.0)
    runs = chooser.decisions
    assert [run.first for run in runs] == [0, *(run.last + 1 for run in runs[:-1])] and runs[-1].last == 19
    words = [run.text for run in runs]
    assert "dwells" in words[0] and any("to be confirmed" in text for text in words)
    assert [run.mode for run in runs if "switched" in run.text] == ["cas"]
    assert "cas at 1 rows, the other mode does not promise enough" in words[-1] and words[-1] == chooser.reason
    for rows in range(1, 400):
        _, clock = _drive(chooser, 1 if rows % 2 else 4096, 7, {"was": 60e-3, "cas": 9e-3}, clock)
    assert len(chooser.decisions) <= 32  # and not one for each of 3,000 iterations


def test_a_pinned_mode_holds_until_it_is_let_go():
    chooser = C.ModePolicy(policy_model())
    chooser.pin("cas")
    modes, clock = _drive(chooser, 4096, 6, {"was": 1.0, "cas": 1.7}, 0.0)
    assert set(modes) == {"cas"} and chooser.best_is_cas(4096) and "pinned" in chooser.reason
    chooser.pin("")
    modes, _ = _drive(chooser, 4096, 20, {"was": 1.0, "cas": 1.7}, clock)
    assert modes[-1] == "was"
    with pytest.raises(sidp.ConfigError, match="fast"):
        chooser.pin("fast")


def test_a_wrong_guess_is_taken_back_and_not_repeated():
    chooser = C.ModePolicy(policy_model())
    modes, _ = _drive(chooser, 1, 300, {"was": 60e-3, "cas": 200e-3}, 0.0)  # CaS promises 7 ms and takes 200
    assert modes[-1] == "was"
    assert chooser.switches == 2
    assert modes.count("cas") < 30


def test_a_small_promise_changes_nothing():
    model = policy_model()
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
    return worst, stats.calls, stats.mode_switches, stats.pauses, stats.decisions


def test_auto_takes_cas_where_the_link_is_slow(monkeypatch):
    monkeypatch.setenv("SIDP_CPU_LINK_GBPS", "0.05")  # 4 units of 0.8 MB: 63 ms an iteration
    for worst, calls, switches, pauses, decisions in parallel_launch(_auto_with_a_slow_link, 2, timeout=120):
        assert decisions[0].startswith("iterations 0-") and any("switched" in text for text in decisions)
        assert worst < 5e-6
        assert calls["cas"] > 0 and calls["was"] > 0
        assert switches >= 1 and pauses >= 1


def _back_from_cas(ctx):
    """Bytes fetched while in CaS, and stalls of the iterations after the switch back."""
    spec = sidp.FFNSpec(64, 256, dtype=torch.float32)
    specs = [spec] * 8
    with open_pool(specs, mode="auto") as pool:
        x, seen = rows_of(spec, 1), []

        def iterate(mode: str, iterations: int):
            pool.chooser.pin(mode)
            for _ in range(iterations):
                for layer in range(8):
                    time.sleep(0.003)  # of a layer outside its FFN; a fetch takes 0.4 ms at the cap
                    sidp.ffn_forward(x, pool, layer)
            return pool.stats()

        for _ in range(3):
            iterate("was", 2)
            iterate("cas", 1)  # what was under way ends
            before = pool.stats()
            during = iterate("cas", 3)
            iterate("was", 1)  # the first one is cold
            warm, after = pool.stats(), iterate("was", 4)
            seen.append((during.fetches - before.fetches, after.fetches - warm.fetches, after.stalls - warm.stalls))
        restarts = pool.stats().restarts
    return seen, restarts


def test_the_link_is_free_in_cas_and_the_prefetch_is_warm_after_it(monkeypatch):
    monkeypatch.setenv("SIDP_CPU_LINK_GBPS", "0.5")
    monkeypatch.setenv("SIDP_SLOTS", "2")
    for seen, restarts in parallel_launch(_back_from_cas, 2, timeout=120):
        assert restarts == 0
        for in_cas, in_was, _ in seen:
            assert in_cas == 0 and in_was >= 4 * 4 - 2
        assert min(stalls for *_, stalls in seen) <= 4  # 16 uses; a loaded machine may be late now and then


def _cas_touches_no_slot(ctx):
    spec = sidp.FFNSpec(32, 64, dtype=torch.float32)
    with open_pool([spec] * 8, mode="cas") as pool:
        for layer in range(8):
            sidp.ffn_forward(rows_of(spec, 1), pool, layer)
        untouched = pool.stats()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # what CaS does not take
            remote = next(layer for layer in range(8) if not pool.placement.local(layer, pool.rank))
            sidp.ffn_forward(rows_of(spec, 1), pool, remote)
        stats = pool.stats()
    return untouched.fetches, untouched.ring_bytes, stats.slots, stats.ring_bytes > 0, stats.fetches > 0


def test_mode_cas_has_one_slot_and_fills_it_only_when_it_must():
    assert parallel_launch(_cas_touches_no_slot, 2) == [(0, 0, 1, True, True)] * 2
