"""What the policy of GPUs decides without a GPU: the mode of a graph that is being captured."""

from __future__ import annotations

import pytest
import torch
from groups import policy_model

from sidp import policy_cuda
from sidp.cas_cuda import Sent
from sidp.policy_cuda import CudaPolicy


@pytest.mark.parametrize(("lazily", "rows", "expected"), [(False, 1, True), (False, 1 << 16, False), (True, 1, False)])
def test_a_graph_takes_cas_only_where_kernels_are_loaded_at_the_start(monkeypatch, lazily, rows, expected):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(policy_cuda, "loads_lazily", lambda: lazily)
    chooser = CudaPolicy(policy_model(), lambda: Sent(0, 0, 0, 0.0))
    assert [chooser.enter(layer, rows) for layer in range(8)] == [expected] * 8
