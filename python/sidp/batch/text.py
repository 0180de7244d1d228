"""Between text and tokens: prompts in, answers out, stop strings found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .records import BadRow, Request

_BYTES = 256
_TAIL_TOKENS = 8  # more than one character can be spread over


class Codec:
    """A tokenizer and the model's limits. `tokenizer` None: bytes are the tokens (made-up models); of a vocabulary
    beyond bytes, answers are the tokens' numbers."""

    def __init__(self, tokenizer: Any, end_tokens: set[int], context: int | None, vocabulary: int) -> None:
        self.tokenizer = tokenizer
        self.end_tokens = end_tokens
        self.context = context
        self.vocabulary = vocabulary

    def encode(self, request: Request) -> list[int]:
        """The prompt's token ids. BadRow where the request does not suit this model."""
        if isinstance(request.prompt, list):
            tokens = request.prompt
            beyond = next((t for t in tokens if t >= self.vocabulary), None)
            if beyond is not None:
                raise BadRow(f"prompt holds token {beyond}, the model has {self.vocabulary}", "prompt", "invalid_token")
        elif request.messages is not None:
            tokens = self._chat(request.messages)
        elif self.tokenizer is None:
            tokens = list(str(request.prompt).encode("utf-8", "replace"))
        else:
            tokens = self.tokenizer(request.prompt)["input_ids"]
        if not tokens:
            raise BadRow("the prompt has no tokens", "prompt", "invalid_value")
        return tokens

    def _chat(self, messages: list[dict[str, str]]) -> list[int]:
        if self.tokenizer is None:
            text = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
            return list(text.encode("utf-8", "replace"))
        if not self.tokenizer.chat_template:
            raise BadRow("this model has no chat template: use /v1/completions", "messages", "unsupported_value")
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # a template raises whatever its author chose, for roles out of order and the like
            raise BadRow(f"the model's chat template refuses the messages: {error}", "messages") from error
        return encoded["input_ids"]

    def limit(self, request: Request, prompt_tokens: int, capacity: int) -> int:
        """How many tokens may be generated. BadRow where prompt and max_tokens fit neither the context nor the KV
        cache.
        """
        fits = min(capacity, self.context or capacity)
        what = "context length" if self.context is not None and self.context <= capacity else "KV cache"
        wanted = request.max_tokens if request.max_tokens_given else 1
        if prompt_tokens + (wanted or 1) > fits:
            raise BadRow(
                f"this model's maximum {what} is {fits} tokens; the request wants {prompt_tokens + (wanted or 1)} "
                f"({prompt_tokens} in the prompt, {wanted or 1} to generate): shorten either",
                "messages" if request.messages is not None else "prompt",
                "context_length_exceeded",
            )
        return min(request.max_tokens or fits, fits - prompt_tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        if self.tokenizer is None:
            if self.vocabulary > _BYTES:
                return "".join(f"{token} " for token in tokens)
            return bytes(tokens).decode("latin-1")
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def finder(self, request: Request) -> StopFinder | None:
        return StopFinder(self, request.stop) if request.stop else None

    def answer(self, request: Request, tokens: Sequence[int]) -> tuple[str, str]:
        """(text, finish reason) of generated tokens, stop strings and what follows them cut off."""
        ended = bool(tokens) and tokens[-1] in self.end_tokens and not request.ignore_eos
        text = self.decode(tokens)
        cut = min((at for word in request.stop if (at := text.find(word)) >= 0), default=-1)
        if cut >= 0:
            return text[:cut], "stop"
        return text, "stop" if ended else "length"


class StopFinder:
    """Whether tokens generated so far spell a stop string; looks at their end only, then at all once that says yes."""

    def __init__(self, codec: Codec, words: tuple[str, ...]) -> None:
        self._codec = codec
        self._words = words
        self._tail = max(len(word.encode("utf-8", "replace")) for word in words) + _TAIL_TOKENS

    def found(self, tokens: Sequence[int]) -> bool:
        """Call it after each token: a stop string that ends earlier than in the last few tokens is not looked for."""
        if not self._in(tokens[-self._tail :]):
            return False
        return len(tokens) <= self._tail or self._in(tokens)

    def _in(self, tokens: Sequence[int]) -> bool:
        text = self._codec.decode(tokens)
        return any(word in text for word in self._words)
