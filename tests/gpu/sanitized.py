"""A small run of the ring for compute-sanitizer: eager, captured, mixed, both kinds of hand-over."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from test_was_cuda import FFNSpec, capture, forward, inputs, pool_of, reference, weights_of

for kind in ("events", "words"):
    os.environ["SIDP_HAND_OVER"] = kind
    spec = FFNSpec(256, 704)
    weights = weights_of(spec, layers=5)
    with pool_of(spec, weights, host_tier=True, slots=2) as pool:
        x = inputs(0)
        assert torch.equal(forward(x, pool), reference(x, weights, spec))
        graph, y = capture(pool, x)
        for seed in range(3):
            x.copy_(inputs(seed))
            graph.replay()
            assert torch.equal(y, reference(x, weights, spec))
            assert torch.equal(forward(x, pool), reference(x, weights, spec))
        del graph
