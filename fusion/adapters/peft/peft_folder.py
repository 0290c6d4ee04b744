"""A folder that PEFT wrote, read as an adapter: its method and options, and the weights where the layers are.

`adapter_config.json` gives options as `zoo.fusion.adapters.peft.methods` takes them; what is refused there is refused
here, with the same reason. The weights are put in by PEFT itself, after names and shapes were compared.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.fusion.adapters.peft.methods import OWN
from zoo.registry import ZooError, nearest
from zoo.registry.foreign import read_object
from zoo.storage.weights import local_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODULES = ("target_modules", "exclude_modules")
_CAUSAL = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")


def folder_of(checkpoint: str, revision: str = "") -> Path:
    """Return the folder of an adapter: a local one as it is, a hub repository from the cache or downloaded.

    Raises:
        ZooError: there is no such folder, and no such repository that can be fetched.
    """
    place = Path(checkpoint).expanduser()
    if place.is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", checkpoint):
        if revision:
            raise ZooError(f"adapter.peft.revision={revision} is of a hub repository, and {checkpoint!r} is a folder.")
        return place
    try:
        return local_folder(checkpoint, revision, allow_patterns=[CONFIG, WEIGHTS])
    except ZooError as error:
        raise ZooError(f"adapter.peft.checkpoint: there is no folder {checkpoint!r} here. {error}") from error


def described(folder: Path) -> tuple[str, dict[str, Any], str]:
    """Return the method, the options and the name of the base model that a folder's config has.

    Raises:
        ZooError: the folder has no such config, or pickled weights alone; or it is for another task.
    """
    if not (folder / CONFIG).is_file():
        raise ZooError(f"adapter.peft.checkpoint={str(folder)!r} needs a folder that PEFT wrote: it has no {CONFIG}.")
    if not (folder / WEIGHTS).is_file():
        raise ZooError(
            f"{str(folder)!r} has no {WEIGHTS}. Pickled weights (adapter_model.bin) are not read: save the adapter "
            "again with PEFT, whose save_pretrained writes safetensors."
        )
    config = read_object(folder / CONFIG)
    method = str(config.get("peft_type") or "").lower()
    if not method:
        raise ZooError(f"{str(folder / CONFIG)!r} names no method (peft_type).")
    if config.get("task_type") not in _CAUSAL:
        raise ZooError(f"{str(folder)!r} is for {config['task_type']}, and a language model here is a CAUSAL_LM.")
    if method == "adalora":
        raise ZooError(
            f"{str(folder)!r} is of AdaLoRA, whose layers have unlike ranks once its budget is met; what would train "
            "them on is not in the folder. Merge it into its base with PEFT."
        )
    options = {key: value for key, value in config.items() if key not in OWN and value not in (None, {}, [])}
    init = str(options.get("init_lora_weights", "")).lower()
    if init == "corda":
        raise ZooError(
            f"{str(folder)!r} begins at components (corda) that were taken out of the base weights by data it does not "
            "hold. Save it with PEFT's path_initial_model_for_weight_conversion."
        )
    if init == "eva":  # initial values, which the file replaces
        options = {k: v for k, v in options.items() if k not in ("init_lora_weights", "eva_config")}
    paths = partial(_paths, method, folder)
    if any(isinstance(options.get(name), str) and options[name] != "all-linear" for name in _MODULES):
        options["target_modules"] = paths()  # no regular expression is run
        options.pop("exclude_modules", None)
    for name in [name for name in options if name.endswith("_pattern") and isinstance(options[name], dict)]:
        options[name] = _by_path(options[name], paths(), f"{name} in {str(folder / CONFIG)!r}")
    return method, options, str(config.get("base_model_name_or_path") or "")


def _paths(method: str, folder: Path) -> list[str]:
    """The modules that have weights."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefix = {kind.value.lower(): prefix for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items()}.get(method)
    cut = [name.removeprefix("base_model.model.").partition(f".{prefix}") for name in names_in(folder)]
    found = {path.removesuffix(".base_layer") for path, mark, _ in cut if mark and prefix}
    if not found:
        raise ZooError(f"{str(folder)!r} names its modules by regular expressions, and its weights name none.")
    return sorted(found)


