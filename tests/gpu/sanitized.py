"""A small run of the ring for compute-sanitizer: eager, captured, mixed, both kinds of hand-over. `tiny` makes it tinier."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch

import chain
from chain import FFNSpec, capture, forward, inputs, pool_of, reference, weights_of

tiny = sys.argv[1:] == ["tiny"]
if tiny:
    chain.HIDDEN = 64
layers, rounds = (4, 1) if tiny else (5, 3)
for kind in ("events", "words"):
    os.environ["SIDP_HAND_OVER"] = kind
    spec = FFNSpec(chain.HIDDEN, 96 if tiny else 704)
    weights = weights_of(spec, layers=layers)
    with pool_of(spec, weights, host_tier=True, slots=2) as pool:
        x = inputs(0, rows=3)
        assert torch.equal(forward(x, pool), reference(x, weights, spec))
        graph, y = capture(pool, x)
        for seed in range(rounds):
            x.copy_(inputs(seed, rows=3))
            graph.replay()
            assert torch.equal(y, reference(x, weights, spec))
            assert torch.equal(forward(x, pool), reference(x, weights, spec))
        del graph
