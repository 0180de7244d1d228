"""Decode steps that read the paged cache in place: what the host works out. The kernels are test_paged_attention.py's, the graphs
tests/gpu/test_run_batch_cuda.py's."""

import time

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sidp.batch import decode  # noqa: E402

PAGE = 16


def test_sizes_are_rounded_up_by_a_fifth_at_most_to_few_values():
    sizes = {decode.round_up(count, 10_000) for count in range(1, 1025)}
    assert len(sizes) <= 8 + 4 * 7
    for count in range(1, 1025):
        rounded = decode.round_up(count, 10_000)
        assert count <= rounded <= max(count, 1.25 * count) and decode.round_up(rounded, 10_000) == rounded
        assert decode.round_up(count, count) == count


def capture_all(sizes, steps):
    """Steps of so many rows, each size being captured when it is laid out for the second time; the sizes laid out."""
    captured, seen, laid_out = set(), set(), []
    for rows in steps:
        laid_out.append(sizes.choose(rows, captured))
        (captured if laid_out[-1] in seen else seen).add(laid_out[-1])
    return laid_out, captured


def test_a_batch_that_empties_is_run_with_few_graphs():
    steps = [140] * 40 + list(range(139, 0, -2))
    laid_out, captured = capture_all(decode.Sizes(140, exact=False), steps)
    assert all(size >= rows for size, rows in zip(laid_out, steps, strict=True))
    assert 140 in captured and len(captured) <= 3


def test_a_size_that_stays_gets_its_own_graph():
    laid_out, captured = capture_all(decode.Sizes(512, exact=False), [512, 512, 512, *[300] * 100])
    assert laid_out[3:20] == [512] * 17 and laid_out[-50:] == [320] * 50 and captured == {512, 320}
    far, _ = capture_all(decode.Sizes(512, exact=False), [512, 512, 512, *[20] * 20])
    assert far.index(20) < 12  # sooner where much is wasted


def test_sizes_of_a_batch_with_fixed_groups_depend_on_the_batch_alone():
    laid_out, _ = capture_all(decode.Sizes(140, exact=True), [140, 140, 140, 60, 33])
    assert laid_out == [140, 140, 140, 64, 40]


