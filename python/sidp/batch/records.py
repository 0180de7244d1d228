"""The lines that come in: OpenAI batch lines and plain `{"prompt": ...}` lines, checked one by one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"

# Accepted and without effect here; they ask for nothing that would change the answer.
_IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"}
# Refused unless they say what sidp does anyway.
_FIXED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_SAMPLING = {"max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos"}
_PLAIN_NAMES = ("custom_id", "id", "task_id")


class BadRow(ValueError):
    """A row that cannot be served: `code` and `param` as OpenAI's error object has them."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.param = param
        self.code = code


@dataclass(frozen=True)
class Defaults:
    """What a row gets that says nothing. `max_tokens` None: all that the model's context leaves."""

    max_tokens: int | None = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False


@dataclass(frozen=True)
class Request:
    """One valid row. `key` is the output line's id; `prompt` a string or token ids; `messages` for a chat.

    `max_tokens_given` tells a row's own limit, which must fit, from the default, which is cut to what fits.
    """

    key: str
    custom_id: str
    url: str
    prompt: str | list[int] | None
    messages: list[dict[str, str]] | None
    model: str | None
    max_tokens: int | None
    max_tokens_given: bool
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: tuple[str, ...]
    ignore_eos: bool

    @property
    def samples(self) -> bool:
        return self.temperature > 0

    def cost(self) -> int:
        """About how many tokens it will hold at its end; to hand out the longest first."""
        if isinstance(self.prompt, list):
            prompt = len(self.prompt)
        else:
            texts = [self.prompt or ""] if self.messages is None else [m["content"] for m in self.messages]
            prompt = sum(len(text) for text in texts) // 4
        return prompt + (self.max_tokens or 0)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_json(cls, line: bytes) -> Request:
        fields = json.loads(line)
        return cls(**{**fields, "stop": tuple(fields["stop"])})


@dataclass(frozen=True)
class Row:
    """One line of the input. `request` or, where it cannot be served, `error`. `explicit`: the row named itself."""

    key: str
    custom_id: str
    number: int
    explicit: bool
    request: Request | None = None
    error: BadRow | None = None


def row_key(custom_id: str, raw: bytes, occurrence: int = 0) -> str:
    """The `id` of a row's output line: the same for the same row, so that a cut output tells what is done."""
    # surrogatepass: JSON can spell half a surrogate pair, which has no UTF-8
    digest = hashlib.sha256(f"{custom_id}\0{occurrence}\0".encode("utf-8", "surrogatepass") + raw.strip())
    return f"batch_req_{digest.hexdigest()[:24]}"


def parse_row(raw: bytes, number: int, defaults: Defaults, occurrence: int = 0) -> Row:
    """The row of line `number` (from 1). Never raises: what is wrong with it is in `error`.

    A row without a name of its own is called "row-<number>"; `occurrence` counts equal lines before this one.
    """
    name, explicit = f"row-{number}", False
    key = row_key(name, raw, occurrence)
    try:
        fields = _object(raw)
        given = _custom_id(fields)
        if given is not None:
            name, explicit = given, True
            key = row_key(name, raw, occurrence)
        return Row(key, name, number, explicit, request=_request(key, name, fields, defaults))
    except BadRow as error:
        return Row(key, name, number, explicit, error=error)


