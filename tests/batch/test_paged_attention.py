"""Attention of decode steps over a paged cache, against float64."""

import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from sidp.batch import paged_attention  # noqa: E402

PAGE, PAGES = 128, 40
DEVICE, DTYPE, BOUND = ("cuda", torch.bfloat16, 0.01) if torch.cuda.is_available() else ("cpu", torch.float32, 1e-6)


def cache_of(lengths, kv_heads, width):
    """(keys, values, table, ends) of requests whose pages lie anywhere in a cache; a length of 0 only fills up the batch."""
    order = random.sample(range(PAGES), PAGES)
    table = torch.full((len(lengths), 9), -1, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for place in range(-(-length // PAGE)):
            table[row, place] = order.pop()
    keys, values = torch.randn(2, PAGES, PAGE, kv_heads, width, device=DEVICE, dtype=DTYPE)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return keys, values, table.to(DEVICE), ends.to(DEVICE)


def places(table, row, length):
    at = torch.arange(length)
    return table[row].cpu()[at // PAGE].long(), at % PAGE


@pytest.mark.parametrize("parts, indexed", [(1, False), (2, False), (64, False), (1, True), (5, True)])
@pytest.mark.parametrize(
    "heads, kv_heads, width", [(4, 4, 128), (20, 4, 128), (8, 1, 64), (6, 2, 80), (34, 2, 16)],
    ids=["one head a group", "groups of five", "one key head", "a width that is no power of two", "groups of more than 16"],
)  # fmt: skip
def test_every_request_attends_to_all_of_its_keys(monkeypatch, heads, kv_heads, width, parts, indexed):
    lengths = [1, PAGE - 1, PAGE, PAGE + 1, random.randrange(2, 6 * PAGE), 5 * PAGE, 0]
    monkeypatch.setattr(paged_attention, "_PROGRAMS", parts * kv_heads * len(lengths))
    keys, values, table, ends = cache_of(lengths, kv_heads, width)
    query = torch.randn(len(lengths), heads, width, device=DEVICE, dtype=DTYPE)
    pages = table
    if indexed:
        every = [page * PAGE + at for page, at in (places(table, row, length) for row, length in enumerate(lengths))]
        pages = torch.cat(every).to(DEVICE)
    got = paged_attention.attend(query, keys, values, pages, ends, 6 * PAGE, width**-0.5)
    assert got.shape == query.shape and got.dtype == DTYPE
    assert not got[-1].any()
    for row, length in enumerate(lengths[:-1]):
        k, v = (t[places(table, row, length)].double().repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
        weights = (torch.einsum("hd,khd->hk", query[row].double(), k) * width**-0.5).softmax(-1)
        expected = torch.einsum("hk,khd->hd", weights, v)
        assert (got[row].double() - expected).norm() <= BOUND * expected.norm(), f"row {row} of {length} keys"


def test_a_large_score_overflows_nowhere():
    keys, values, table, ends = cache_of([3 * PAGE], 1, 64)
    query = 300 * torch.sign(keys[table[0, 1].item(), 7, 0]).view(1, 1, 64)
    got = paged_attention.attend(query, keys, values, table, ends, 3 * PAGE, 1.0)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[0, 0], values[table[0, 1].item(), 7, 0])  # the key that the query points at wins


def test_the_newest_key_and_value_are_written_to_their_place_alone():
    lengths = [1, PAGE, PAGE + 1, 200, 0]
    keys, values, table, ends = cache_of(lengths, 3, 80)
    before = keys.clone(), values.clone()
    # As the engine has them: [heads, tokens, width] seen from the tokens.
    new_keys, new_values = (
        torch.randn(3, len(lengths), 80, device=DEVICE, dtype=DTYPE).transpose(0, 1) for _ in range(2)
    )
    paged_attention.append(new_keys, new_values, keys, values, table, ends)
    for cache, old, new in ((keys, before[0], new_keys), (values, before[1], new_values)):
        for row, length in enumerate(lengths[:-1]):
            old[table[row, (length - 1) // PAGE].item(), (length - 1) % PAGE] = new[row]
        assert torch.equal(cache, old)
