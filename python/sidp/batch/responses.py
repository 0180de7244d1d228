"""The lines that go out: OpenAI's batch output form, one line a request."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from .records import CHAT_URL, BadRow, Request, Row


@dataclass(frozen=True)
class Answer:
    """What was generated: `text` without stop string and special tokens; `reason` is "stop" or "length"."""

    text: str
    reason: str
    prompt_tokens: int
    completion_tokens: int


def success_line(request: Request, answer: Answer, model: str) -> bytes:
    """The output line of a served request, newline included."""
    if request.url == CHAT_URL:
        prefix, kind = "chatcmpl", "chat.completion"
        choice = {"index": 0, "message": {"role": "assistant", "content": answer.text}}
    else:
        prefix, kind = "cmpl", "text_completion"
        choice = {"index": 0, "text": answer.text}
    body = {
        "id": f"{prefix}-{_digits(request.key)}",
        "object": kind,
        "created": int(time.time()),
        "model": request.model or model,
        "choices": [{**choice, "logprobs": None, "finish_reason": answer.reason}],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        },
    }
    return _line(request.key, request.custom_id, 200, body, None)


def error_line(key: str, custom_id: str, error: BadRow, status: int = 400) -> bytes:
    """The output line of a request that was refused (400) or failed here (500).

    The API's error object is where OpenAI has it, in `response.body.error`; `error` repeats code and message, so that a
    reader who looks only there sees it too.
    """
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
    return _line(key, custom_id, status, body, {"code": error.code, "message": str(error)})


def row_error_line(row: Row) -> bytes:
    """`error_line` of a row that never became a request; the message names its place in the input."""
    assert row.error is not None
    error = BadRow(f"line {row.number}: {row.error}", row.error.param, row.error.code)
    return error_line(row.key, row.custom_id, error)


def _line(key: str, custom_id: str, status: int, body: dict, error: dict | None) -> bytes:
    response = {"status_code": status, "request_id": f"req_{_digits(key)}", "body": body}
    line = {"id": key, "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _digits(key: str) -> str:
    return key.rpartition("_")[2]
