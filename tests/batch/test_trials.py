"""Which mode captured decode steps take: what is run, in which order, and what follows from it."""

import pytest

from sidp.batch.trials import ModeTrials


def run(trials, rows, seconds, steps=200):
    """Replays `steps` steps of so many rows that take seconds[mode] each; the modes they took."""
    modes = []
    for _ in range(steps):
        modes.append(trials.mode(rows))
        trials.add(rows, modes[-1], seconds[modes[-1]])
    return modes


def trials(best="was", fetch_s=0.1, was_s=1.0, cas_s=1.5):
    return ModeTrials(lambda rows: best, lambda rows: (fetch_s, was_s, cas_s))


@pytest.mark.parametrize("best", ["was", "cas"])
@pytest.mark.parametrize("faster", ["was", "cas"])
def test_both_modes_are_run_and_the_faster_one_stays_whatever_was_expected(best, faster):
    compared = trials(best)
    modes = run(compared, 64, {"was": 1.0, "cas": 0.9 if faster == "cas" else 1.1})
    assert modes[0] == best and set(modes[:40]) == {"was", "cas"} and set(modes[40:]) == {faster}
    assert (compared.cas_up_to, compared.was_from) == ((64, None) if faster == "cas" else (0, 64))


def test_what_is_found_holds_for_sizes_on_its_side():
    compared = trials()
    run(compared, 128, {"was": 1.0, "cas": 2.0})
    run(compared, 16, {"was": 1.0, "cas": 0.5})
    assert set(run(compared, 512, {"was": 9.0, "cas": 1.0})) == {"was"}
    assert set(run(compared, 4, {"was": 1.0, "cas": 9.0})) == {"cas"}
    assert set(run(compared, 64, {"was": 1.0, "cas": 1.2})) == {"was", "cas"}  # between them nothing is known
    assert (compared.cas_up_to, compared.was_from) == (16, 64)


def test_a_draw_goes_to_the_mode_whose_results_are_bit_identical():
    assert run(trials("cas"), 64, {"was": 1.0, "cas": 0.99})[-1] == "was"


def test_cas_that_is_expected_to_be_far_slower_is_not_run():
    compared = trials("was", was_s=1.0, cas_s=4.0)
    assert set(run(compared, 8, {"was": 1.0, "cas": 0.1})) == {"was"} and compared.was_from is None


def test_was_is_not_run_where_its_fetches_alone_take_longer_than_steps_by_cas():
    compared = trials("cas", fetch_s=1.0, was_s=1.0, cas_s=0.2)
    assert set(run(compared, 8, {"was": 0.1, "cas": 1.0})) == {"cas"} and compared.cas_up_to == 8
    compared = trials("cas", fetch_s=0.9, was_s=9.0, cas_s=0.1)  # however little is expected of it
    assert run(compared, 8, {"was": 0.95, "cas": 1.0})[-1] == "was"


def test_a_slow_step_after_a_switch_and_one_that_was_disturbed_do_not_decide():
    compared, left = trials(), {"was": 0, "cas": 0}
    before = None
    for step in range(60):
        mode = compared.mode(32)
        left[mode] = 0 if mode != before else left[mode] + 1
        seconds = 50.0 if left[mode] < 2 or step == 9 else {"was": 1.0, "cas": 0.8}[mode]
        compared.add(32, mode, seconds)
        before = mode
    assert compared.cas_up_to == 32


def test_steps_of_the_other_mode_that_were_under_way_are_not_counted():
    compared = trials()
    for _ in range(6):
        compared.add(32, compared.mode(32), 1.0)
    assert compared.mode(32) == "cas"
    for _ in range(50):
        compared.add(32, "was", 1.0)
    assert compared.mode(32) == "cas"


@pytest.mark.parametrize("mode", ["was", "cas"])
def test_where_one_mode_is_ruled_out_the_other_one_stays(mode):
    compared = trials()
    compared.mode(32)
    compared.rule_out(mode, 32)
    other = "was" if mode == "cas" else "cas"
    assert set(run(compared, 32, {mode: 0.1, other: 1.0})) == {other}
