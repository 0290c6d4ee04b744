"""Convert the encoder of a composed model for published layouts: a config of transformers, and weights by its names.

Encoders of transformers are written as they are, those of timm and open_clip as their twins (`zoo.published.twins`). A
composed model keeps the blocks up to the layer that it uses; so does what is written, unless a checkpoint gives the
others.
"""

from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.registry import ZooError
from zoo.vision.encoders.map_runner import MapRunner
from zoo.vision.encoders.next_block import NextBlock

# Encoders of one kind under several names: same weights, same computation for images of full size.
_SAME = {"siglip_vision_model": ("idefics3_vision", "smolvlm_vision"),
         "idefics3_vision": ("siglip_vision_model", "smolvlm_vision"),
         "smolvlm_vision": ("siglip_vision_model", "idefics3_vision")}  # fmt: skip


@dataclass
class Encoder:
    """An encoder in a published layout.

    Attributes:
        config: of transformers.
        tensors: by our names (`vision.tower.encoder...`), inside of the tower as files or modules name them.
        layer: that image tokens are taken from, in `hidden_states`.
        norm: the final norm is applied to them.
        num_prefix: number of tokens before the patches.
    """

    config: Any
    tensors: dict[str, Tensor]
    layer: int
    norm: bool
    num_prefix: int


def encoder_of(model: Any, kinds: Collection[str], depth: int = 0) -> Encoder:
    """Convert the encoder of a composed model to one of the kinds that a layout supports.

    Args:
        model: composed.
        kinds: `model_type`s of transformers.
        depth: blocks of the checkpoint whose unused ones are written too; 0: those that the model has.

    Raises:
        ZooError: it is of no such kind, and why.
    """
    vision, node = model.vision, (model.config.slots or {}).get("vision") or {}
    if vision is None:
        raise ZooError("the model has no vision part")
    name = node.get("name")
    if vision.members:
        listed = ", ".join(map(repr, vision.members))
        raise ZooError(
            f"the vision part joins {len(vision.members)} encoders ({listed}), and published layouts have one"
        )
    if vision.native:
        config = deepcopy(vision.tower.config)
        if config.model_type not in kinds:
            raise ZooError(
                f"its encoder is of type {config.model_type!r}, and the layout takes {', '.join(sorted(kinds))}"
            )
        return Encoder(config, {f"vision.{n}": t for n, t in vision.state_dict().items()}, -1, False, 0)
    if name not in ("hf", "timm", "open_clip"):
        raise ZooError(f"the vision part {name!r} is not an encoder of transformers, timm or open_clip")
    if isinstance(vision.runner, MapRunner):
        raise ZooError(f"its tokens are a feature map of a {type(vision.runner.tower).__name__}, not those of a ViT")
    if name == "hf":
        config, tensors = deepcopy(vision.runner.tower.config), _state(vision)
        if vision.runner.interpolate or _size(config) not in (None, vision.transform.size[0]):
            tensors |= _positions(vision, config)
    else:
        from zoo.published.twins import as_transformers, plain_vit

        config, twin = as_transformers(plain_vit(vision.runner.tower))
        tensors = {f"vision.tower.{key}": tensor for key, tensor in twin.items()}
    layer, blocks = int(node.get("layer", -2)), int(config.num_hidden_layers)
    config = _as_kind(config, kinds, max(depth, blocks))
    if depth <= blocks:
        layer = -1
    return Encoder(config, tensors, layer, bool(node.get("norm")), vision.runner.num_prefix)


def _state(vision: Any) -> dict[str, Tensor]:
    """Return the weights of both towers, without what only pruners use: a pooling head, the block behind the layer."""
    spare = tuple(f"{name}." for name, part in vision.named_modules() if isinstance(part, NextBlock))
    of_towers = {n: t for n, t in vision.state_dict().items() if n.startswith(("tower.", "frame_tower."))}
    return {f"vision.{n}": t for n, t in of_towers.items() if not n.startswith(spare)}


def _size(config: Any) -> int | None:
    size = getattr(config, "image_size", None)
    return int(size[0]) if isinstance(size, (list, tuple)) else size


def _as_kind(config: Any, kinds: Collection[str], blocks: int) -> Any:
    """Return the config of an encoder with `depth` blocks as one of `kinds`."""
    from transformers import CONFIG_MAPPING

    alike = (config.model_type, *_SAME.get(config.model_type, ()))
    kind = next((k for k in alike if k in kinds), None)
    if kind is None:
        raise ZooError(f"its encoder is of type {config.model_type!r}, and the layout takes {', '.join(sorted(kinds))}")
    cls: Any = CONFIG_MAPPING[kind]
    derived = {"architectures", "model_type", "out_features", "out_indices", "num_hidden_layers"}
    fields = {k for k in cls.__dataclass_fields__ if not k.startswith("_")} - derived
    return cls(**{k: v for k, v in config.to_dict().items() if k in fields}, num_hidden_layers=blocks)


@torch.no_grad()
def _positions(vision: Any, config: Any) -> dict[str, Tensor]:
    """Positions for the size of image that the model was composed for, and that size in the config.

    A composed model interpolates them anew for each image, which transformers' vision-language classes do not.
    """
    size, prefix = vision.transform.size[0], vision.runner.num_prefix
    found: dict[str, Tensor] = {}
    for name in ("tower", "frame_tower"):
        embeddings = getattr(getattr(vision, name, None), "embeddings", None)
        if embeddings is None:
            continue
        key = next((k for k in ("position_embedding", "position_embeddings") if hasattr(embeddings, k)), "")
        if not key or not hasattr(embeddings, "interpolate_pos_encoding"):
            raise ZooError(
                f"its encoder was made for images of {_size(config)} pixels, the model takes {size}, and positions of "
                f"{config.model_type!r} cannot be written for another size"
            )
        table = getattr(embeddings, key)
        in_module = hasattr(table, "weight")
        width = (table.weight if in_module else table).shape[-1]
        new = embeddings.interpolate_pos_encoding(torch.zeros(1, vision.num_tokens + prefix, width), size, size)
        found[f"vision.{name}.embeddings.{key}{'.weight' * in_module}"] = new[0] if in_module else new
    config.image_size = [size, size] if isinstance(config.image_size, (list, tuple)) else size
    return found
