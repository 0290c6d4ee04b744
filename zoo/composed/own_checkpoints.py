"""The parts of a model that may have a checkpoint of their own: the encoder, or each of several, and the LLM."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zoo.registry import ZooError, unknown


class Own(NamedTuple):
    """A part with options that may name a checkpoint.

    Attributes:
        kind: of the part.
        path: of its options among the slots, and of its module in the model.
        option, revision: names of the options.
        inside: of the module, where its weights are: `text.` for a text tower.
    """

    kind: str
    path: tuple[str, ...]
    option: str = "checkpoint"
    revision: str = "revision"
    inside: str = ""

    @property
    def part(self) -> str:
        """As `ZooModel.part_of` names it: vision, llm; vision.X for one of several encoders."""
        return ".".join(word for word in self.path if word != "encoders")

    @property
    def module(self) -> str:
        """Name of its module: vision, llm; vision.encoders.X."""
        return ".".join(self.path)

    def of(self, parts: Any) -> Any:
        """Return the module itself, of a model or its parts; None where the slot is empty."""
        part = getattr(parts, self.kind)
        return part.members[self.path[-1]] if part is not None and len(self.path) > 1 else part


def own_checkpoints(slots: Mapping[str, Any]) -> dict[str, Own]:
    """Return what may have a checkpoint of its own, by its key among the bases of a model.

    The text tower of an encoder comes first: where it has one, its weights are not from the encoder's.
    """
    found: dict[str, Own] = {}
    for path in encoder_paths(slots.get("vision")):
        of = ".".join(["", *path[2:]])
        found[f"text_tower{of}"] = Own("vision", path, "text_checkpoint", "text_revision", "text.")
        found[f"vision{of}"] = Own("vision", path)
    return {**found, "llm": Own("llm", ("llm",))}


def encoder_paths(vision: Any) -> list[tuple[str, ...]]:
    """Return the path of each encoder's options: of the slot, or below it where it joins several."""
    node = vision or {}
    several = node.get("encoders") if node.get("name") == "fused" else None
    return [("vision", "encoders", str(name)) for name in several or ()] or [("vision",)]


def node_at(slots: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the options at a path; empty where there are none."""
    node: Any = slots
    for key in path:
        node = (node or {}).get(key)
    return node or {}


def with_node(slots: Mapping[str, Any], path: tuple[str, ...], node: Any) -> dict[str, Any]:
    """Return the slots with other options at a path; the given ones are not changed."""
    head, *rest = path
    return {**slots, head: with_node(slots[head], tuple(rest), node) if rest else node}


def checkpoints_at(slots: Mapping[str, Any], places: Mapping[str, Any]) -> dict[str, Any]:
    """Return the slots with checkpoints that lie elsewhere now.

    Args:
        slots: options of the parts.
        places: key among the bases of a model (vision, llm, ...) -> folder.

    Raises:
        ZooError: there is no such key.
    """
    known, found = own_checkpoints(slots), dict(slots)
    for key, place in places.items():
        if key not in known:
            raise unknown("part with a checkpoint (base)", str(key), known)
        own = known[key]
        found = with_node(found, own.path, {**node_at(found, own.path), own.option: str(place)})
    return found


def require_there(slots: Mapping[str, Any]) -> None:
    """Refuse a saved model whose parts name folders that are gone, and say how to name them again.

    Raises:
        ZooError: a checkpoint is named by an absolute path, and does not exist.
    """
    for key, own in own_checkpoints(slots).items():
        checkpoint = str(node_at(slots, own.path).get(own.option) or "")
        if Path(checkpoint).is_absolute() and not Path(checkpoint).exists():
            raise ZooError(
                f"The {own.part} of this model is from {checkpoint!r}, and there is no such folder. If it lies "
                f"elsewhere now: {own.module}.{own.option}=<folder>, or from_pretrained(..., base={{{key!r}: folder}})."
            )


def have_checkpoints(slots: Mapping[str, Any]) -> bool:
    """Whether an encoder or the LLM names a checkpoint of its own."""
    return any(
        node_at(slots, own.path).get(own.option) for key, own in own_checkpoints(slots).items() if not own.inside
    )
