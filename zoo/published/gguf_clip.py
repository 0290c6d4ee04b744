"""The encoder and projector of a GGUF file, as llama.cpp's clip reads LLaVA's: CLIP or SigLIP and two linear layers."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.registry import ZooError

ENCODERS = ("clip_vision_model", "siglip_vision_model")
_USE_GELU = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}  # of the encoder; clip's own is quick_gelu
_BLOCK = re.compile(r"\.encoder\.layers\.(\d+)\.")
_UNUSED = re.compile(r"\.(post_layernorm|head)\.|position_ids$")  # LLaVA takes tokens before the last norm


def blocks_of(config: Any) -> int:
    """Return the number of encoder blocks that image tokens go through."""
    layer = config.vision_feature_layer
    return layer if layer >= 0 else config.vision_config.num_hidden_layers + layer + 1


def require_clip(config: Any) -> None:
    """Refuse an encoder or a projector that clip has no name for, or computes otherwise.

    Args:
        config: a `LlavaConfig` of transformers.

    Raises:
        ZooError: with the reason.
    """
    vision, wrong = config.vision_config, []
    if vision.model_type not in ENCODERS:
        wrong.append(f"it has no names for the encoder {vision.model_type!r}, only for {' and '.join(ENCODERS)}")
    elif vision.hidden_act not in _USE_GELU:
        wrong.append(f"the encoder's activation is {vision.hidden_act!r}; it computes {', '.join(_USE_GELU)}")
    elif vision.intermediate_size == vision.hidden_size:
        wrong.append("the encoder's feed-forward layers are as wide as its tokens, which it reads the other way round")
    if blocks_of(config) < 1:
        wrong.append("image tokens are the encoder's embeddings, and it runs one block at least")
    if config.projector_hidden_act not in ("gelu", "gelu_pytorch_tanh"):
        wrong.append(f"the projector's activation is {config.projector_hidden_act!r}, and it computes 'gelu'")
    if not config.multimodal_projector_bias:
        wrong.append("the projector has no biases, and it adds some")
    if wrong:
        raise ZooError(
            f"llama.cpp's clip cannot show this model images: {'; '.join(wrong)}. For transformers: --format hf."
        )


def clip_fields(writer: Any, config: Any, processor: Any, name: str) -> None:
    """Add the metadata of encoder and projector.

    Args:
        writer: of the package gguf.
        config: a `LlavaConfig` of transformers.
        processor: of the composed model.
        name: of the model.
    """
    vision, transform = config.vision_config, processor.transform
    writer.add_type("mmproj")
    writer.add_name(name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)  # readers before 2025 ask for it
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(blocks_of(config))
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean([float(x) for x in transform.mean])
    writer.add_vision_image_std([float(x) for x in transform.std])
    writer.add_vision_use_gelu(_USE_GELU[vision.hidden_act])
    writer.add_array("clip.vision.feature_layer", [blocks_of(config)])  # else the last block would be left out


def clip_tensors(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return the weights of encoder and projector by clip's names.

    Args:
        state: by the names of published LLaVA files.
        config: a `LlavaConfig` of transformers.
    """
    import gguf

    blocks = blocks_of(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(blocks, 3))
    found: dict[str, Tensor] = {}
    for file_name, tensor in state.items():
        if file_name.startswith("language_model.") or _UNUSED.search(file_name):
            continue
        at = _BLOCK.search(file_name)
        if at and int(at[1]) >= blocks:
            continue
        if file_name.startswith("multi_modal_projector.linear_"):
            number, _, kind = file_name.removeprefix("multi_modal_projector.linear_").partition(".")
            found[f"mm.{2 * (int(number) - 1)}.{kind}"] = tensor  # mm.1 is the activation between them
            continue
        ours = names.get_name(file_name, try_suffixes=(".weight", ".bias"))
        if ours is None:
            raise ZooError(f"llama.cpp's clip has no name for the weight {file_name}.")
        found[ours] = tensor
    return found
