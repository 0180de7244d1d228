"""A folder of safetensors: which file holds which tensor, and reading a part of one without the rest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def resolve_folder(path: str | os.PathLike[str], hub: dict[str, Any]) -> Path:
    """The local folder of `path`: itself, or a hub id's snapshot (the local cache first, then the hub)."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(f"{path} is a file, expected a folder with config.json and {_SINGLE}.")
    if folder.is_absolute() or len(folder.parts) > 2:
        raise ConfigError(f"{path} does not exist; expected a folder with config.json and {_SINGLE}, or a hub id.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    local_only = bool(hub.pop("local_files_only", False)) or HF_HUB_OFFLINE
    problem: Exception | None = None
    for only in (True,) if local_only else (True, False):
        try:
            found = snapshot_download(str(path), local_files_only=only, allow_patterns=_HUB_FILES, **hub)
            if only is False or _has_weights(Path(found)):
                return Path(found)
        except Exception as error:  # the hub's own errors, of many classes; the last one is told
            problem = error
    first_line = str(problem).partition("\n")[0]
    raise ConfigError(
        f"{path} is neither a folder nor a model that huggingface_hub can find "
        f"({type(problem).__name__}: {first_line}). Pass the path of a folder with safetensors."
    )


def _has_weights(folder: Path) -> bool:
    return (folder / _SINGLE).exists() or (folder / _INDEX).exists()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


class Checkpoint:
    """The tensors of a folder, single-file or sharded. Files stay mapped until `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._open_all()

    def keys(self) -> list[str]:
        return list(self._file_of)

    def file_of(self, key: str) -> Path:
        return self.folder / self._file_of[key]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._slice(key).get_shape())

    def read(self, key: str, index: tuple[slice, ...]) -> torch.Tensor:
        """The part `index` of tensor `key`, in the file's dtype; no other byte of it is read."""
        part: torch.Tensor = self._slice(key)[index]
        return part

    def close(self) -> None:
        self._files.clear()

    def _slice(self, key: str) -> Any:
        return self._files[self._file_of[key]].get_slice(key)

    def _open_all(self) -> None:
        if (self.folder / _SINGLE).exists():
            self._file_of = {key: _SINGLE for key in self._open(_SINGLE)}
            return
        if not (self.folder / _INDEX).exists():
            there = ", ".join(sorted(p.name for p in self.folder.iterdir())[:8]) or "nothing"
            raise ConfigError(
                f"{self.folder} has no {_SINGLE} and no {_INDEX} (it holds {there}). sidp reads safetensors only: save "
                "the model once with save_pretrained(folder)."
            )
        index = self._read_index()
        held = {name: self._open(name) for name in sorted(set(index.values()))}
        for key, name in index.items():
            if key not in held[name]:
                raise ConfigError(
                    f"{self.folder / _INDEX} says that {name} holds {key}, but it does not. Download or save the "
                    "checkpoint again."
                )
        self._file_of = index

    def _read_index(self) -> dict[str, str]:
        path = self.folder / _INDEX
        try:
            index = json.loads(path.read_text())["weight_map"]
            names = {str(key): str(name) for key, name in index.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path} is not an index of safetensors ({type(error).__name__}: {error}).") from error
        for name in set(names.values()):
            if Path(name).name != name or not _exists(self.folder / name):
                raise ConfigError(f"{path} names {name!r}, which is not in {self.folder}. Download the missing file.")
        return names

    def _open(self, name: str) -> set[str]:
        from safetensors import SafetensorError, safe_open

        try:
            self._files[name] = safe_open(self.folder / name, framework="pt", device="cpu")
            return set(self._files[name].keys())
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{self.folder / name} cannot be read as safetensors ({error}). Download it again."
            ) from error
