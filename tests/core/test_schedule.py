"""Fetch order, slots and tickets, exhaustively: no incast, no slot reused before its reader is done, no deadlock."""

import itertools

import pytest

from sidp._native import C

WORLDS = range(1, 10)


def placement_of(world, layers, kind="layer"):
    unit = C.UnitLayout([C.TensorLayout("up", 64, 4, 2, "rows", 1)])
    return C.Placement(kind, [unit] * layers, world)


def cases():
    for world in WORLDS:
        for layers in {world, 2 * world, 3 * world + 1, 4 * world - 1}:
            for slots in range(1, 2 * world + 1):
                yield world, layers, slots


@pytest.mark.parametrize("world", range(2, 10))
def test_every_wave_of_a_full_cycle_is_a_permutation_of_owners(world):
    placement = placement_of(world, 3 * world)
    for slots in range(world - 1, 2 * world + 1):
        schedules = [C.FetchSchedule(placement, rank, slots) for rank in range(world)]
        for cycle, wave in itertools.product(range(3), range(world - 1)):
            owners = []
            for schedule in schedules:
                index = schedule.order[cycle * (world - 1) + wave]
                layer = schedule.layer(index)
                assert layer // world == cycle
                owners.append(placement.owner(layer))
            assert sorted(owners) == list(range(world)), (slots, cycle, wave)


@pytest.mark.parametrize("peak_shifting", [True, False])
def test_order_is_a_permutation_within_windows_and_slots_are_static(peak_shifting):
    for world, layers, slots in cases():
        placement = placement_of(world, layers)
        for rank in range(world):
            schedule = C.FetchSchedule(placement, rank, slots, peak_shifting)
            remote = [layer for layer in range(layers) if layer % world != rank] if world > 1 else []
            assert [schedule.layer(i) for i in range(schedule.num_remote)] == remote
            assert sorted(schedule.order) == list(range(len(remote)))
            if not peak_shifting:
                assert schedule.order == list(range(len(remote)))
            for i, layer in enumerate(remote):
                assert schedule.slot(i) == i % slots
                assert schedule.remote_index(layer) == i


@pytest.mark.parametrize("world", range(2, 10))
def test_a_fetch_waits_only_for_uses_that_can_happen_before_it(world):
    """Runs queue against uses, one forward after another: never stuck, never over an unread slot, never read unfetched."""
    for layers, slots in itertools.product({world, 2 * world, 3 * world + 1, 4 * world - 1}, range(1, 2 * world + 1)):
        placement = placement_of(world, layers)
        for rank in range(world):
            schedule = C.FetchSchedule(placement, rank, slots)
            run_forwards(schedule, forwards=3)


def run_forwards(schedule, forwards):
    queue = C.FetchQueue(schedule)
    content = [None] * schedule.slots  # ticket whose bytes a slot holds
    released = [-1] * schedule.slots
    pending = queue.next()
    for ticket in range(forwards * schedule.num_remote):
        index = ticket % schedule.num_remote
        assert queue.expected_index(ticket) == index
        slot = schedule.slot(index)
        while content[slot] != ticket:
            assert pending.after is None or pending.after <= released[pending.slot], (
                "deadlock: the reader waits for itself"
            )
            assert content[pending.slot] is None or content[pending.slot] <= released[pending.slot], (
                "overwrites unread bytes"
            )
            assert schedule.slot(pending.index) == pending.slot
            content[pending.slot] = pending.ticket
            pending = queue.next()
        released[slot] = ticket


@pytest.mark.parametrize("world", range(2, 10))
def test_after_a_restart_the_queue_goes_on_from_the_asked_layer(world):
    placement = placement_of(world, 3 * world + 1)
    for slots in range(1, 2 * world + 1):
        schedule = C.FetchSchedule(placement, world - 1, slots)
        for start in range(schedule.num_remote):
            queue = C.FetchQueue(schedule)
            planned = [queue.next().ticket for _ in range(slots)]
            first = queue.restart(start, [-1] * slots)
            assert first > max(planned), "a ticket of the old plan could be taken for one of the new"
            order = [queue.next() for _ in range(2 * schedule.num_remote - start)]
            assert order[0].index == start and order[0].ticket == first
            assert sorted(f.ticket for f in order) == list(range(first, first + len(order)))
            for fetch in order:
                assert queue.expected_index(fetch.ticket) == fetch.index
            by_slot = {}
            for fetch in order:
                last = by_slot.get(fetch.slot)
                assert fetch.after == last and (last is None or last < fetch.ticket)
                by_slot[fetch.slot] = fetch.ticket


@pytest.mark.parametrize("world", range(2, 10))
@pytest.mark.parametrize("kind", ["layer", "striped"])
@pytest.mark.parametrize(("fetch_time", "bound"), [(0.5, 0.0), (0.8, 0.02), (1.0, 0.04)])
def test_default_slots_hide_fetches_no_longer_than_a_layers_compute(world, kind, fetch_time, bound):
    """In units of a layer's compute: stall time over compute time, after the first forward, of the slowest rank."""
    layers = 8 * world
    placement = placement_of(world, layers, kind)
    for rank in range(world):
        schedule = C.FetchSchedule(placement, rank, C.default_slots(placement, rank))
        assert stall_share(placement, schedule, rank, layers, fetch_time) <= bound, (rank, schedule.slots)


def stall_share(placement, schedule, rank, layers, fetch_time, forwards=6):
    queue = C.FetchQueue(schedule)
    ready, released = {}, {}
    link_free = now = stalled = 0.0
    ticket = 0
    pending = queue.next()
    for use in range(forwards * layers):
        layer = use % layers
        if placement.local(layer, rank):
            now += 1.0
            continue
        while (pending.after is None or pending.after in released) and pending.ticket <= ticket + 4 * layers:
            free = 0.0 if pending.after is None else released[pending.after]
            link_free = ready[pending.ticket] = max(link_free, free) + fetch_time
            pending = queue.next()
        late = max(0.0, ready[ticket] - now)
        stalled += late if use >= layers else 0.0
        now += late + 1.0
        released[ticket] = now
        ticket += 1
    return stalled / ((forwards - 1) * layers)