def _object(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BadRow(f"the line is not JSON: {error}", code="invalid_json_line") from None
    if not isinstance(fields, dict):
        raise BadRow(f"expected a JSON object, got {type(fields).__name__}", code="invalid_json_line")
    return fields


def _custom_id(fields: dict[str, Any]) -> str | None:
    names = ("custom_id",) if "body" in fields else _PLAIN_NAMES
    name = next((fields[n] for n in names if fields.get(n) is not None), None)
    if name is None:
        if "body" in fields:
            raise BadRow("missing required parameter: 'custom_id'", "custom_id", "missing_required_parameter")
        return None
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise BadRow(f"custom_id must be a string that is not empty, got {name!r}", "custom_id", "invalid_type")
    return str(name)


def _request(key: str, custom_id: str, fields: dict[str, Any], defaults: Defaults) -> Request:
    if "body" in fields:
        url, body = _envelope(fields)
    else:
        url = CHAT_URL if fields.get("messages") is not None else COMPLETIONS_URL
        body = {name: value for name, value in fields.items() if name not in _PLAIN_NAMES}
    body = {name: value for name, value in body.items() if value is not None}
    prompt, messages = None, None
    if url == CHAT_URL:
        messages = _messages(body)
    else:
        prompt = _prompt(body)
        if defaults.chat and "body" not in fields and isinstance(prompt, str):
            url, prompt, messages = CHAT_URL, None, [{"role": "user", "content": prompt}]
    # A plain row is a line of somebody's data set: columns that are not ours are not an error there.
    _check_known(body, strict="body" in fields)
    limit = _max_tokens(body)
    return Request(
        key=key,
        custom_id=custom_id,
        url=url,
        prompt=prompt,
        messages=messages,
        model=_string(body, "model"),
        max_tokens=defaults.max_tokens if limit is None else limit,
        max_tokens_given=limit is not None,
        temperature=_number(body, "temperature", 0.0, 2.0, defaults.temperature),
        top_p=_number(body, "top_p", 0.0, 1.0, defaults.top_p),
        top_k=_integer(body, "top_k", -1, 1 << 31, 0),
        seed=_integer(body, "seed", -(1 << 63), 1 << 63, _own_seed(defaults.seed, key)),
        stop=_stop(body),
        ignore_eos=_boolean(body, "ignore_eos"),
    )


def _envelope(fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    body = fields["body"]
    if isinstance(body, str):  # a column of text in Parquet
        body = _object(body.encode("utf-8", "surrogatepass"))
    if not isinstance(body, dict):
        raise BadRow(f"body must be an object, got {type(body).__name__}", "body", "invalid_type")
    method = fields.get("method")
    if method not in (None, "POST"):
        raise BadRow(f"method must be 'POST', got {method!r}", "method", "invalid_method")
    url = fields.get("url")
    if url is None:
        url = CHAT_URL if "messages" in body else COMPLETIONS_URL
    if url not in (CHAT_URL, COMPLETIONS_URL):
        raise BadRow(f"url must be {CHAT_URL!r} or {COMPLETIONS_URL!r}, got {url!r}", "url", "invalid_url")
    return url, body


def _messages(body: dict[str, Any]) -> list[dict[str, str]]:
    messages = body.get("messages")
    if messages is None:
        raise BadRow("missing required parameter: 'messages'", "messages", "missing_required_parameter")
    if not isinstance(messages, list) or not messages:
        raise BadRow("messages must be a list with at least one message", "messages", "invalid_type")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, place: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRow(f"{place} must be an object, got {type(message).__name__}", place, "invalid_type")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise BadRow(f"{place}.role must be a string, got {role!r}", f"{place}.role", "invalid_type")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if any(not isinstance(part, str) for part in parts):
            raise BadRow(f"{place}.content may hold parts of type 'text' only", f"{place}.content", "unsupported_value")
        content = "".join(parts)
    if not isinstance(content, str):
        raise BadRow(f"{place}.content must be a string, got {content!r}", f"{place}.content", "invalid_type")
    return {"role": role, "content": content}


def _prompt(body: dict[str, Any]) -> str | list[int]:
    prompt = body.get("prompt")
    if prompt is None:
        raise BadRow("missing required parameter: 'prompt'", "prompt", "missing_required_parameter")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    tokens = isinstance(prompt, list) and all(type(t) is int and 0 <= t < 1 << 31 for t in prompt)
    if not (isinstance(prompt, str) or tokens) or not prompt:
        raise BadRow("prompt must be one string or one list of token ids, and not empty", "prompt", "invalid_type")
    return prompt


def _check_known(body: dict[str, Any], strict: bool) -> None:
    for name, value in body.items():
        if name in _FIXED:
            if not any((value == fixed and type(value) is not bool) or value is fixed for fixed in _FIXED[name]):
                raise BadRow(f"{name}={json.dumps(value)[:80]} is not supported by sidp", name, "unsupported_parameter")
        elif strict and name not in _SAMPLING | _IGNORED | {"model", "messages", "prompt"}:
            raise BadRow(f"unrecognized request argument: {name}", name, "unknown_parameter")


def _max_tokens(body: dict[str, Any]) -> int | None:
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    return _integer(body, name, 1, 1 << 31, None)


def _number(body: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:  # NaN
        raise BadRow(f"{name} must be a number, got {value!r}", name, "invalid_type")
    if not low <= value <= high:
        raise BadRow(f"{name} must be in {low:g} ... {high:g}, got {value!r}", name, "decimal_out_of_range")
    return float(value)


def _integer(body: dict[str, Any], name: str, low: int, high: int, default: Any) -> Any:
    if name not in body:
        return default
    value = body[name]
    if isinstance(value, float) and value.is_integer():  # a column with gaps in Parquet
        value = int(value)
    if type(value) is not int:
        raise BadRow(f"{name} must be a whole number, got {value!r}", name, "invalid_type")
    if not low <= value < high:
        raise BadRow(f"{name} must be at least {low} and below {high}, got {value}", name, "integer_out_of_range")
    return value


def _boolean(body: dict[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise BadRow(f"{name} must be true or false, got {value!r}", name, "invalid_type")
    return value


def _string(body: dict[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise BadRow(f"{name} must be a string, got {value!r}", name, "invalid_type")
    return value


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or any(not isinstance(word, str) for word in stop):
        raise BadRow("stop must be a string or a list of strings", "stop", "invalid_type")
    return tuple(word for word in stop if word)


def _own_seed(seed: int, key: str) -> int:
    """A row without a seed gets one of its own that depends on nothing but the run's seed and the row."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:7], "big")
