"""The text towers of open_clip's models, for encoders of `zoo.vision.encoders.open_clip`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ZooError
from zoo.vision.encoders.base import on_meta
from zoo.vision.encoders.text_tower import Linear, TextTower, Words

_OWN = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection", "cls_emb")
ENDS = ("visual.ln_post.weight", "visual.ln_post.bias", "visual.proj")


def text_tower_of(
    architecture: Mapping[str, Any], visual: nn.Module, source: Path | None, name: str, norm: bool
) -> Callable[[], TextTower] | str:
    """Return what builds the text tower of an encoder and reads its weights, or why there is none.

    Args:
        architecture: config of the model, with `text_cfg`.
        visual: its whole visual tower.
        source: file of weights; None: random ones, or none on the meta device.
        name: of the model, for messages.
        norm: whether the encoder's tokens come behind the final norm.
    """
    text = architecture.get("text_cfg")
    inner: Any = visual
    if not isinstance(text, Mapping):
        return f"the config of {name!r} has no text tower (text_cfg)."
    if hasattr(visual, "trunk"):
        return f"the tower of {name!r} is one of timm; vision=hf reads the text towers of SigLIP's checkpoints."
    if not hasattr(visual, "transformer"):
        return f"the tower of {name!r} is a ResNet, which pools its map before it projects it."
    if text.get("hf_model_name") or text.get("hf_tokenizer_name") or architecture.get("multimodal_cfg"):
        return f"the text tower of {name!r} needs a tokenizer that open_clip does not have; vision=hf may read it."
    if inner.proj is None or inner.ln_post.normalized_shape != (inner.transformer.width,):
        return f"the encoder of {name!r} pools its patches before it projects them."
    return partial(_read, architecture, inner.ln_post.eps, inner.transformer.width, source, name, norm)


def _read(
    architecture: Mapping[str, Any], eps: float, width: int, source: Path | None, name: str, norm: bool
) -> TextTower:
    from open_clip.model import _build_text_tower
    from open_clip.tokenizer import SimpleTokenizer

    made: Any = _build_text_tower(
        architecture["embed_dim"], dict(architecture["text_cfg"]), architecture.get("quick_gelu", False)
    )
    made.output_tokens = False
    project = Linear(width, architecture["embed_dim"], eps, norm=not norm)
    if source is not None and not on_meta():
        _load(made, project, source, name)
    elif not on_meta():
        nn.init.normal_(project.weight, std=width**-0.5)
    tokenizer = SimpleTokenizer(context_length=made.context_length)
    words = Words(tokenizer.encode, [tokenizer.sot_token_id], [tokenizer.eot_token_id], pad=0)
    return TextTower(made, project, words, made.context_length, pad_to_length=True)  # its mask has that length


def _load(made: nn.Module, project: Linear, path: Path, name: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            custom = any(key.startswith("text.") for key in keys)  # CustomTextCLIP
            chosen = {key for key in keys if key.startswith("text." if custom else _OWN)}
            state: dict[str, Tensor] = {key.removeprefix("text."): file.get_tensor(key) for key in chosen}
            if missing := sorted(set(ENDS) - keys):
                raise ZooError(f"{path.name} of {name!r} lacks {missing[0]}, which the text tower is compared through.")
            weight, bias, proj = (file.get_tensor(key) for key in ENDS)
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{str(path)!r} cannot be read: {error}") from error
    try:
        made.load_state_dict(state)
    except RuntimeError as error:
        raise ZooError(f"The text tower of {name!r} does not fit its architecture: {error}") from error
    with torch.no_grad():
        project.weight.copy_(proj.T)
        if project.norm is not None:
            project.norm.weight.copy_(weight)
            project.norm.bias.copy_(bias)
