"""Finds the native module: beside this file when installed, or in SIDP_EXTENSION_DIR for a build folder."""

import importlib.util
import os
import sys
from pathlib import Path


def _load():
    folder = os.environ.get("SIDP_EXTENSION_DIR")
    if not folder:
        from . import _C

        return _C
    candidates = sorted(Path(folder).glob("_C.*.so"))
    if not candidates:
        raise ImportError(f"SIDP_EXTENSION_DIR={folder} holds no _C.*.so: build it with cmake, or unset the variable")
    spec = importlib.util.spec_from_file_location("sidp._C", candidates[0])
    module = importlib.util.module_from_spec(spec)
    sys.modules["sidp._C"] = module
    spec.loader.exec_module(module)
    return module


C = _load()
