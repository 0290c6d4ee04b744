"""What differs between the versions of libraries that the project runs on; no other module asks for a version.

`TESTED` lists the versions that were run: `pyproject.toml` states the same ranges, `zoo doctor` compares them with what
is installed, docs/compatibility.md#libraries lists them, and tests hold them together.

    transformers 5.24   `past_key_values` is called `cache`: in the arguments of models and decoder layers, and in
                        outputs. The old name works there until 5.40, with a warning. Where the package `kernels` is
                        installed, weights of a GGUF file stay packed, and kernels for them are fetched from the hub.
    torchvision 0.27    resamples tensors by lanczos too.
    transformers 5.23   gradient checkpointing is called activation checkpointing; the old name warns. It recomputes the
                        `forward` of a layer; before, it did so with `__call__`, the hooks on the layer included.
                        Configs of encoders of Qwen-VL and GLM-V give their `depth` as `num_hidden_layers`, too.

Two more differences need no version to be asked for, since what is done about them is right on every version:
torch's FLOP counter has no formula for attention fused on a CPU (`benches/flops.py`, torch 2.14), and its grouped
products refuse float32 on the meta device (`fusion/adapters/experts.py`, torch 2.14).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial, update_wrapper
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from zoo.registry.forward_pass import carried


@dataclass(frozen=True)
class Versions:
    """Which versions of a library are allowed, and which of them were run.

    Attributes:
        oldest: the lowest that is allowed; `make test-oldest` runs it, beside the lowest of all others.
        newest: the newest that was out and allowed when `make test-newest` ran; torch: requirements/torch.txt.
        below: the first that is not allowed.
        in_part: a newer one that some of the tests ran on, which docs/compatibility.md lists; empty: none.
    """

    oldest: str
    newest: str
    below: str
    in_part: str = ""

    @property
    def range(self) -> str:
        """As a package states it: `>=2.11,<2.15`."""
        return f">={self.oldest},<{self.below}"

    def covers(self, found: str) -> bool:
        """Whether a version lies in the range; one ahead of a release (`2.15.0.dev0`) counts as that release."""
        return numbers(self.oldest) <= numbers(found) and numbers(found) < numbers(self.below)


PYTHON = "3.11"  # that the tests ran on

# Libraries whose internals are used: hooks, masks, caches, names of weights. Others (numpy, rich) have lower bounds.
TESTED = {
    "torch": Versions("2.11.0", "2.14.1", "2.16", in_part="2.15.0"),
    "torchvision": Versions("0.26.0", "0.29.1", "0.30", in_part="0.29.2"),
    "transformers": Versions("5.21.0", "5.24.0", "5.25"),
    "tokenizers": Versions("0.23.1", "0.23.3", "0.24"),
    "safetensors": Versions("0.8.0", "0.8.0", "0.9"),
    "huggingface-hub": Versions("1.31.0", "2.4.0", "3"),
    "timm": Versions("1.0.22", "1.0.31", "1.1"),
    "open_clip_torch": Versions("3.2.0", "3.3.0", "3.4"),
    "peft": Versions("0.18.0", "0.21.2", "0.22"),
    "accelerate": Versions("1.10.0", "1.15.0", "1.16"),
    "hydra-core": Versions("1.3.2", "1.3.8", "1.4"),
    "omegaconf": Versions("2.3.0", "2.3.1", "2.4"),
    "datasets": Versions("4.0.0", "5.2.0", "6"),
    "av": Versions("14.0.0", "18.1.0", "19"),
    "decord": Versions("0.6.0", "0.6.0", "0.7"),
}


def numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: `2.14.1+cpu` -> (2, 14, 1), `5.25.0.dev0` -> (5, 25, 0)."""
    found: list[int] = []
    for part in text.partition("+")[0].split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def at_least(package: str, least: str) -> bool:
    """Whether the installed version of a package is `least` or newer; not where it is missing."""
    try:
        return numbers(version(package)) >= numbers(least)
    except PackageNotFoundError:  # `zoo doctor` reports it
        return False


# Asked once, at import: code inside compiled models must not search for packages.
_ACTIVATION_CHECKPOINTING = at_least("transformers", "5.23")
TORCHVISION_HAS_LANCZOS = at_least("torchvision", "0.27")  # for tensors
# Image processors that transformers' Auto class builds by Pillow: they want lanczos.
BY_PILLOW = () if TORCHVISION_HAS_LANCZOS else ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
_PACKS_GGUF = at_least("transformers", "5.24")
# What models and decoder layers call the key/value cache.
CACHE = "cache" if at_least("transformers", "5.24") else "past_key_values"


# ---- the key/value cache ---------------------------------------------------------------------------------------------


def cache_argument(value: Any) -> dict[str, Any]:
    """Return the keyword argument that passes a key/value cache to a model of transformers."""
    return {CACHE: value}


