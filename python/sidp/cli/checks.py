"""Checks of arguments that several commands share."""

from __future__ import annotations

import argparse
import os

from ..errors import ConfigError


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    value = int(text) if text.strip().isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def need(command: str, *modules: str, install: str | None = None) -> None:
    """ConfigError naming what ``command`` misses; ``install`` is what pip is to install, by default the modules."""
    from importlib.util import find_spec

    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ConfigError(f"sidp {command} needs {', '.join(missing)}: pip install {install or ' '.join(missing)}")


def plot_target(path: str | None) -> None:
    """Refuses a picture's name before the work is done, not after."""
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ConfigError(f"--plot {path}: the folder {folder} does not exist; create it first")
    if os.path.splitext(path)[1].lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {path}: expected a name ending in .png, .svg or .pdf")
