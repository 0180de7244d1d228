"""The answers of a `sidp run-batch`, for benches that compare two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class Answered(NamedTuple):
    """What a run gave for one request: its text, the number of its tokens, and why it ended."""

    text: str
    tokens: int
    reason: str


def answers_of(output: Path) -> dict[str, Answered]:
    """By custom_id; rows that were refused or failed are left out."""
    answers = {}
    for line in output.read_text().splitlines():
        answer = json.loads(line)
        if answer["error"] is None:
            body = answer["response"]["body"]
            choice = body["choices"][0]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            tokens = body["usage"]["completion_tokens"]
            answers[answer["custom_id"]] = Answered(text, tokens, choice["finish_reason"])
    return answers
