"""The plugin inside a vLLM process: inert unless chosen, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny import save_tiny

from sidp.errors import ConfigError

pytestmark = [pytest.mark.usefixtures("with_vllm"), pytest.mark.timeout(600)]


_LOADERS = """
from vllm.plugins import load_general_plugins
from vllm.config.load import LoadConfig
import vllm.plugins
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.models import llama
before = llama.LlamaMLP
load_general_plugins()
vllm.plugins.plugins_loaded = False
load_general_plugins()  # vLLM says that it may happen twice
assert llama.LlamaMLP is before
print([type(get_model_loader(LoadConfig(load_format=name))).__name__ for name in ("sidp", "auto", "safetensors", "dummy")])
"""


def test_inert_unless_chosen():
    ran = subprocess.run([sys.executable, "-c", _LOADERS], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.splitlines()[-1] == str(
        ["SidpModelLoader", "DefaultModelLoader", "DefaultModelLoader", "DummyModelLoader"]
    )


def test_chosen_by_environment_variable(monkeypatch):
    from vllm.model_executor import model_loader

    import sidp.vllm
    from sidp.vllm.loader import SidpModelLoader

    registered = dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER)
    monkeypatch.setattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", registered)
    before = dict(registered)
    monkeypatch.setenv("SIDP_VLLM", "1")
    sidp.vllm.register()
    sidp.vllm.register()
    changed = {name for name in registered if registered[name] is not before.get(name)}
    assert changed | {"sidp"} == {"sidp", "auto", "hf", "safetensors"}
    assert all(registered[name] is SidpModelLoader for name in (*changed, "sidp"))


@pytest.mark.parametrize("version", ["0.19.1", "0.34.0", "1.0.0", "dev"])
def test_other_versions_are_refused_by_name(monkeypatch, version):
    import vllm
    from vllm.config.load import LoadConfig

    from sidp.vllm.loader import SidpModelLoader
    from sidp.vllm.versions import UnsupportedVllmError

    SidpModelLoader(LoadConfig(load_format="sidp"))
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(UnsupportedVllmError, match=rf"vLLM {version} is not supported.*0\.20 to 0\.33"):
        SidpModelLoader(LoadConfig(load_format="sidp"))


@pytest.fixture(scope="module")
def vllm_config(with_vllm, tmp_path_factory):
    from vllm import EngineArgs

    folder = save_tiny("llama", tmp_path_factory.mktemp("model") / "llama")
    return EngineArgs(
        model=str(folder), load_format="sidp", skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 20
    ).create_engine_config()


@pytest.mark.parametrize(
    "where, value, words",
    [
        ("speculative_config", object(), "speculative decoding"),
        ("quant_config", object(), "quantisation"),
        ("model_config.quantization", "fp8", r"quantisation \(fp8\)"),
        ("lora_config", object(), "LoRA"),
        ("model_config.enable_sleep_mode", True, "sleep mode"),
        ("parallel_config.enable_eplb", True, r"expert load balancing \(EPLB\)"),
        ("parallel_config.enable_dbo", True, "dual-batch overlap"),
        ("parallel_config.pipeline_parallel_size", 2, "pipeline_parallel_size=2"),
        ("parallel_config.data_parallel_size", 4, "data_parallel_size=4: start one engine a rank"),
        ("offload_config.uva.cpu_offload_gb", 1.0, "weight offloading"),
        ("offload_config.prefetch.offload_group_size", 2, "weight offloading"),
    ],
)
def test_what_does_not_go_with_a_pool_is_refused_before_anything_is_made(monkeypatch, vllm_config, where, value, words):
    from vllm.model_executor.model_loader import base_loader, get_model_loader

    from sidp.vllm import register

    register()
    *path, name = where.split(".")
    target = vllm_config
    for part in path:
        target = getattr(target, part)
    monkeypatch.setattr(target, name, value)
    made = []
    monkeypatch.setattr(base_loader, "initialize_model", lambda *args, **kwargs: made.append(kwargs))
    with pytest.raises(ConfigError, match=f"does not go with {words}"):
        get_model_loader(vllm_config.load_config).load_model(vllm_config, vllm_config.model_config)
    assert not made


def test_other_models_are_refused_by_name():
    from vllm.model_executor.models.gpt2 import GPT2LMHeadModel
    from vllm.model_executor.models.llama import LlamaForCausalLM

    from sidp.vllm.refusals import mlp_class_of

    assert mlp_class_of(LlamaForCausalLM)[1] == "LlamaMLP"
    own = type("LlamaForCausalLM", (LlamaForCausalLM,), {"__module__": "somebody.elses"})
    for other in (GPT2LMHeadModel, own):
        with pytest.raises(ConfigError, match=f"pools LlamaForCausalLM, .*, not {other.__module__}"):
            mlp_class_of(other)


def test_a_loader_takes_no_settings_and_loads_once():
    from vllm.config.load import LoadConfig

    from sidp.vllm.loader import SidpModelLoader

    with pytest.raises(ConfigError, match="SIDP_"):
        SidpModelLoader(LoadConfig(load_format="sidp", model_loader_extra_config={"num_threads": 2}))
    with pytest.raises(ConfigError, match="fixed once it is committed"):
        SidpModelLoader(LoadConfig(load_format="sidp")).load_weights(None, None)