def cache_in(given: Mapping[str, Any]) -> Any:
    """Find the key/value cache among the keyword arguments of a decoder layer; None without one."""
    return next((given[n] for n in (CACHE, "layer_past") if given.get(n) is not None), None)


def without_cache(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a decoder layer with None in place of the key/value cache."""
    return {n: None if n in (CACHE, "layer_past") else v for n, v in given.items()}


def cache_of(output: Any) -> Any:
    """Return the key/value cache of a model's output; None without one."""
    return getattr(output, CACHE, None)


def with_old_cache_name(output: type) -> type:
    """Give an output class with a field `cache` the name `past_key_values` too, where transformers lacks it."""
    if CACHE != "cache":
        output.past_key_values = property(lambda self: self.cache)  # type: ignore[attr-defined]
    return output


# ---- configs ---------------------------------------------------------------------------------------------------------


def blocks_of(config: Any) -> int:
    """Return how many layers the config of an encoder states."""
    return int(config.num_hidden_layers if hasattr(config, "num_hidden_layers") else config.depth)


# ---- activation checkpointing ----------------------------------------------------------------------------------------


def checkpoint_activations(model: Any, given: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Enable activation checkpointing of a transformers model: layers are recomputed in backward, hooks on them not.

    Args:
        model: of transformers.
        given: options of `torch.utils.checkpoint.checkpoint`; None: `use_reentrant=False`.
        options: of transformers beside them, `every_n_layers` for one.
    """
    given = dict(given or {"use_reentrant": False})
    if _ACTIVATION_CHECKPOINTING:
        model.activation_checkpointing_enable(given, **options)
        for layer in _checkpointed(model):
            layer._gradient_checkpointing_func = partial(
                _checkpoint_in_pass, layer._gradient_checkpointing_func, **given
            )
        return
    keep_activations(model)
    model.gradient_checkpointing_enable(given, **options)
    for layer in _checkpointed(model):
        inner = layer.forward
        layer.forward = update_wrapper(partial(_recomputed, layer, inner, layer._gradient_checkpointing_func), inner)
        layer._gradient_checkpointing_func = partial(_run, **given)


def keep_activations(model: Any) -> None:
    """Undo `checkpoint_activations`."""
    if _ACTIVATION_CHECKPOINTING:
        model.activation_checkpointing_disable()
        return
    for layer in _checkpointed(model):
        if getattr(layer.forward, "func", None) is _recomputed:
            layer.forward = layer.forward.args[1]
    model.gradient_checkpointing_disable()


def recomputes(model: Any) -> bool:
    """Whether some layer of a transformers model recomputes its activations in backward."""
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def _checkpointed(model: Any) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]


def _recomputed(layer: Any, inner: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(carried(partial(inner, **kwargs)), *args) if layer.training else inner(*args, **kwargs)


def _checkpoint_in_pass(checkpoint: Any, function: Any, *args: Any, **_: Any) -> Any:
    """Checkpoint a function so that it finds its forward pass when backward recomputes it."""
    return checkpoint(carried(function), *args)


def _run(function: Any, *args: Any, **_: Any) -> Any:
    return function(*args)


# ---- GGUF files ------------------------------------------------------------------------------------------------------


def unpacked_gguf() -> dict[str, Any]:
    """Return the options of `from_pretrained` with which a GGUF file is read as plain numbers, without kernels."""
    if not _PACKS_GGUF:
        return {}
    from transformers import GgufConfig

    return {"quantization_config": GgufConfig(dequantize=True)}


def gguf_fields(file: Any) -> dict[str, Any]:
    """Return the fields of a GGUF file that hold one value; transformers reads them faster, from 5.24 on."""
    try:
        from transformers.integrations.gguf.reader import read_gguf_metadata
    except ImportError:
        from gguf import GGUFReader

        fields = GGUFReader(file).fields
        return {name: field.contents() for name, field in fields.items() if len(field.data) == 1}
    return read_gguf_metadata(str(file))[0]


def gguf_tensors(file: Any) -> tuple[str, ...]:
    """Return the names of the tensors in a GGUF file."""
    try:
        from transformers.integrations.gguf.reader import read_gguf_metadata
    except ImportError:
        from gguf import GGUFReader

        return tuple(tensor.name for tensor in GGUFReader(file).tensors)
    return tuple(read_gguf_metadata(str(file))[1])


def gguf_taken(architecture: str, lm: Any) -> frozenset[str] | None:
    """Return the names of tensors that transformers reads from a GGUF file into a model, some without `.weight`.

    None: its newer reader, which reports the others itself.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:  # before 5.24
        pass
    else:
        if is_gguf_arch_supported(architecture):
            return None
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=lm.config.to_dict())
    return frozenset(get_gguf_hf_weights_map(lm, processor))


def gguf_text_cuts() -> frozenset[str]:
    """Return the names of ways to cut text before merges that transformers knows in a GGUF file."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # before 5.24
        return frozenset()
    return frozenset(GGUF_PRE_TOKENIZER_SPLITS)
