"""Old names of modules that have moved, for plugins and scripts that import them.

An import by an old name returns the module itself, with a DeprecationWarning that names its new place. This file is
removed in version 0.3.
"""

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# (package of before, of today): old names of modules, and new ones where they differ.
_ROOMS = {
    ("zoo", "zoo"): "auto=autoclasses",
    ("zoo", "zoo.storage"): "stream=safetensors_file weights files=atomic precision",
    ("zoo", "zoo.text"): (
        "tokenizer chat_template answers=answer_spans chat=tokenized_chat stops processor processor_call "
        "processor_chat processor_options collate=batch"
    ),
    ("zoo", "zoo.composed"): (
        "model model_forward=forward model_generate=generate generate_options prompted=generate "
        "model_llm=language_model model_images=image_path model_parts=trainable model_types=outputs "
        "model_slots=slots assembly answer_loss prefix_cache quantized bases talk=chat_session"
    ),
    ("zoo", "zoo.settings"): (
        "config stage prepare=overrides presets saved=model_names trial=static_check explain=messages"
    ),
    ("zoo", "zoo.teaching"): "teacher teacher_store",
    ("zoo", "zoo.checking"): "checker fixes teacher_check=teachers",
    ("zoo", "zoo.loading"): "loading=build",
    ("zoo", "zoo.runs"): (
        "run_folder=folder run_data=data run_lock=lock loader=batches checkpoint optim processes progress "
        "memory=allocator step_log trackers resume"
    ),
    ("zoo", "zoo.evaluation"): "evaluate predict score_table lmms_eval_model vlmevalkit",
    ("zoo", "zoo.training"): "engine=step finish teach",
    ("zoo", "zoo.inspection"): "xray xray_page xray_picture model_facts report shift=moextend_layers",
    ("zoo", "zoo.cli"): "cli=entry launch complete listing doctor new templates sweep chat_command bench",
    ("zoo.fusion", "zoo.fusion.projectors"): "linear mlp pool resampler pixel_shuffle",
    ("zoo.fusion", "zoo.fusion.layouts"): "anyres tiles frames stitch=crop_order",
    ("zoo.fusion", "zoo.fusion.llm"): "llm=hf attention decoder head_check",
    ("zoo.fusion", "zoo.fusion.pruners"): (
        "fastervlm visionzip divprune random_pruner=random pool_pruner=pool selection=topk merging=token_merging"
    ),
    ("zoo.fusion", "zoo.fusion.pruners.inside"): (
        "aim fastv dropping=dropper survivors=sequence attended=attention_tap attention_walk=attention_flow "
        "walk_kernel=attention_flow_triton droppable"
    ),
    ("zoo.fusion", "zoo.fusion.adapters"): (
        "lora mole moextend upcycle dispatch=moe_dispatch experts expert_shift passes=routing_trace "
        "carried=checkpointing adapter_file"
    ),
    ("zoo.fusion", "zoo.fusion.adapters.vlora"): (
        "vlora=adapter weight_generator=generator image_memory lowrank_sites=sites"
    ),
    ("zoo.vision", "zoo.vision.encoders"): (
        "tower=base hf_tower=hf timm_tower=timm open_clip_tower=open_clip timm_runner=vit_runner "
        "attention_rows=attention_scores stem=conv_stem checkpoints"
    ),
    ("zoo.vision", "zoo.vision.images"): "images=decode transform pictures=processors video",
    ("zoo.distill", "zoo.distill.matching"): "positions terms",
    ("zoo.distill", "zoo.distill.losses"): "chunked logprobs preference relation",
    ("zoo.registry", "zoo.registry"): "contracts=values core=table store=hydra source=options",
}
MOVED = {
    f"{before}.{old}": f"{today}.{new or old}"
    for (before, today), words in _ROOMS.items()
    for old, _, new in (word.partition("=") for word in words.split())
}


class _Finder(MetaPathFinder):
    """The last of all finders, so that it is asked only for names that no other finds."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, _Alias(MOVED[name])) if name in MOVED else None


class _Alias(Loader):
    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is now {self.name}.", DeprecationWarning, stacklevel=2)
        module = import_module(self.name)
        self.spec = module.__spec__  # the import system overwrites it with the alias's: `exec_module` puts it back
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def attributes_of(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package with the name of an earlier module, whose contents are in `module` now.

    Like an import by an old name, it gives a DeprecationWarning.
    """

    def find(name: str) -> Any:
        if name.startswith("__") or name == module.rpartition(".")[2]:  # the last: an import of the module itself
            raise AttributeError(name)
        found = getattr(import_module(module), name)
        warnings.warn(f"{name} is now in {module}.", DeprecationWarning, stacklevel=2)
        return found

    return find


def serve() -> None:
    """Install the finder of old names."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
