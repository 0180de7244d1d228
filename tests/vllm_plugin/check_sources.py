"""Whether sources of vLLM have what the plugin builds on; how docs/vllm.md's table of versions was made.

    python check_sources.py FOLDER...      # each holds an unpacked source distribution, or at least its vllm/ package

Prints a line a folder and exits with 1 where something is missing. Nothing is imported or run.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

# file -> names at its top level, or "Class.name"; with the parameters that the plugin passes.
NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "config/vllm.py": {
        f"VllmConfig.{name}": ()
        for name in ("load_config", "quant_config", "lora_config", "speculative_config", "offload_config", "additional_config")
    },
    "config/model.py": {f"ModelConfig.{name}": () for name in ("enable_sleep_mode", "quantization", "revision")},
    "config/parallel.py": {
        f"ParallelConfig.{name}": ()
        for name in (
            "enable_eplb", "enable_dbo", "pipeline_parallel_size", "data_parallel_size", "worker_extension_cls",
        )
    },
    "config/load.py": {"LoadConfig.model_loader_extra_config": (), "LoadConfig.download_dir": ()},
    "config/offload.py": {"UVAOffloadConfig.cpu_offload_gb": (), "PrefetchOffloadConfig.offload_group_size": ()},
    "config/compilation.py": {"CompilationConfig.splitting_ops": (), "CompilationConfig.static_forward_context": ()},
    "distributed/communication_op.py": {"tensor_model_parallel_all_reduce": ("input_",)},
    "distributed/parallel_state.py": {
        "get_tensor_model_parallel_rank": (), "get_tensor_model_parallel_world_size": (),
    },
    "forward_context.py": {"get_forward_context": (), "ForwardContext.no_compile_layers": ()},
    "model_executor/custom_op.py": {"CustomOp.forward": ()},
    "model_executor/layers/activation.py": {"SiluAndMul.forward_native": (), "SiluAndMul.forward_cuda": ()},
    "model_executor/layers/linear.py": {"UnquantizedLinearMethod.apply": (), "RowParallelLinear.forward": ()},
    "model_executor/layers/utils.py": {"dispatch_cpu_unquantized_gemm": ("layer", "remove_weight")},
    "model_executor/model_loader/__init__.py": {
        "register_model_loader": ("load_format",), "_LOAD_FORMAT_TO_MODEL_LOADER": (),
    },
    "model_executor/model_loader/base_loader.py": {
        "BaseModelLoader.load_model": ("vllm_config", "model_config", "prefix"),
        "BaseModelLoader.load_weights": ("model", "model_config"),
        "BaseModelLoader.download_model": ("model_config",),
    },
    "model_executor/model_loader/utils.py": {"get_model_cls": ("model_config",)},
    "model_executor/models/llama.py": {"LlamaForCausalLM": (), "LlamaMLP.forward": ("x",)},
    "model_executor/models/mistral.py": {"MistralForCausalLM": (), "MistralDecoderLayer": ()},
    "model_executor/models/qwen2.py": {"Qwen2ForCausalLM": (), "Qwen2MLP.forward": ("x",)},
    "model_executor/models/qwen3.py": {"Qwen3ForCausalLM": (), "Qwen3MLP": ()},
    "plugins/__init__.py": {"load_general_plugins": ()},
    "v1/worker/cpu_model_runner.py": {"CPUModelRunner.warming_up_model": ()},
}  # fmt: skip
# What the plugin counts on inside functions, word for word.
SAID = {
    "model_executor/custom_op.py": ["self._forward_method(*args, **kwargs)"],
    "model_executor/layers/linear.py": ["if self.reduce_results and self.tp_size > 1"],
    "model_executor/layers/utils.py": ["if layer.weight.is_meta:"],
    "model_executor/model_loader/base_loader.py": ["self.load_weights(model, model_config)", "initialize_model("],
    "model_executor/models/llama.py": ["self.mlp = LlamaMLP(", 'prefix=f"{prefix}.mlp"'],
    "model_executor/models/mistral.py": ["class MistralDecoderLayer(LlamaDecoderLayer)"],
    "model_executor/models/qwen2.py": ["self.mlp = Qwen2MLP(", 'prefix=f"{prefix}.mlp"'],
    "model_executor/models/qwen3.py": ["self.mlp = Qwen3MLP(", 'prefix=f"{prefix}.mlp"'],
    "v1/worker/worker_base.py": ["load_general_plugins()", "worker_extension_cls"],
}


def names(tree: ast.Module) -> dict[str, list[str] | None]:
    """Every top-level name and every "Class.name" -> parameters, or None where it is no function."""
    found: dict[str, list[str] | None] = {}

    def look(body, prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found[prefix + node.name] = [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)]
            elif isinstance(node, ast.ClassDef):
                found[node.name] = None
                look(node.body, f"{node.name}.")
            elif isinstance(node, (ast.AnnAssign, ast.Assign)):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                found.update({prefix + target.id: None for target in targets if isinstance(target, ast.Name)})
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                found.update({prefix + (alias.asname or alias.name): None for alias in node.names})

    look(tree.body, "")
    return found


def missing(package: Path) -> list[str]:
    gaps = []
    for file, wanted in NEEDED.items():
        text = (package / file).read_text() if (package / file).exists() else ""
        found = names(ast.parse(text))
        for name, parameters in wanted.items():
            if name not in found:
                gaps.append(f"{file}: {name}")
            elif lost := set(parameters) - set(found[name] or ()):
                gaps.append(f"{file}: {name} takes no {', '.join(sorted(lost))}")
    for file, sayings in SAID.items():
        text = (package / file).read_text() if (package / file).exists() else ""
        gaps += [f"{file}: {saying!r}" for saying in sayings if saying not in text]
    return gaps


def main(folders: list[str]) -> int:
    bad = 0
    for folder in folders:
        package = Path(folder) / "vllm" if (Path(folder) / "vllm").is_dir() else Path(folder)
        gaps = missing(package)
        print(f"{folder}: {'; '.join(gaps) if gaps else 'has everything'}")
        bad += bool(gaps)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
