"""A torch.distributed store whose every operation is bounded in time.

The store's own calls can block without a limit (a server that was stopped, not killed, keeps the connection),
so they run in a daemon thread and the caller waits for the answer with a deadline.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable
from typing import Any


class StoreLost(Exception):
    """The store does not answer or its connection broke; the message says what happened."""


class BoundedStore:
    """``store`` under ``prefix``; every operation ends within ``timeout_s`` or raises StoreLost.

    Where the store can be cloned it is, so that these operations do not queue behind another thread's
    blocking one.
    """

    def __init__(self, store: Any, prefix: str, timeout_s: float):
        self._timeout_s = timeout_s
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._lost: str | None = None
        threading.Thread(target=_serve, args=(self._calls,), name="sidp-store", daemon=True).start()
        self._store = self._call(_open, store, prefix)

    def set(self, key: str, value: bytes) -> None:
        self._call(self._store.set, key, value)

    def get(self, key: str) -> bytes:
        """The value of a key that check() has seen; a missing one would block."""
        return bytes(self._call(self._store.get, key))

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there; does not wait for them."""
        return bool(self._call(self._store.check, keys))

    def close(self) -> None:
        """Ends the thread as soon as it is free; the store itself belongs to torch."""
        self._calls.put(None)

    def _call(self, function: Callable, *args: Any) -> Any:
        if self._lost is not None:
            raise StoreLost(self._lost)
        answer: queue.SimpleQueue = queue.SimpleQueue()
        self._calls.put((function, args, answer))
        try:
            value, error = answer.get(timeout=self._timeout_s)
        except queue.Empty:
            self._lost = f"no answer within {self._timeout_s:g} s"
            raise StoreLost(self._lost) from None
        if error is not None:
            self._lost = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise StoreLost(self._lost) from error
        return value


def _open(store: Any, prefix: str) -> Any:
    from torch.distributed import PrefixStore

    # An older torch, a kind of store that cannot be cloned, or no descriptor for a second connection, for which torch would try
    # again and again: share it, so that what fails next can still be told to the others.
    with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError, OSError):
        socket.socket().close()
        store = store.clone()
    return PrefixStore(prefix, store)


def _serve(calls: queue.SimpleQueue) -> None:
    while (call := calls.get()) is not None:
        function, args, answer = call
        try:
            answer.put((function(*args), None))
        except Exception as error:
            answer.put((None, error))