def _by_path(pattern: Mapping[str, Any], paths: Sequence[str], what: str) -> dict[str, Any]:
    """Values by whole names of modules: that of the first key which means one, as PEFT has it.

    PEFT takes a key as a regular expression for the last parts of a name (`^`: the whole one), which is not run here.
    """
    found: dict[str, Any] = {}
    for key, value in reversed(list(pattern.items())):
        name = re.sub(r"\\(\W)", r"\1", key.removeprefix("^").removesuffix("$"))
        if not re.fullmatch(r"[\w.-]+", name):
            raise ZooError(f"{what} has the regular expression {key!r}, which is not run: write names of modules.")
        whole = key.startswith("^")
        found |= {path: value for path in paths if path == name or (not whole and path.endswith(f".{name}"))}
    return found


def base_note(base: str, lm: Any, checkpoint: str) -> list[str]:
    """Describe a base model of another name than the language model's; folders are compared by their last parts."""
    here = str(getattr(lm, "name_or_path", "") or "")
    names = [Path(name.rstrip("/")).name for name in (base, here)]
    if not all(names) or names[0] == names[1]:
        return []
    return [f"adapter 'peft': {checkpoint!r} was trained on {base!r}, and this language model is from {here!r}"]


def names_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the weights, without reading them."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{str(path)!r} cannot be read: {error}") from error


def require_fit(folder: Path, wanted: Mapping[str, tuple[int, ...]], tables: Iterable[str] = ()) -> None:
    """Refuse a folder whose weights are not those of the layers, by name and shape.

    Args:
        folder: of the adapter.
        wanted: as PEFT would write the layers that were made here.
        tables: names of embeddings of the base, which PEFT writes beside a term on them.

    Raises:
        ZooError: the first names that differ.
    """
    held = names_in(folder)
    spare, lacking = sorted(held.keys() - wanted.keys() - set(tables)), sorted(wanted.keys() - held.keys())
    if spare:
        near = nearest(spare[0], list(wanted), 1)
        hint = f" Nearest here: {near[0]!r}." if near else ""
        raise ZooError(
            f"The adapter in {str(folder)!r} has {len(spare)} weights for which this language model has no layer, such "
            f"as {spare[0]!r}.{hint} It was trained on another base, or on its decoder without the head."
        )
    if lacking:
        raise ZooError(f"The adapter in {str(folder)!r} lacks {len(lacking)} weights, such as {lacking[0]!r}.")
    for name, shape in held.items():
        if shape != wanted.get(name, shape):
            raise ZooError(f"{name!r} in {str(folder)!r} has shape {shape}, and the layer here {wanted[name]}.")


def _tables(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Embeddings of the base by the names under which PEFT writes them: with a term on them, and resized."""
    inside = model.get_base_model()
    layers = [inside.get_input_embeddings(), inside.get_output_embeddings()]
    tables = {id(getattr(layer, "base_layer", layer)) for layer in layers if layer is not None}
    for name, module in model.named_modules():
        if id(module) in tables:
            yield f"{name}.weight", module.weight.detach()


def read_into(model: Any, name: str, folder: Path) -> None:
    """Put the weights of a folder into PEFT's layers; on the meta device they are compared only.

    Raises:
        ZooError: names or shapes differ.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    there = names_in(folder)
    base = {key: tensor for key, tensor in _tables(model) if key in there}
    require_fit(folder, {key: tuple(tensor.shape) for key, tensor in wanted.items()}, base)
    if any(tensor.is_meta for tensor in wanted.values()):
        return
    state = load_file(folder / WEIGHTS)
    for key, tensor in base.items():
        held = state.pop(key)
        if held.shape != tensor.shape or not torch.equal(held.to(tensor), tensor):
            raise ZooError(
                f"The adapter in {str(folder)!r} holds {key!r}, and that of this language model is another: its base "
                "was resized or trained, too. Merge it into its base with PEFT, and name the result as llm.checkpoint."
            )
    kept = {id(p): p for p in model.parameters()}
    set_peft_model_state_dict(model, state, adapter_name=name)
    if any(id(p) not in kept for p in model.parameters()):  # an optimiser, or a process, may hold the old ones
        raise ZooError(f"PEFT replaced parameters while it read {str(folder)!r}, which is not supported.")
