"""Both engines on a tiny model: right tokens, per-request ends, sampling that depends on nothing but the request."""

import contextlib
import copy
import dataclasses
import itertools
import json
import time

import numpy
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")

from sidp.batch.engine import EngineOptions, PagedEngine, Ticket  # noqa: E402
from sidp.batch.padded import PaddedEngine  # noqa: E402
from sidp.batch.records import BadRow, Defaults, parse_row  # noqa: E402
from sidp.batch.sampling import RowSampling, choose, gumbel_noise  # noqa: E402
from sidp.batch.text import Codec  # noqa: E402
from sidp.errors import PeerError  # noqa: E402

VOCABULARY, END = 256, 7


@pytest.fixture(scope="module")
def model():
    """float32, so that batches of any composition give the same tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def codec():
    return Codec(None, {END}, 128, VOCABULARY)


def options(**changes):
    base = EngineOptions(grouped=True, max_batch=4, kv_bytes=1 << 20, samples=False, filters=False, mean_cost=20)
    return dataclasses.replace(base, **changes)


ENGINES = {
    "grouped": (PagedEngine, {}),
    "continuous": (PagedEngine, {"grouped": False}),
    "padded": (PaddedEngine, {}),
}


@pytest.fixture(params=ENGINES)
def engine(request, model, codec):
    made = []

    def make(**changes):
        kind, fixed = ENGINES[request.param]
        made.append(kind(copy.deepcopy(model), codec, options(**{**fixed, **changes})))
        return made[-1]

    yield make
    for each in made:
        each.close()


def ticket(item, prompt, limit=12, **fields):
    request = parse_row(json.dumps({"prompt": prompt, **fields}).encode(), item + 1, Defaults()).request
    return Ticket(item, request, list(prompt.encode()), limit)


def finish(engine, tickets, each=4):
    """{item: tokens} of all tickets, submitted as the worker does."""
    waiting, done = list(tickets), {}
    end = time.monotonic() + 60
    while len(done) < len(tickets):
        assert time.monotonic() < end
        room = min(each, engine.room())
        if room > 0 and waiting:
            engine.submit(waiting[:room])
            waiting = waiting[room:]
        for finished in engine.poll(0.05):
            assert finished.error is None
            done[finished.ticket.item] = finished.tokens
    assert engine.in_flight == 0
    return done


def greedy(model, prompt, limit):
    """Step by step without a cache: what every engine must give."""
    tokens = list(prompt.encode())
    with torch.inference_mode():
        for _ in range(limit):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == END:
                break
    return tokens[len(prompt.encode()) :]


PROMPTS = ["hello", "a", "some longer prompt here", "xyz " * 10, "12345", "q"]


def test_greedy_tokens_and_limits(engine, model):
    tickets = [ticket(i, prompt, limit=5 + 3 * i) for i, prompt in enumerate(PROMPTS)]
    made = engine()
    assert finish(made, tickets) == {i: greedy(model, p, 5 + 3 * i) for i, p in enumerate(PROMPTS)}
    assert made.output_tokens == sum(len(greedy(model, p, 5 + 3 * i)) for i, p in enumerate(PROMPTS))
    assert made.figures()["running"] == 0 and made.kv_capacity > 100


def test_ends_at_end_tokens_and_stop_strings(engine, model, codec):
    # A token that the model generates for the first time after a few others.
    prompt, plain, at = next(
        (prompt, tokens, at)
        for prompt, tokens in ((chr(n), greedy(model, chr(n), 12)) for n in range(33, 127))
        for at in range(2, 9)
        if len(tokens) == 12 and tokens[at] not in tokens[:at]
    )
    cut = plain[: at + 1]
    stop, other = ticket(0, prompt, stop=["never", chr(plain[at])]), ticket(1, prompt)
    done = finish(engine(), [stop, other])
    assert done == {0: cut, 1: plain}
    assert codec.answer(stop.request, done[0]) == (codec.decode(cut[:-1]), "stop")
    codec.end_tokens = {plain[at]}
    ended, ignoring = ticket(0, prompt), ticket(1, prompt, ignore_eos=True)
    done = finish(engine(), [ended, ignoring])
    assert done == {0: cut, 1: plain}
    reasons = [codec.answer(t.request, done[t.item])[1] for t in (ended, ignoring)]
    assert reasons == ["stop", "length"]


def test_sampling_depends_on_the_request_alone(engine):
    def draw(order, each):
        tickets = [ticket(i, PROMPTS[i], temperature=1.0, top_p=0.9, seed=i) for i in order]
        return finish(engine(samples=True, filters=True), tickets, each)

    first = draw([0, 1, 2, 3], 4)
    assert first == draw([3, 1, 0, 2], 1)
    tickets = [ticket(0, PROMPTS[0], temperature=1.0, seed=99), ticket(1, PROMPTS[1]), ticket(2, PROMPTS[2])]
    mixed = finish(engine(samples=True), tickets)
    assert mixed[0] != first[0]


def test_greedy_rows_in_a_sampling_batch_stay_greedy(engine, model):
    tickets = [ticket(0, "hello"), ticket(1, "some", temperature=1.5, seed=1), ticket(2, "a")]
    done = finish(engine(samples=True), tickets)
    assert done[0] == greedy(model, "hello", 12) and done[2] == greedy(model, "a", 12)


def test_what_ends_the_engine_is_raised_and_answers_nobody(model, codec, monkeypatch):
    engine = PagedEngine(model, codec, options())
    own, steps = model.forward, itertools.count()

    def forward(*args, **kwargs):
        if next(steps) == 2:
            raise PeerError("rank 1 died", 1)
        return own(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    engine.submit([ticket(0, "hello"), ticket(1, "a")])
    with pytest.raises(PeerError, match="rank 1 died") as raised:
        for _ in range(200):
            assert engine.poll(0.1) == []
    assert raised.value.rank == 1
    engine.close()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "sampled"])
def test_a_small_cache_preempts_and_the_tokens_stay(model, codec, sampling):
    """Room for about one and a half requests: they take turns, and begin anew where they were."""
    block = 2 * 2 * 16 * 4 * 32  # keys and values, layers, head, float32, tokens of a page
    tickets = [ticket(i, "p" * (40 + i), limit=26, **sampling) for i in range(3)]
    done, preemptions = [], []
    for blocks in (4, 64):
        changes = {"kv_bytes": blocks * block, "grouped": False, "samples": bool(sampling)}
        engine = PagedEngine(model, codec, options(**changes))
        done.append(finish(engine, tickets))
        preemptions.append(engine.preemptions)
        engine.close()
    assert preemptions[0] > 0 and preemptions[1] == 0
    assert done[0] == done[1]


def test_requests_wait_until_their_ends_fit_the_cache(model, codec):
    """Longest first, as the board hands them out: many more of the mean length would fit than of the first ones."""
    block = 2 * 2 * 16 * 4 * 32
    tickets = [
        ticket(i, chr(97 + i) * length, limit=30, max_tokens=30, ignore_eos=True)
        for i, length in enumerate([90] * 4 + [50] * 4 + [5] * 16)
    ]
    costs = numpy.array([len(t.prompt) + t.limit for t in tickets])
    changes = {"kv_bytes": 20 * block, "grouped": False, "max_batch": None, "mean_cost": int(costs.mean())}
    with contextlib.closing(PagedEngine(model, codec, options(**changes))) as engine:
        assert engine.request_limit >= 8
        assert engine.fitting(costs) == 5 and engine.fitting(numpy.array([10**6, 1])) == 1  # of 20 pages
        done, at, most, end = {}, 0, 0, time.monotonic() + 60
        while len(done) < len(tickets):
            assert time.monotonic() < end
            count = engine.fitting(costs[at : at + max(0, engine.room())])
            engine.submit(tickets[at : at + count])
            at, most = at + count, max(most, engine.in_flight)
            done |= {finished.ticket.item: finished.tokens for finished in engine.poll(0.05)}
        assert engine.preemptions == 0 and 5 < most <= engine.request_limit
        assert engine.fitting(costs) == 5
    assert all(len(tokens) == 30 for tokens in done.values())


# ---- pure parts -----------------------------------------------------------------------------------------------------


def test_noise_draws_from_the_softmax():
    scores = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).repeat(40_000, 1)
    words = torch.randint(1, 2**31 - 1, (40_000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    drawn = (scores + gumbel_noise(words, 4)).argmax(dim=1).bincount(minlength=4) / 40_000
    assert torch.allclose(drawn, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.01)


def test_top_p_and_top_k_leave_the_likeliest():
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]] * 4))
    rows = [
        RowSampling(1.0, 0.5, 0, 0),
        RowSampling(1.0, 0.6, 0, 0),
        RowSampling(1.0, 0.0, 0, 0),
        RowSampling(1.0, 1.0, 3, 0),
    ]
    kept = (choose(scores, rows) > float("-inf")).sum(dim=1).tolist()
    assert kept == [1, 2, 1, 3]


def test_limits(codec):
    def limit(prompt_tokens, capacity=1000, **fields):
        return codec.limit(ticket(0, "x", **fields).request, prompt_tokens, capacity)

    assert limit(10, max_tokens=5) == 5 and limit(123, max_tokens=5) == 5
    assert limit(100) == 28  # the default is cut to what fits
    for arguments, text in (
        ((124, 1000, 5), "context length"),
        ((10, 12, 5), "KV cache"),
        ((128, 1000, None), "context"),
    ):
        prompt, capacity, given = arguments
        with pytest.raises(BadRow, match=text) as raised:
            limit(prompt, capacity, **({} if given is None else {"max_tokens": given}))
        assert raised.value.code == "context_length_exceeded"


def test_stop_strings_over_several_tokens_are_found_in_the_step_that_ends_them(codec):
    finder = codec.finder(ticket(0, "x", stop=["END", "##"]).request)
    text = "y" * 50 + "EEND tail"
    found = next(n for n in range(1, len(text)) if finder.found(list(text.encode()[:n])))
    assert text[:found].endswith("END")
    assert codec.answer(ticket(0, "x", stop=["END"]).request, list(text.encode())) == ("y" * 50 + "E", "stop")
    assert codec.finder(ticket(0, "x").request) is None
