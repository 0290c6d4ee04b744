"""Notes on what is left out of a preset or a trained model: trained weights, options of parts, adapters."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.registry.presets import shown
from zoo.settings import presets
from zoo.settings.config import Typed
from zoo.settings.overrides import choose, typed_values


def unused_weights(typed: Typed, start: str) -> Iterator[str]:
    """Note that a run trains the parts of a named preset anew.

    Args:
        typed: the words of the run.
        start: the `model=` that starts from the preset's trained weights; empty: it has none.
    """
    if start and (model := _preset_in(typed_values(typed.overrides), typed)):
        yield f"model={model} trains its parts anew; model={start} goes on from its trained weights."


def unused_options(typed: Typed) -> Iterator[str]:
    """Note options of a named preset that do not reach a part, since the run gives it another checkpoint or family.

    Args:
        typed: the words of the run.
    """
    given = typed_values(typed.overrides)
    if not (model := _preset_in(given, typed)):
        return
    choice = choose("load", given, typed.config_dir)
    without = choice.without
    for slot in ("vision", "llm"):
        keys = [key for key in ("checkpoint", "model", "model_type") if given.get(f"{slot}.{key}")]
        if slot in given or slot not in without or not keys:
            continue  # a part that was chosen anew has options of its own
        own = choice.own_of_model.get(slot, "")
        stated = presets.spelled_out(
            slot, own, presets.section("model", model, slot, typed.config_dir), typed.config_dir
        )
        names = [name for name in stated if not without[slot] or name in without[slot]]
        gone = [f"{name}={_written(stated[name])}" for name in names if f"{slot}.{name}" not in given]
        if gone:
            word = f"{slot}.{keys[0]}={given[f'{slot}.{keys[0]}']}"
            yield f"{word}: options of the {slot} of model {model} are left out: {', '.join(gone)}."


def left_adapters(stated: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return the adapters of a saved model, of its slots `stated`, that a composition of it leaves out."""
    return [name for name in stated.get("adapter") or {} if name not in (ours.get("adapter") or {})]


def unfit_without(left: list[str], stated: Mapping[str, Any], ours: Mapping[str, Any], folder: Path) -> str:
    """Say, where weights do not fit, that they are of a model with adapters, and how these are kept.

    Args:
        left: adapters that are left out.
        stated, ours: slots of the saved model, and of the composition.
        folder: of the saved model.
    """
    both = dict.fromkeys([*stated["adapter"], *(ours.get("adapter") or {})])
    names = ", ".join(map(repr, left))
    return (
        f"  They are of a model with adapter {names}, which is left out. Keep it: adapter=[{','.join(both)}]. Or merge "
        f"it into the language model first: zoo export dir:{folder} OUT --format safetensors --merge; then dir:OUT."
    )


def _preset_in(given: Mapping[str, Any], typed: Typed) -> str:
    """Return the named preset that was typed; empty: none was."""
    model = given.get("model")
    return model if isinstance(model, str) and model in presets.available("model", typed.config_dir) else ""


def _written(value: Any) -> str:
    if not isinstance(value, Mapping):
        return shown(value)
    return f"{{{', '.join(f'{key}: {shown(one)}' for key, one in value.items())}}}"
