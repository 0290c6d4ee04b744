"""Presets of a component: values of its options under a name, with where they were published."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from zoo.registry.errors import ZooError, unknown, unknown_option
from zoo.registry.options import Option

PRESET = "preset"  # in the place of an option: pruner.fastervlm.preset=llava15_144


@dataclass(frozen=True)
class Preset:
    """Values of options, such as those of a paper for one model. Options that it leaves out stay as they are."""

    options: Mapping[str, Any]
    source: str  # where the values are from: the paper's table, a script of the release

    @property
    def text(self) -> str:
        return " ".join(f"{name}={shown(value)}" for name, value in self.options.items())


def shown(value: Any) -> str:
    """Write the value of an option as on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(shown, value))}]"
    return str(value)


def preset_called(name: str, owner: str, presets: Mapping[str, Preset]) -> Preset:
    """Return a preset of `owner` ("pruner 'fastervlm'") by name.

    Raises:
        ZooError: there is none of that name; with the nearest.
    """
    if name not in presets:
        raise unknown(f"preset of {owner}", name, presets)
    return presets[name]


def written_out(node: Mapping[str, Any], owner: str, presets: Mapping[str, Preset]) -> Mapping[str, Any]:
    """Return a node with the options of its preset in place of the name. Options given beside it have precedence.

    Raises:
        ZooError: there is no preset of that name.
    """
    given = {key: value for key, value in node.items() if key != PRESET}
    if node.get(PRESET) is None:
        return given
    return {**preset_called(str(node[PRESET]), owner, presets).options, **given}


def require_presets(presets: Any, owner: str, options: list[Option]) -> None:
    """Refuse presets that are none, or that set what `owner` does not have.

    Raises:
        ZooError: with the preset and the nearest option.
    """
    known = {option.name for option in options}
    if PRESET in known:
        raise ZooError(f"{owner}: an option cannot be called 'preset', which chooses one of its presets.")
    for name, preset in _items(presets, owner):
        for option in preset.options:
            if option not in known:
                raise ZooError(f"Preset {name!r}: {unknown_option(owner, option, options)}")


def _items(presets: Any, owner: str) -> Iterator[tuple[str, Preset]]:
    wrong = presets if not isinstance(presets, Mapping) else [p for p in presets.values() if not isinstance(p, Preset)]
    if wrong or not isinstance(presets, Mapping):
        example = '{"llava15_144": Preset({"num_keep": 144}, "table 1 of the paper")}'
        raise ZooError(f"{owner}: `presets` is a dict such as {example}, got {presets!r}.")
    yield from presets.items()
