"""The input file as numbered raw JSON lines, whatever its format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError

_PARQUET_MAGIC = b"PAR1"


def read_rows(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, one JSON object as bytes) of every row that is not blank, in the file's order.

    Parquet is told by its content, else the file is JSON lines. Raises ConfigError where it cannot be read.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            parquet = file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC
        yield from _parquet_rows(path) if parquet else _lines(path)
    except OSError as error:
        raise ConfigError(f"input {path}: {error.strerror or error}; give a readable file of JSON lines") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _parquet_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"input {path} is Parquet, which needs pyarrow: pip install 'sidp[batch]'") from error
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, json.dumps(_without_nulls(row), default=_plain, ensure_ascii=False).encode()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"input {path}: not a readable Parquet file ({error})") from error


def _without_nulls(value: Any) -> Any:
    """Parquet gives every row every field; what a row does not say is null there."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
