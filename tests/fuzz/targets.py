"""What takes bytes from outside, as fuzz targets: each takes any bytes and returns, or the reader is wrong.

A refusal is the reader's own error class with a reason; anything else that it raises is a bug.
"""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from pathlib import Path

from sidp.batch.records import BadRow, Defaults, Request, parse_row
from sidp.control import _FRAME, ControlPlane, _parse_failure
from sidp.errors import ConfigError, LayoutError, PeerError, SidpError
from sidp.membership import Identity

CORPUS = Path(__file__).parent / "corpus"


def lines(data: bytes) -> None:
    """A line of a batch's input: a request, or an error that can be answered."""
    row = parse_row(data, 7, Defaults())
    assert (row.request is None) != (row.error is None)
    assert row.key == parse_row(data, 7, Defaults()).key and row.custom_id
    if row.error is not None:
        assert isinstance(row.error, BadRow) and str(row.error)
        return
    request = row.request
    assert request == Request.from_json(request.to_json())  # what the spool holds is what was read
    assert 0 <= request.temperature <= 2 and 0 <= request.top_p <= 1 and request.cost() >= 0


def safetensors(data: bytes) -> None:
    """A checkpoint's file: readable within its bounds, or a ConfigError that names it."""
    import torch

    from sidp.hf.checkpoint import Checkpoint

    with tempfile.TemporaryDirectory(prefix="sidp-fuzz-") as folder:  # not in shared memory: a fuzzer may be killed
        (Path(folder) / "model.safetensors").write_bytes(data)
        try:
            checkpoint = Checkpoint(Path(folder))
        except ConfigError as error:
            assert "model.safetensors" in str(error)
            return
        with contextlib.closing(checkpoint):
            for key in checkpoint.keys()[:4]:
                shape = checkpoint.shape(key)
                size = 1
                for n in shape:
                    size *= n
                if not shape or size > len(data) * 8:
                    assert not shape or size == 0  # a tensor of more elements than the file has bits was let in
                    continue
                with contextlib.suppress(ConfigError):
                    part = checkpoint.read(key, tuple(slice(0, n) for n in shape))
                    assert part.shape == torch.Size(shape)


def index(data: bytes) -> None:
    """The index of a sharded checkpoint: it names files of its folder, or a ConfigError names it."""
    from sidp.hf.checkpoint import Checkpoint

    with tempfile.TemporaryDirectory(prefix="sidp-fuzz-") as folder:
        (Path(folder) / "model.safetensors.index.json").write_bytes(data)
        with contextlib.suppress(ConfigError):
            Checkpoint(Path(folder)).close()


class _Plane:
    token = bytes(16)


def control(data: bytes) -> None:
    """What a peer publishes in the store: an identity, a frame of an exchange, a failure."""
    if not data:
        return
    kind, rest = data[0] % 3, data[1:]
    if kind == 0:
        with contextlib.suppress(LayoutError):
            identity = Identity.decode(rest, 1)
            assert 0 < identity.pid < 1 << 31 and len(identity.boot_id) == 32
            identity.native()
    elif kind == 1:
        try:
            payload = ControlPlane._unpack(_Plane, rest, 1, "step")
        except (LayoutError, PeerError) as error:
            assert "rank 1" in str(error)
        else:
            assert rest.endswith(payload) and len(payload) == len(rest) - _FRAME.size - len("step")
    else:
        error = _parse_failure(rest, 4)
        assert isinstance(error, SidpError)
        assert not isinstance(error, PeerError) or 0 <= error.rank < 4


TARGETS = {"lines": lines, "safetensors": safetensors, "index": index, "control": control}


def seeds(name: str) -> list[bytes]:
    """Good inputs, made afresh, and what the corpus keeps."""
    kept = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
    return kept + {"lines": _lines, "safetensors": _safetensors, "index": _index, "control": _control}[name]()


def _lines() -> list[bytes]:
    body = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 3}
    rows = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": 3, "body": json.dumps({"prompt": [1, 2], "stop": ["x"], "top_k": 2.0, "seed": -1})},
        {"prompt": ["x"], "temperature": 0.5, "top_p": 1, "ignore_eos": True, "n": 1, "tools": [], "logit_bias": {}},
    ]
    return [json.dumps(row).encode() for row in rows]


def _safetensors() -> list[bytes]:
    header = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
        "__metadata__": {"format": "pt"},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)) + text + bytes(range(24)), struct.pack("<Q", 2) + b"{}"]


def _index() -> list[bytes]:
    return [json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "../x"}}).encode()]


def _control() -> list[bytes]:
    frame = _FRAME.pack(b"SDP1", 1, 4, bytes(16)) + b"step" + b"payload"
    failure = {"type": "PeerError", "message": "gone", "rank": 1, "peer": 2}
    return [b"\0" + Identity.current().encode(), b"\1" + frame, b"\2" + json.dumps(failure).encode()]
