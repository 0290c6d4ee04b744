"""The entry point of vLLM (group `vllm.general_plugins`): the architecture `ZooLlavaForConditionalGeneration`.

    vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{"architectures": ["ZooLlavaForConditionalGeneration"],
        "zoo_pruner": {"name": "fastervlm", "keep_ratio": 0.25}}'

vLLM calls `register` in each of its processes. Nothing but the name is registered there: the class is imported, and
vLLM's models with it, where a server asks for the architecture.
"""

import ast
import logging
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ARCHITECTURE = "ZooLlavaForConditionalGeneration"
MODULE = "vllm.model_executor.models.llava"
# What `zoo.serving.vllm_llava` takes of that module: classes, and methods that it calls or overrides.
EXPECTED = {
    "LlavaForConditionalGeneration": {"_process_image_pixels", "_process_image_input"},
    "BaseLlavaProcessingInfo": {"get_num_image_tokens", "get_hf_config"},
    "LlavaProcessingInfo": set(),
    "LlavaMultiModalProcessor": set(),
    "LlavaDummyInputsBuilder": set(),
}


@cache  # once in a process, however often it is called
def register() -> bool:
    """Register the architecture with vLLM; return whether that was done.

    A vLLM without the interface that it needs is left as it is, with one warning.
    """
    try:
        from vllm import ModelRegistry

        missing = _missing()
        if not missing:
            ModelRegistry.register_model(ARCHITECTURE, f"zoo.serving.vllm_llava:{ARCHITECTURE}")
            return True
        why = f"{MODULE} has no {', '.join(missing)}"
    except Exception as error:  # an optional plug-in must not keep vLLM from starting
        why = f"{type(error).__name__}: {error}"
    logging.getLogger(__name__).warning("zoo: pruners are not registered with vLLM: %s.", why)
    return False


def _missing() -> list[str]:
    """Return the classes and methods of vLLM's LLaVA that are not there, read from its source without importing it."""
    spec = find_spec(MODULE)
    if spec is None or not spec.origin:
        return ["source"]
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found = {
        node.name: {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    missing = [name for name in EXPECTED if name not in found]
    return missing + [f"{name}.{m}" for name in EXPECTED if name in found for m in sorted(EXPECTED[name] - found[name])]