class FakeEngine:
    """What DecodeSteps takes over of a manager, with steps that are laid out by hand."""

    def __init__(self, limit: int, width: int):
        self.filled: list[str] = []
        self.maybe_pad_inputs = None
        self.pad_inputs, self.compute_stream, self.use_block_table = False, None, True
        self.block_table = torch.full((1, limit, width), -1, dtype=torch.int32)
        self.cb_config = type("Config", (), {"max_requests_per_batch": limit})
        self.pages: dict[str, list[int]] = {}
        self.model_runner = self.inputs_and_outputs = self.cache = self.batch_processor = self

    def fill_block_table(self, request, past, new, row):
        self.filled.append(request)
        held = self.pages[request][: -(-(past + new) // PAGE)]
        row[0, : len(held)] = torch.tensor(held, dtype=torch.int32)

    def compute_batch(self, model, batch_data):
        pass

    def prepare_batch_update(self):
        return []

    def supports_logits_to_keep(self, model):
        return False

    def get_cb_kwargs(self):
        return ()

    def _forward_process_and_sample(self, model, batch_data):
        pass

    def step(self, requests: dict[str, int]) -> list[list[int]]:
        """A decode step of requests with so many tokens each, the new one included; the pages that the device is given."""
        self.filled = []
        rows, _ = self.maybe_pad_inputs(len(requests), 0, True)
        for request, length in requests.items():
            self.fill_block_table(request, length - 1, 1, None)
        self.block_table.fill_(-1)  # the engine does, before every step
        self.num_q_tokens = rows
        future = type("Future", (), {})
        self.requests_in_batch = []
        for length in requests.values():
            self.requests_in_batch.append(future())
            self.requests_in_batch[-1].state = type("State", (), {"position_offset": length})
        self.compute_batch(None, {})
        tables = self.block_table[0, : len(requests)].tolist()
        return [table[: -(-length // PAGE)] for table, length in zip(tables, requests.values(), strict=True)]


def test_pages_are_looked_up_only_where_a_request_or_its_number_of_pages_is_new():
    engine = FakeEngine(limit=8, width=4)
    real = engine.fill_block_table
    steps = decode.DecodeSteps(engine, None, PAGE, True, True)
    assert engine.fill_block_table != real and not steps.captures
    engine.pages = {"a": [3, 4], "b": [7], "c": [1, 2, 5]}
    looked_up: list[str] = []
    steps._fill_other = lambda request, *rest: (looked_up.append(request), real(request, *rest))

    def pages(requests):
        looked_up.clear()
        return engine.step(requests)

    assert pages({"a": 5, "b": 6, "c": 33}) == [[3], [7], [1, 2, 5]] and looked_up == ["a", "b", "c"]
    assert pages({"a": 6, "b": 7, "c": 34}) == [[3], [7], [1, 2, 5]] and looked_up == []
    assert pages({"a": 17, "b": 8, "c": 35}) == [[3, 4], [7], [1, 2, 5]] and looked_up == ["a"]
    assert pages({"a": 18, "c": 36}) == [[3, 4], [1, 2, 5]] and looked_up == ["c"]  # moved up a row
    # c is out of the batch for a step and comes back to other pages.
    assert pages({"a": 19}) == [[3, 4]] and looked_up == []
    engine.pages["c"] = [6, 0, 9]
    assert pages({"a": 20, "c": 36}) == [[3, 4], [6, 0, 9]] and looked_up == ["c"]
    # A step with a prompt in it goes another way, and anything may have changed.
    engine.maybe_pad_inputs(100, 0, False)
    engine.pages["a"] = [8, 2]
    assert pages({"a": 21, "c": 37}) == [[8, 2], [6, 0, 9]] and looked_up == ["a", "c"]


def test_steps_are_counted_and_timed_by_kind_from_the_end_of_the_one_before():
    engine = FakeEngine(limit=8, width=4)
    steps = decode.DecodeSteps(engine, None, PAGE, False, True)
    engine.pages = {"a": [0], "b": [1]}
    begin = time.perf_counter()
    engine.use_block_table, engine.num_q_tokens = False, 20  # a prompt, and one laid out ahead of its end
    engine.requests_in_batch = []
    engine.compute_batch(None, {})
    engine.use_block_table = True
    engine.step({"a": 3, "b": 4})
    time.sleep(0.02)
    engine.prepare_batch_update()
    time.sleep(0.01)
    engine.prepare_batch_update()
    time.sleep(0.05)  # nothing runs
    engine.step({"a": 4, "b": 5})
    engine.prepare_batch_update()
    told, took = steps.times, time.perf_counter() - begin
    assert (told["prompt_steps"], told["launched_steps"], told["replayed_steps"], told["captures"]) == (1, 2, 0, 0)
    assert told["prompt_step_seconds"] >= 0.02 and told["launched_step_seconds"] >= 0.01
    assert told["prompt_step_seconds"] + told["launched_step_seconds"] <= took - 0.05


def test_an_engine_with_two_sets_of_inputs_keeps_its_own_table_of_pages():
    engine, sets = FakeEngine(limit=8, width=4), [FakeEngine(limit=8, width=4) for _ in range(2)]
    engine.io_pairs = [type("Pair", (), {"host_io": host})() for host in sets]
    engine.current_pair = 0
    fill = engine.fill_block_table
    steps = decode.DecodeSteps(engine, None, PAGE, True, False)
    assert engine.fill_block_table == fill
    for turn, requests in enumerate((["a"], ["a", "b", "c"])):
        engine.current_pair = turn % 2
        host = sets[engine.current_pair]
        host.num_q_tokens, _ = engine.maybe_pad_inputs(len(requests), 0, True)
        host.requests_in_batch = [
            type("Future", (), {"state": type("State", (), {"position_offset": 40 + turn})}) for _ in requests
        ]
        engine.compute_batch(None, {})
        # 40 keys: three pages of 16, rounded up to an even number.
        assert list(steps._seen)[-1] == (turn, len(requests), 4)
    assert steps.times["launched_steps"] == 0  # their tokens were not asked for yet
    engine.prepare_batch_update(), engine.prepare_batch_update()
    assert steps.times["launched_steps"] == 2


class FakePool:
    """An active pool in mode "auto" that takes WaS, unless told."""

    active, captures_cas = True, True

    def __init__(self):
        self.chooser, self.pinned = self, None

    def best(self, rows):
        return "was"

    def expected(self, rows):
        return 0.0, 1.0, 1.0

    def pin(self, mode):
        self.pinned = mode

    def check(self):
        pass


def replay(pool, exact, count):
    """So many steps, captured in graphs that take as long as their mode says: the DecodeSteps, modes of replays in order."""
    engine, order = FakeEngine(limit=8, width=4), []
    engine.pages = {"a": [0]}
    steps = decode.DecodeSteps(engine, pool, PAGE, True, exact)
    steps.captures = True

    class Graph:
        def __init__(self, mode):
            self.mode = mode

        def replay(self):
            order.append(self.mode)
            time.sleep({"was": 4e-3, "cas": 1e-3}.get(self.mode, 0))

    def capture(key, args, stream):
        assert (pool.pinned or "") == key[-1]
        steps._graphs[key] = Graph(pool.pinned), {}

    steps._capture = capture
    for _ in range(count):
        engine.step({"a": 3})
        engine.prepare_batch_update()
    return steps, order


def test_where_the_pool_may_take_either_mode_both_are_captured_and_the_faster_is_replayed():
    pool = FakePool()
    steps, order = replay(pool, exact=False, count=45)
    assert order[0] == "was" and order.count("was") == 12 and set(order[-15:]) == {"cas"}
    assert {key[-1] for key in steps._graphs} == {"was", "cas"} and pool.pinned is None
    figures = steps.figures()
    assert (figures["cas_up_to_rows"], figures["was_from_rows"]) == (1, 0) and figures["launched_steps"] == 3


def test_in_fixed_groups_no_mode_depends_on_timing():
    steps, order = replay(FakePool(), exact=True, count=10)
    assert order == [None] * 8 and len(steps._graphs) == 1


def test_a_mode_that_cannot_be_captured_leaves_the_other_one(monkeypatch):
    """Where the memory ends in the middle of a trial, steps go back to the graphs that there are."""

    class NoMemory:
        def capture_begin(self, **_):
            raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", NoMemory)
    pool = FakePool()
    pool.best = lambda rows: "cas"
    steps = decode.DecodeSteps(FakeEngine(limit=8, width=4), pool, PAGE, True, False)
    steps.captures = True
    monkeypatch.setattr(steps, "_count", lambda: {})
    stream = type("Stream", (), {"synchronize": lambda self: None})()
    assert steps._trials.mode(4) == "cas"
    steps._capture((0, 4, 2, "cas"), (), stream)
    assert not steps.captures and steps._trials.mode(4) == "was"
