"""The native simulator on small cases that a hand can compute: seconds and bytes to the last digit."""

import pytest

from sidp._native import C
from sidp.errors import ConfigError

MB = 10**6


def placement_of(world, layers, kind="layer"):
    unit = C.UnitLayout([C.TensorLayout("up", 64 * world, 15625, 1, "rows", 1)])
    return C.Placement(kind, [unit] * layers, world)


def job_of(placement, world, *, reach="was", slots=2, ffn=1.0, rest=0.0, link=MB, requests=None, iterations=2):
    job = C.SimJob()
    for part, seconds in (("ffn", ffn), ("serve", ffn), ("rest", rest), ("once", 0)):
        setattr(job.compute, part, C.TimeTable([(n, seconds or 1e-12) for n in (1, 10**6)]))  # whatever the rows
    job.fabric.ingress_bytes_per_s = job.fabric.egress_bytes_per_s = link
    job.options.reach = getattr(C.SimReach, reach)
    job.slots, job.kv_tokens = [slots] * world, [10**6] * world
    job.requests = requests or [C.SimRequest(0, 1, iterations, rank=rank) for rank in range(world)]
    return job


def simulate(world, layers, kind="layer", **rest):
    placement = placement_of(world, layers, kind)
    return placement, C.simulate(placement, job_of(placement, world, **rest))


def test_local_iterations_take_their_compute():
    _, result = simulate(2, 4, reach="local", rest=0.5, iterations=3)
    assert result.end_s == pytest.approx(3 * 4 * 1.5)
    assert [r.iterations for r in result.ranks] == [3, 3]


def test_one_rank_alone_waits_for_its_first_fetch_and_no_other():
    """D=2, one reader: layers 1, 3 are owner 1's, 1 s of bytes each. Rank 0 computes 0 (0-1 s) while 1 comes (0-2 s)."""
    placement = placement_of(2, 4)
    nbytes = placement.unit(1).bytes
    job = job_of(placement, 2, link=nbytes / 2, requests=[C.SimRequest(0, 1, 1, rank=0)], slots=2)
    result = C.simulate(placement, job)
    # layer 0: 0-1; layer 1: there at 2, 2-3; layer 2: 3-4; layer 3: there at 4, 4-5
    assert result.end_s == pytest.approx(5.0)
    assert result.ranks[0].stall_s == pytest.approx(1.0)


def test_two_readers_of_one_owner_share_its_egress():
    """D=3, plain order, 1 slot. Ranks 1 and 2 read layer 0 from owner 0 together, so each gets half its rate."""
    placement = placement_of(3, 3)
    nbytes = placement.unit(0).bytes
    job = job_of(placement, 3, slots=1, ffn=100.0, link=nbytes, iterations=1)
    job.options.peak_shifting = False
    result = C.simulate(placement, job)
    assert result.crowded_s[0] == pytest.approx(2.0)
    assert result.ranks[1].stall_s >= 2.0 - 1e-9


def test_owners_that_take_turns_do_not_slow_the_first_reader():
    placement = placement_of(3, 3)
    nbytes = placement.unit(0).bytes
    job = job_of(placement, 3, slots=1, ffn=100.0, link=nbytes, iterations=1)
    job.options.peak_shifting, job.fabric.turns = False, True
    result = C.simulate(placement, job)
    assert min(result.ranks[1].stall_s, result.ranks[2].stall_s) == pytest.approx(1.0)


def test_incast_costs_what_it_says():
    placement = placement_of(3, 3)
    nbytes = placement.unit(0).bytes
    job = job_of(placement, 3, slots=1, ffn=100.0, link=nbytes, iterations=1)
    job.options.peak_shifting, job.fabric.incast = False, 0.5
    assert C.simulate(placement, job).crowded_s[0] == pytest.approx(3.0)  # 2 s of bytes at 1 / 1.5


def copying_job(world, readers, ffn=1e-9):
    """D ranks and layers, plain order, 1 slot, units of a second's egress, and computing that takes long or none."""
    placement = placement_of(world, world)
    nbytes = placement.unit(0).bytes
    requests = [C.SimRequest(0, 1, 1, rank=rank) for rank in readers]
    job = job_of(placement, world, slots=1, ffn=ffn, link=nbytes, requests=requests)
    job.options.peak_shifting = False
    return placement, job, nbytes


