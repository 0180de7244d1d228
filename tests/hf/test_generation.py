"""Models and ways of generating beside the plain decoder: encoder-decoders, and transformers' continuous batching."""

from __future__ import annotations

import models
import torch
import transformers

from launch import parallel_launch
from sidp import PoolConfig, pool_model

_SMALL = {"vocab_size": models.VOCAB, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
_T5 = {**_SMALL, "d_ff": 48, "d_kv": 8, "num_layers": 4, "num_heads": 4}
_BART = {**_SMALL, "bos_token_id": 1, "encoder_layers": 2, "decoder_layers": 4, "encoder_ffn_dim": 48}
_BART.update(decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4)


def _encoder_decoders(ctx) -> list[tuple[str, str | None, int, bool]]:
    transformers.logging.set_verbosity_error()
    configs = [
        transformers.T5Config(**_T5),
        transformers.T5Config(**_T5, feed_forward_proj="gated-gelu"),
        transformers.BartConfig(**_BART),
    ]
    seen = []
    for config in configs:
        torch.manual_seed(0)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
        inputs = {**models.prompt(ctx.rank), "max_new_tokens": 6, "do_sample": False}
        expected = model.generate(**inputs)
        with pool_model(model, config=PoolConfig(slots=1, timeout_s=30)) as pool:
            formula = pool.formula(0)
            same = torch.equal(model.generate(**inputs), expected)
        seen.append((config.model_type, formula and formula.activation, pool.num_layers, same))
    return seen


def test_the_decoder_of_an_encoder_decoder_is_pooled():
    expected = [("t5", "relu", 4, True), ("t5", "gelu_new", 4, True), ("bart", None, 4, True)]
    assert parallel_launch(_encoder_decoders, 2, timeout=120) == [expected, expected]


def _continuous_batching(ctx) -> bool:
    model = models.build("llama")
    settings = transformers.ContinuousBatchingConfig(num_blocks=32, block_size=16, max_batch_tokens=64)
    options = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
    prompts = models.prompt(ctx.rank, rows=4 + ctx.rank)["input_ids"].tolist()

    def tokens():
        results = model.generate_batch(inputs=prompts, generation_config=options, continuous_batching_config=settings)
        return [result.generated_tokens for result in results.values()]

    expected = tokens()
    assert len(expected) == len(prompts)
    with pool_model(model, config=PoolConfig(slots=1, timeout_s=30)):
        return tokens() == expected


def test_continuous_batching_runs_over_a_pool():
    assert parallel_launch(_continuous_batching, 2, timeout=120) == [True, True]
