"""Which modules of a language model PEFT's options mean, resolved to whole names and checked before PEFT sees them."""

import re
from typing import Any

from torch import nn

from zoo.fusion.adapters.peft.methods import Method, tuner_of
from zoo.fusion.attach import fused_experts, linears, means
from zoo.registry import ZooError, nearest, unknown

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
    known = {n: m for n, m in lm.named_modules() if n}
    for field in _LISTS:
        given = getattr(config, field, None)
        if given == "all-linear":
            setattr(config, field, linears(lm, lm.get_output_embeddings()))
        elif given:
            setattr(config, field, _named(field, given, known, lm))
    if getattr(config, "target_modules", None) is None and hasattr(config, "target_modules"):
        _put_defaults(config, method, lm, known)
    for field in [f for f in vars(config) if f.endswith("_pattern") and isinstance(getattr(config, f), dict)]:
        spelt = {}
        for name, value in getattr(config, field).items():
            spelt |= {re.escape(n): value for n in _named(field, [name], known, lm)}
        setattr(config, field, spelt)
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
            raise ZooError(f"{field} has {word!r}, which {type(lm).__name__} lacks.{hint} Modules: {', '.join(short)}.")
        chosen |= set(hits)
    return [n for n in known if n in chosen]


def _put_defaults(config: Any, method: Method, lm: Any, known: dict[str, nn.Module]) -> None:
    """Set the targets that PEFT has for a family.

    Raises:
        ZooError: it has none.
    """
    if getattr(config, "target_parameters", None) or method.name == "trainable_tokens":
        return
    family = lm.config.model_type
    found = getattr(tuner_of(config), "target_module_mapping", {}).get(family)
    if found is None:
        there = sorted({n.rpartition(".")[2] for n in linears(lm, lm.get_output_embeddings())})
        raise ZooError(
            f"{method.owner} has no target_modules for the family {family!r}: name them. Linear layers: "
            f"{', '.join(there)}; all-linear means all but the vocabulary projection."
        )
    if isinstance(found, str):  # PEFT's own pattern
        config.target_modules = [n for n in known if re.fullmatch(found, n)]
    else:
        config.target_modules = [n for n in known if any(means(word, n) for word in found)]
    if hasattr(config, "feedforward_modules") and config.feedforward_modules is None:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD

        words = FEEDFORWARD.get(family, [])
        config.feedforward_modules = [n for n in config.target_modules if any(means(word, n) for word in words)]


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
            raise unknown(f"parameter of {type(lm).__name__} (target_parameters)", word, fused_experts(lm) or parameters)
        found += [n.rpartition(".")[0] for n in hits]
    tokens = getattr(config, "trainable_token_indices", None)
    if tokens is not None or (hasattr(config, "token_indices") and not found):
        names = list(tokens) if isinstance(tokens, dict) else None
        embedding = next(n for n, m in known.items() if m is lm.get_input_embeddings())
        found += _named("trainable_token_indices", names, known, lm) if names else [embedding]
    if not found:
        raise ZooError("The options mean no module of the language model: target_modules and exclude_modules cancel out.")
    return list(dict.fromkeys(found))
