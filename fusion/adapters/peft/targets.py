"""Which modules of a language model PEFT's options mean, as whole names, each of which has to exist."""

import copy
import re
from typing import Any

from torch import nn

from zoo.fusion.adapters.peft.methods import Method, tuner_of
from zoo.fusion.attach import bypassed, fused_experts, linears, means
from zoo.registry import ZooError, nearest, unknown

_NOT_LINEAR = ("ia3", "ln_tuning")  # methods that all linear layers are too many for
_LISTS = ("target_modules", "exclude_modules", "feedforward_modules")


def resolved(method: Method, lm: Any) -> tuple[Any, list[str]]:
    """Return PEFT's config with whole names in it, and the paths of the modules that it changes.

    Args:
        method: checked.
        lm: the transformers model, real or on the meta device.

    Raises:
        ZooError: a name means no module or no parameter of this model.
    """
    config = method.config()
    words = getattr(config, "target_modules", None)
    aside = bypassed(lm)
    known = {n: m for n, m in lm.named_modules() if n and not n.startswith(aside)}
    for field in _LISTS:
        given = getattr(config, field, None)
        if given == "all-linear":
            setattr(config, field, linears(lm, lm.get_output_embeddings()))
        elif given:
            setattr(config, field, _named(field, given, known, lm))
    if getattr(config, "target_modules", None) is None and hasattr(config, "target_modules"):
        _put_defaults(config, method, lm, known)
    _keep_layers(config, words or ())
    for field in [f for f in vars(config) if f.endswith("_pattern") and isinstance(getattr(config, f), dict)]:
        spelt: dict[str, Any] = {}
        for name, value in reversed(getattr(config, field).items()):  # the first name that means a module is its own
            spelt |= {re.escape(n): value for n in _named(field, [name], known, lm)}
        setattr(config, field, spelt)
    widest = max(known[n].weight.shape[-1] for n in linears(lm, lm.get_output_embeddings()))
    for field in ("r", "init_r"):
        if (rank := getattr(config, field, None) or 0) > max(widest, 4096):
            raise ZooError(f"Option {field!r} of {method.owner} is {rank}, and the widest layer has {widest}.")
    if hasattr(config, "fan_in_fan_out"):  # GPT-2 keeps (in, out)
        first = next((known[n] for n in config.target_modules or [] if n in known), None)
        config.fan_in_fan_out = type(getattr(first, "base_layer", first)).__name__ == "Conv1D"
    return config, _changed(config, known, lm)


def _named(field: str, given: Any, known: dict[str, nn.Module], lm: Any) -> list[str]:
    """The whole names of the modules that last parts of names or shell patterns mean, in the model's order."""
    chosen: set[str] = set()
    for word in [given] if isinstance(given, str) else given:
        hits = [n for n in known if means(word, n)]
        if not hits:
            short = sorted({n.rpartition(".")[2] for n in known if not n.rpartition(".")[2].isdigit()})
            near = nearest(word, [*short, *known], 3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            fused = fused_experts(lm)
            hint += f" Its experts are fused tensors such as {fused[0]!r}: target_parameters." if fused else ""
            there = any(means(word, n) for n, _ in lm.named_modules())
            lacks = "has only where another adapter bypasses it" if there else "lacks"
            what = f"{field} has {word!r}, which {type(lm).__name__} {lacks}"
            raise ZooError(f"{what}.{hint} Modules: {', '.join(short)}.")
        chosen |= set(hits)
    return [n for n in known if n in chosen]


def _put_defaults(config: Any, method: Method, lm: Any, known: dict[str, nn.Module]) -> None:
    """Set the targets that PEFT has for a family, or all linear layers where it has none.

    Raises:
        ZooError: it has none, and the method is not for linear layers.
    """
    if getattr(config, "target_parameters", None) or method.name == "trainable_tokens":
        return
    tuner = tuner_of(config)
    try:
        tuner.__new__(tuner)._prepare_adapter_config(config, lm.config.to_dict())  # which only reads its class
    except ValueError:
        all_linear = linears(lm, lm.get_output_embeddings())
        if method.name in _NOT_LINEAR:
            there = sorted({n.rpartition(".")[2] for n in (known if method.name == "ln_tuning" else all_linear)})
            raise ZooError(
                f"{method.owner} has no target_modules for the family {lm.config.model_type!r}: name them. The model "
                f"has {', '.join(there)}."
            ) from None
        config.target_modules = all_linear
    for field in _LISTS:
        words = getattr(config, field, None)
        if isinstance(words, str):  # PEFT's own pattern
            setattr(config, field, [n for n in known if re.fullmatch(words, n)])
        elif words:
            setattr(config, field, [n for n in known if any(means(word, n) for word in words)])


def _keep_layers(config: Any, words: Any) -> None:
    """Leave the targets in the layers of `layers_to_transform`, which PEFT disregards for whole names.

    Args:
        config: with whole names.
        words: its targets as they were given; a whole name among them is meant in any layer.

    Raises:
        ZooError: they have none.
    """
    layers, names = getattr(config, "layers_to_transform", None), getattr(config, "target_modules", None)
    if layers is None or layers == [] or not names:
        return
    tuner, short = tuner_of(config), copy.copy(config)
    kept = []
    for name in names:
        short.target_modules = [name.rpartition(".")[2]]
        if name in words or tuner._check_target_module_exists(short, name):
            kept.append(name)
    if not kept:
        raise ZooError(f"layers_to_transform={layers} leaves none of the target_modules.")
    config.target_modules = kept


def _changed(config: Any, known: dict[str, nn.Module], lm: Any) -> list[str]:
    """The paths of all modules that PEFT replaces."""
    tuner = tuner_of(config)
    if hasattr(config, "target_modules") and config.target_modules is not None:
        found = [n for n in known if tuner._check_target_module_exists(config, n)]
    else:
        found = []
    for word in getattr(config, "target_parameters", None) or []:
        parameters = [n for n, _ in lm.named_parameters()]
        hits = [n for n in parameters if n == word or n.endswith(f".{word}")]
        if not hits:
            raise unknown(
                f"parameter of {type(lm).__name__} (target_parameters)", word, fused_experts(lm) or parameters
            )
        found += [n.rpartition(".")[0] for n in hits]
    tokens = getattr(config, "trainable_token_indices", None)
    if tokens is not None or (hasattr(config, "token_indices") and not found):
        names = list(tokens) if isinstance(tokens, dict) else None
        embedding = next(n for n, m in known.items() if m is lm.get_input_embeddings())
        found += _named("trainable_token_indices", names, known, lm) if names else [embedding]
    if not found:
        raise ZooError("exclude_modules leaves none of the target_modules.")
    return list(dict.fromkeys(found))
