"""Decode steps that read the paged cache in place: what the host works out, and how parts are joined. The kernel and the graphs
are tests/gpu/test_run_batch_cuda.py's."""

import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sidp.batch import attention, decode  # noqa: E402

PAGE, WIDTH = 16, 8


def test_sizes_are_rounded_up_by_a_fifth_at_most_to_few_values():
    sizes = {decode.round_up(count, 10_000) for count in range(1, 1025)}
    assert len(sizes) <= 8 + 4 * 7
    for count in range(1, 1025):
        rounded = decode.round_up(count, 10_000)
        assert count <= rounded <= max(count, 1.25 * count) and decode.round_up(rounded, 10_000) == rounded
        assert decode.round_up(count, count) == count


def reference_pages(query, keys, values, plan, page, scale):
    """What the kernel gives for every page, in float64; +inf and zeros where a page has no keys."""
    outputs, log_sums = [], []
    for n, (start, used) in enumerate(zip(plan.starts.tolist(), plan.used.tolist(), strict=False)):
        q = query[n * plan.group : (n + 1) * plan.group].double()
        k, v = keys[start : start + used].double(), values[start : start + used].double()
        scores = torch.einsum("ghd,khd->hgk", q, k) * scale
        log_sum = scores.logsumexp(-1) if used else torch.full(scores.shape[:2], float("inf"), dtype=torch.float64)
        weights = scores.softmax(-1) if used else scores
        outputs.append(torch.einsum("hgk,khd->ghd", weights, v))
        log_sums.append(log_sum)
    return torch.cat(outputs).to(query.dtype), torch.cat(log_sums, dim=1)


@pytest.mark.parametrize("heads", [2, 6])
def test_parts_of_pages_join_to_the_attention_over_all_keys(monkeypatch, heads):
    monkeypatch.setattr(attention, "_flash_pages", reference_pages)
    rng = random.Random()
    kv_heads, lengths = 2, [1, PAGE, PAGE + 1, 3 * PAGE - 1, rng.randrange(1, 4 * PAGE)]
    most = -(-max(lengths) // PAGE)
    order = rng.sample(range(20), 20)
    table = torch.full((len(lengths) + 2, 6), -1, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for place in range(-(-length // PAGE)):
            table[row, place] = order.pop()
    keys, values = torch.randn(2, 20 * PAGE, kv_heads, WIDTH, dtype=torch.float64)
    query = torch.randn(len(lengths) + 2, heads, WIDTH, dtype=torch.float64)
    ends = torch.tensor([0, *lengths, 0, 0]).cumsum(0)  # two rows only fill up the batch
    plan = attention.plan_decode(table, ends, most, PAGE, heads // kv_heads)
    got = attention.attend(query, keys, values, plan, PAGE, WIDTH**-0.5)

    def expected(row, queries):
        index = [int(table[row, at // PAGE]) * PAGE + at % PAGE for at in range(lengths[row])]
        k, v = (t[index].repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
        weights = (torch.einsum("hd,khd->hk", queries, k) * WIDTH**-0.5).softmax(-1)
        return torch.einsum("hk,khd->hd", weights, v), index[-1]

    for row in range(len(lengths)):
        output, slot = expected(row, query[row])
        torch.testing.assert_close(got[row], output)
        assert plan.slots[row] == slot and plan.real[row]
    for row in (-2, -1):  # finite, and writing where row 0 writes
        assert not plan.real[row] and plan.slots[row] == plan.slots[0]
        torch.testing.assert_close(got[row], expected(0, query[row])[0])
