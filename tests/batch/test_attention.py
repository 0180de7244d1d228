"""The attention of GPU runs behind transformers' interface, with the kernel of prompts replaced by its definition in float64."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("triton")

from test_engine import END, VOCABULARY, finish, greedy, options, ticket  # noqa: E402

from sidp.batch import attention, paged_attention  # noqa: E402
from sidp.batch.engine import PagedEngine  # noqa: E402
from sidp.batch.text import Codec  # noqa: E402

PROMPTS = ["hello", "a", "some longer prompt here", "xyz " * 10, "12345", "q"]


def by_definition(query, key, value, query_ends, key_ends, longest_query, longest_key, scale, window):
    """Softmax over each sequence's own keys, causal from its last key on."""
    out = torch.empty_like(query)
    groups = query.shape[1] // key.shape[1]
    assert longest_query == query_ends.diff().max()
    # Requests with one token that are computed apart may have had the longest keys.
    assert longest_key == max(key_ends.diff().max(), attention.step.single_longest if attention.step.single else 0)
    assert query_ends[-1] == len(query) and key_ends[-1] == len(key)
    for n in range(len(query_ends) - 1):
        q = query[query_ends[n] : query_ends[n + 1]].double()
        k, v = (t[key_ends[n] : key_ends[n + 1]].double().repeat_interleave(groups, 1) for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        behind = torch.arange(len(k)) - (torch.arange(len(q)) + len(k) - len(q)).unsqueeze(1)
        hidden = (behind > 0) | ((behind <= -window) if window else torch.zeros_like(behind, dtype=torch.bool))
        probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[query_ends[n] : query_ends[n + 1]] = torch.einsum("hqk,khd->qhd", probabilities, v).to(out.dtype)
    return out


def make_model(kind, **fields):
    torch.manual_seed(11)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=0.2, **fields,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("batch_tokens", [16, 512], ids=["prompts in pieces", "prompts whole"])
@pytest.mark.parametrize("kind, fields", [("Llama", {}), ("Mistral", {"sliding_window": 9})], ids=["llama", "window"])
def test_tokens_are_those_of_a_plain_forward(monkeypatch, kind, fields, batch_tokens):
    calls, in_place, attend = [], [], paged_attention.attend

    def counted(*arguments):
        calls.append(arguments[0].shape[0])
        return by_definition(*arguments)

    def counted_in_place(*arguments):
        in_place.append((arguments[3].dim(), arguments[-2]))
        return attend(*arguments)

    monkeypatch.setattr(attention, "kind", lambda model: "torch")
    monkeypatch.setattr(attention, "_flash", counted)
    monkeypatch.setattr(paged_attention, "attend", counted_in_place)
    monkeypatch.setattr(attention, "DECODE_PAGE", 16)
    model = make_model(kind, **fields)
    engine = PagedEngine(
        copy.deepcopy(model), Codec(None, {END}, 128, VOCABULARY), options(grouped=False, batch_tokens=batch_tokens)
    )
    try:
        done = finish(engine, [ticket(i, prompt, limit=5 + 3 * i) for i, prompt in enumerate(PROMPTS)])
    finally:
        engine.close()
    assert done == {i: greedy(model, prompt, 5 + 3 * i) for i, prompt in enumerate(PROMPTS)}
    # Where every layer sees all keys, decode steps read the cache in place, over the pages of the longest request, or one more;
    # and beside prompts the requests that have theirs do.
    assert {longest for dim, longest in in_place if dim == 2} == ({32, 64} if kind == "Llama" else set())
    assert batch_tokens == 512 or any(dim == 1 for dim, _ in in_place) == (kind == "Llama")
    assert max(calls) > 4 and max(calls) <= batch_tokens  # several sequences in one call, as many rows as are allowed


def test_a_forward_beside_the_engine_is_the_models_own(monkeypatch):
    model = make_model("Llama")
    ids = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids).logits
        attention.use_torch_flash(model)
        assert attention.NAME in model.config._attn_implementation
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
