"""Several encoders as a person writes them, `vision=[dinov2_small,timm]`: the encoder `fused`, with options of each.

They are named after their components or presets; `vision=[sem:hf,loc:hf]` gives them names of their own.
"""

import re
from collections.abc import Sequence
from typing import Any

from zoo.registry import ZooError

FUSED = "fused"


def with_encoders(words: Sequence[str]) -> list[str]:
    """Return overrides with a list of encoders as the encoder that joins them.

    Beside `resume` a word may name the new place of a checkpoint of one of them.

    Raises:
        ZooError: two have one name.
    """
    found: list[str] = []
    if any(word.startswith("resume=") for word in words):  # new places of checkpoints: the run knows the rest
        moved = dict.fromkeys(m[1] for word in words if (m := re.match(r"vision\.encoders\.(\w+)\.checkpoint=", word)))
        found += [f"vision={FUSED}"] * bool(moved) + [f"vision.encoders.{name}.name=hf" for name in moved]
    for word in words:
        listed = re.fullmatch(r"vision=\[([^\[\]{}]*)\]", word)
        names = [part.strip().strip("'\"") for part in listed[1].split(",")] if listed else []
        if len(names) < 2:
            found.append(word)
            continue
        nodes = ", ".join(f"{key}: {{name: {node['name']}}}" for key, node in nodes_of(names).items())
        found += [f"vision={FUSED}", f"vision.encoders={{{nodes}}}"]
    return found


def nodes_of(listed: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Return the options of listed encoders by their names: `timm`, or `loc:timm`.

    Raises:
        ZooError: two have one name, or one has none.
    """
    nodes: dict[str, dict[str, Any]] = {}
    for item in map(str, listed):
        key, _, component = item.rpartition(":")
        if not component.strip():
            raise ZooError(f"vision=[{','.join(map(str, listed))}] has an encoder without a name: leave out a comma.")
        key = key.strip() or component.strip()
        if key in nodes:
            raise ZooError(
                f"vision=[{','.join(map(str, listed))}] has two encoders named {key!r}: give them names of their own, "
                f"vision=[a:{component},b:{component}]."
            )
        nodes[key] = {"name": component.strip()}
    return nodes
