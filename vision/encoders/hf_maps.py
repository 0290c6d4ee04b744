"""Encoders of transformers with feature maps, by its backbone classes: ConvNeXt, Swin, ResNet, Hiera and their like."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ZooError, unknown
from zoo.registry.versions import checkpoint_activations, keep_activations
from zoo.vision.encoders.checkpoints import load_hf
from zoo.vision.encoders.map_runner import MapRunner, stage_index, tables_follow

# Types of `MODEL_FOR_BACKBONE_MAPPING` of transformers whose stages give maps of pixels.
TYPES = (
    "bit", "convnext", "convnextv2", "dinov3_convnext", "focalnet", "hgnet_v2", "hiera", "pvt_v2", "resnet", "swin",
    "swinv2", "textnet",
)  # fmt: skip
# Never cut: FocalNet's stages end with the downsampling for the next, and so do its maps; Hiera's units follow from the
# number of its stages.
WHOLE = {"focalnet", "hiera"}
NORMS = "hidden_states_norms"  # one for each stage that a backbone gives; checkpoints of classifiers have none


def backbone_class(kind: str) -> Any:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    return MODEL_FOR_BACKBONE_MAPPING[CONFIG_MAPPING[kind]]


def map_spec(kind: str, sizes: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    """Return the transformers config of a backbone.

    Args:
        kind: its type.
        sizes: fields for a family that has them.
        fields: further ones, which it must have.

    Raises:
        ZooError: a field that this family has not, or a value that it refuses.
    """
    from transformers import CONFIG_MAPPING

    cls: Any = CONFIG_MAPPING[kind]
    for name in fields:
        if name not in cls.__dataclass_fields__:
            raise unknown(f"field of {cls.__name__}", str(name), cls.__dataclass_fields__)
    known = {k: v for k, v in sizes.items() if k in cls.__dataclass_fields__}
    try:
        return cls(**{**known, **fields})
    except Exception as error:  # transformers checks values by several classes
        raise ZooError(f"transformers refuses this config of a {kind!r}: {' '.join(str(error).split())}") from error


class HFMapRunner(MapRunner):
    """Runs a backbone of transformers up to the map of `stage`: 1 is the first behind the stem, -1 the last.

    Args:
        source: checkpoint; empty: random weights.
        spec: config of the whole encoder; later stages are neither built nor read.
        stage: of `spec.stage_names`, without the stem.
        norm: apply the norm that the backbone has for this stage.
        size: pixels a side.
        meta: build without weights.
    """

    def __init__(self, source: str, spec: Any, stage: int, norm: bool, size: int, meta: bool) -> None:
        super().__init__()
        self.name = source or spec.model_type
        stages = [name for name in spec.stage_names if name != "stem"]
        index = stage_index(stage, len(stages), self.name)
        cls, self.stage = backbone_class(spec.model_type), index + 1
        spec = _cut(spec, index + 1, cls)
        spec.set_output_features_output_indices(out_features=[stages[index]], out_indices=None)
        with torch.device("meta"):
            self.tower = cls(deepcopy(spec))
        self._set_norm(stages[index], norm)
        self.hidden_size = int(self.tower.channels[0])
        idle = self.measure((size, size))
        if not meta:
            # Norms of stages are not in checkpoints of classifiers; a final norm is of another width behind a cut.
            spare = [*idle, *(() if norm else (f"{NORMS}.{stages[index]}.{name}" for name in ("weight", "bias")))]
            self.tower = load_hf(source, cls, spec, "encoder", spare) if source else cls(deepcopy(spec))
            self._set_norm(stages[index], norm)
            self.hold(idle)
        if spec.model_type == "hiera":
            in_units(self.tower)
        tables_follow(self.tower)
        self.lacks |= dict.fromkeys(("key_attention", "keys"), self.NO_SCORES)
        self.patch = (round(size / self.grid[0]), round(size / self.grid[1]))

    def _set_norm(self, stage: str, norm: bool) -> None:
        """Keep the norm of the map, or take it off."""
        norms: Any = getattr(self.tower, NORMS, None)
        if norm and norms is None:
            raise ZooError(f"transformers has no norm for the maps of {self.name!r}: norm must be false.")
        if not norm and norms is not None:
            norms[stage] = nn.Identity()

    def map(self, pixel_values: Tensor) -> Tensor:
        maps: tuple[Tensor, ...] = self.tower(pixel_values).feature_maps
        return maps[0]

    def set_attention(self, name: str) -> None:
        if self.tower._supports_sdpa:  # others have no attention, or one kernel
            self.tower.set_attn_implementation("eager" if name.endswith("eager") else name)

    def set_gradient_checkpointing(self, enable: bool) -> None:
        with suppress(ValueError):  # of families that cannot: they keep their activations
            (checkpoint_activations if enable else keep_activations)(self.tower)


def in_units(tower: Any) -> None:
    """Let Hiera's backbone order patches by the units that it pools and attends in.

    HieraModel does, with which checkpoints were trained; HieraBackbone of transformers 5.24 leaves it out, and its
    units are then pieces of rows.
    """
    if not hasattr(tower, "unroll_schedule"):  # which HieraModel does it by
        tower.embeddings.register_forward_hook(partial(_in_units, tower.config))


def _in_units(config: Any, module: nn.Module, args: tuple[Tensor, ...], out: tuple[Any, ...]) -> tuple[Any, ...]:
    from transformers.models.hiera.modeling_hiera import unroll

    schedule = [config.query_stride] * (len(config.depths) - 1)
    height, width = args[0].shape[-2:]
    return (unroll(out[0], image_shape=(height, width), patch_stride=config.patch_stride, schedule=schedule), *out[1:])


def _cut(spec: Any, count: int, cls: Any) -> Any:
    """Return the config of the first `count` stages: those behind them are then not built.

    A family whose config cannot say that stays whole; weights that its map does not depend on do not train.
    """
    whole = len(spec.depths) if hasattr(spec, "depths") else 0
    if not whole or count >= whole or spec.model_type in WHOLE:
        return deepcopy(spec)
    plain = {k: v for k, v in spec.to_dict().items() if k in type(spec).__dataclass_fields__}
    plain |= {k: list(v)[:count] for k, v in plain.items() if isinstance(v, (list, tuple)) and len(v) == whole}
    plain |= {k: count for k in ("num_stages", "num_encoder_blocks") if plain.get(k) == whole}
    for name in ("hidden_size", "num_hidden_layers", "out_features", "out_indices", "stage_names"):
        plain.pop(name, None)  # these follow from the others
    try:
        smaller = type(spec)(**plain)
        with torch.device("meta"):
            cls(deepcopy(smaller))
    except Exception:  # a field that counts stages in another way
        return deepcopy(spec)
    return smaller