def change_fabric(job, **change):
    for name, value in change.items():
        setattr(job.fabric, name, value)


def test_a_slice_costs_its_reader_a_pause():
    """One reader, one remote layer, ten slices: a second of bytes and ten pauses of 0.1 s."""
    placement, job, nbytes = copying_job(2, [0])
    change_fabric(job, slice_bytes=nbytes / 10, slice_pauses=[0.1])
    assert C.simulate(placement, job).end_s == pytest.approx(2.0)


def test_an_owner_gives_out_a_slice_while_another_reader_pauses():
    """Ranks 1 and 2 read layer 0: ten slices each of 0.1 s, and one of them pauses while the other is served."""
    placement, job, nbytes = copying_job(3, [1, 2], ffn=100.0)
    change_fabric(job, slice_bytes=nbytes / 10, slice_pauses=[0.1])
    assert C.simulate(placement, job).crowded_s[0] == pytest.approx(2.0)
    change_fabric(job, slice_pauses=[0.3])
    assert C.simulate(placement, job).crowded_s[0] == pytest.approx(10 * 0.4)


def test_ranks_that_start_apart_stay_out_of_each_others_way():
    """Ranks 1 and 2 read layer 0, a second each: together two seconds of crowding, two seconds apart none."""
    placement, job, _ = copying_job(3, [1, 2], ffn=100.0)
    assert C.simulate(placement, job).crowded_s[0] == pytest.approx(2.0)
    job.starts = [0.0, 0.0, 2.0]
    result = C.simulate(placement, job)
    assert result.crowded_s[0] == 0
    assert result.ranks[2].stall_s == pytest.approx(2.0)  # a second for each of its remote layers, from its own start


def test_who_waits_wakes_late():
    placement, job, _ = copying_job(2, [0])
    job.options.wake_s = 0.25
    result = C.simulate(placement, job)
    assert result.end_s == pytest.approx(1.25)
    assert result.ranks[0].stall_s == pytest.approx(1.25)


def test_computing_takes_the_measured_multiples():
    placement = placement_of(2, 4)
    job = job_of(placement, 2, iterations=50)
    job.options.reach = C.SimReach.cas
    job.fabric.ingress_bytes_per_s = job.fabric.egress_bytes_per_s = 0
    job.requests = [C.SimRequest(0, 1, 50, rank=0)]
    job.options.compute_factors = [1.5]
    assert C.simulate(placement, job).end_s == pytest.approx(
        50 * (2 * 1.5 + 2)
    )  # own layers; the owner serves at its own pace
    job.options.compute_factors = [1.0, 2.0]
    assert C.simulate(placement, job).end_s == pytest.approx(50 * (2 * 1.5 + 2), rel=0.1)


def test_ranks_in_step_begin_every_layer_together():
    """D=2, 2 layers, WaS, one slow link: rank 1 has no request, yet rank 0 waits for it, or it for rank 0, at every layer."""
    placement = placement_of(2, 2)
    nbytes = placement.unit(0).bytes
    job = job_of(placement, 2, slots=1, ffn=1.0, link=nbytes / 3, requests=[C.SimRequest(0, 1, 1, rank=0)])
    free = C.simulate(placement, job)
    assert free.end_s == pytest.approx(3 + 1)  # layer 0 beside the fetch of layer 1
    job.options.step = C.SimStep.layer
    stepped = C.simulate(placement, job)
    assert stepped.end_s == pytest.approx(4 + 1)  # rank 1 fetched layer 0 until 3 and computed it until 4
    assert stepped.ranks[1].idle_iterations == 1


def test_a_pipelines_stages_work_at_once():
    """Two batches of one request in two stages of 2 s: the second batch follows the first by a stage."""
    placement = placement_of(1, 4)
    requests = [C.SimRequest(0, 1, 2, rank=0) for _ in range(2)]
    job = job_of(placement, 1, reach="local", requests=requests)
    job.options.stages = 2
    assert C.simulate(placement, job).end_s == pytest.approx(2 * 4 + 2)


