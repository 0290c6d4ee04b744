"""Which sizes an encoder may have: asked by the options of each, before one is built."""

from typing import Any

from zoo.registry import ZooError

# Upper bounds of sizes, far above every encoder: building a larger one would take hours or exhaust the memory.
_MOST = {"image_size": 2**14, "width": 2**16, "depth": 1000, "registers": 1024}


def check_divides(patch_size: int, image_size: int) -> None:
    if patch_size < 1 or image_size % patch_size:
        raise ZooError(f"patch_size {patch_size} does not divide image_size {image_size}.")


def check_sizes(config: Any) -> None:
    """Check the sizes of an encoder with random weights: patch_size, image_size, width, heads, depth."""
    for name, most in _MOST.items():
        if not 0 <= getattr(config, name, 0) <= most:
            raise ZooError(f"{name} must be from 0 to {most}, got {getattr(config, name)}.")
    if not 0 < config.mlp_ratio <= 64:
        raise ZooError(f"mlp_ratio must be more than 0 and 64 at most, got {config.mlp_ratio}.")
    check_divides(config.patch_size, config.image_size or 224)
    if config.heads < 1 or config.width % config.heads or config.depth < 1:
        raise ZooError(
            f"width must be a multiple of heads and depth at least 1, got width {config.width},"
            f" heads {config.heads}, depth {config.depth}."
        )
