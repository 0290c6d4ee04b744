"""What a check prints of each of several encoders: sizes, and what parts are given of it."""

from collections.abc import Iterator, Mapping
from typing import Any

from zoo.registry import Encoder
from zoo.text.sizes import count_text


def described(vision: Encoder | None, node: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield a line for each encoder of `vision`, which `node` describes; none for an encoder by itself."""
    members = vision.members if vision is not None else {}
    for name, encoder in members.items():
        given = sorted(word for word in encoder.provides if word != "grid" and vision.giver(word) == name)  # type: ignore[union-attr]
        (h, w), (height, width) = encoder.grid, encoder.transform.size
        count = sum(p.numel() for p in encoder.parameters())
        words = f"; gives {', '.join(given)}" if given else ""
        yield (
            f"vision.{name}: {(node or {})['encoders'][name]['name']}, images of {height} x {width}, "
            f"{h} x {w} tokens of width {encoder.hidden_size}, {count_text(count)} parameters{words}"
        )
    if vision is not None and members:
        grid = vision.token_grid
        tokens = f"on {grid[0]} x {grid[1]} tokens" if grid else f"as {vision.num_tokens} tokens, one behind another,"
        yield f"vision: joined {tokens} of width {vision.hidden_size}"