@pytest.mark.parametrize(("fuse", "batches"), [(True, 2), (False, 3)])
def test_a_server_fuses_what_waits(fuse, batches):
    """Ranks 1, 2 and 3 ask owner 0 at once: the first request is served alone, the two that wait meanwhile together."""
    placement = placement_of(4, 4)
    requests = [C.SimRequest(0, 1, 1, rank=rank) for rank in (1, 2, 3)]
    job = job_of(placement, 4, reach="cas", ffn=1.0, rest=1.0, link=0, requests=requests)
    job.options.fuse = fuse
    result = C.simulate(placement, job)
    assert result.ranks[0].requests_served == 3
    assert result.ranks[0].batches_served == batches


def test_an_owner_that_computes_serves_at_half_its_speed():
    """D=2, 2 layers. Both compute 'rest' (1 s); rank 1 then asks owner 0, which runs its own layer 0 (1 s) beside it."""
    _, result = simulate(2, 2, reach="cas", rest=1.0, link=0, iterations=1)
    assert result.end_s == pytest.approx(6.0)  # 1, then 2 together; then 1, and 2 together with rank 1's layer


def test_requests_wait_for_kv_room():
    placement = placement_of(1, 2)
    requests = [C.SimRequest(0, 10, 10, rank=0) for _ in range(4)]
    job = job_of(placement, 1, reach="local", requests=requests)
    job.kv_tokens = [40]  # two at a time
    result = C.simulate(placement, job)
    assert result.ranks[0].most_kv_tokens == 40
    assert result.ranks[0].iterations == 20
    assert sorted(result.finished_s) == pytest.approx([20, 20, 40, 40])


def test_prompts_go_in_chunks():
    placement = placement_of(1, 1)
    job = job_of(placement, 1, reach="local", requests=[C.SimRequest(0, 100, 1, rank=0)])
    job.compute.ffn = C.TimeTable([(1, 1.0), (64, 1.0), (65, 1000.0)])
    job.options.batched_tokens = 40
    assert C.simulate(placement, job).end_s == pytest.approx(3.0)


def test_requests_arrive_later():
    placement = placement_of(2, 2)
    job = job_of(placement, 2, reach="local", requests=[C.SimRequest(5.0, 1, 1), C.SimRequest(0.0, 1, 1)])
    assert sorted(C.simulate(placement, job).finished_s) == pytest.approx([2.0, 7.0])


def test_idle_ranks_in_lockstep_run_for_nothing():
    placement = placement_of(2, 2)
    job = job_of(placement, 2, reach="was", requests=[C.SimRequest(0, 1, 3, rank=0)])
    job.options.step = C.SimStep.iteration
    result = C.simulate(placement, job)
    assert (result.ranks[1].idle_iterations, result.ranks[1].iterations) == (3, 0)


def test_a_gather_is_beside_the_compute_of_the_layer_before():
    placement = placement_of(4, 4, "striped")
    nbytes = placement.unit(0).bytes
    job = job_of(placement, 4, reach="gather", ffn=1.0, link=nbytes * 3 / 4 / 2, iterations=1)
    assert C.simulate(placement, job).end_s == pytest.approx(2 + 4 * 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda job: setattr(job, "slots", [1]), "as many slots"),
        (lambda job: setattr(job, "kv_tokens", [1, 1]), "never fits"),
        (lambda job: setattr(job.options, "stages", 2), "mode local"),
        (lambda job: setattr(job.options, "jitter", 1.0), "jitter"),
        (lambda job: setattr(job.options, "reach", C.SimReach.auto), "policies"),
        (lambda job: setattr(job.options, "compute_factors", [1.0, -1.0]), "compute_factors"),
        (lambda job: setattr(job.options, "wake_s", -1.0), "wake_s"),
        (lambda job: setattr(job, "starts", [0.0]), "starts"),
        (lambda job: change_fabric(job, slice_bytes=0.5), "slice_bytes"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    placement = placement_of(2, 2)
    job = job_of(placement, 2)
    change(job)
    with pytest.raises(ConfigError, match=words):
        C.simulate(placement, job)
