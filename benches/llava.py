"""LLaVA twice: transformers' `LlavaForConditionalGeneration`, and the same sizes and weights composed of our parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.composed.model import ZooModel
from zoo.model_config import ZooConfig
from zoo.registry import IGNORE_INDEX, ZooError

LORA = {"lora": {"name": "lora", "rank": 8, "alpha": 16.0}}
IMAGE_TOKEN = 3  # id of the placeholder; text takes ids above it


@dataclass(frozen=True)
class Sizes:
    """Of a CLIP tower, a two-layer projector and a Llama."""

    image_size: int = 96
    patch_size: int = 16
    vision_width: int = 192
    vision_depth: int = 6
    vision_heads: int = 3
    layer: int = -2  # LLaVA's own choice
    text_width: int = 256
    text_depth: int = 6
    text_heads: int = 4
    intermediate: int = 688
    vocab: int = 4096
    text_kv_heads: int = 0  # 0: as many as heads
    tied: bool = False  # one matrix for embedding and vocabulary projection

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def describe(self) -> str:
        return (
            f"CLIP {self.vision_depth} x {self.vision_width} at {self.image_size} px / {self.patch_size} "
            f"({self.image_tokens} image tokens, layer {self.layer}), Llama {self.text_depth} x {self.text_width} "
            f"(feed-forward {self.intermediate}), vocabulary {self.vocab}"
        )


# Pixels and patch of the encoder, its width, depth, heads, layer; of the LLM width, depth, heads, feed-forward, words.
SIZES = {
    "sketch": Sizes(),
    "scenes_tiny": Sizes(64, 8, 128, 3, 4, -2, 128, 4, 4, 512, 4096),
    "smollm2": Sizes(112, 14, 384, 12, 6, -2, 576, 30, 9, 1536, 49152, text_kv_heads=3, tied=True),
    "tiny": Sizes(16, 8, 16, 2, 2, -2, 16, 2, 2, 32, 64),
}


def config(sizes: Sizes, positions: int, image_token: int, eos: int | None = None, pad: int | None = None) -> Any:
    """Return transformers' config of these sizes, for `positions` positions."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=sizes.vision_width,
            intermediate_size=4 * sizes.vision_width,
            num_hidden_layers=sizes.vision_depth,
            num_attention_heads=sizes.vision_heads,
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
        ),
        text_config=LlamaConfig(
            hidden_size=sizes.text_width,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.text_depth,
            num_attention_heads=sizes.text_heads,
            num_key_value_heads=sizes.text_kv_heads or sizes.text_heads,
            tie_word_embeddings=sizes.tied,
            vocab_size=sizes.vocab,
            max_position_embeddings=positions,
            pad_token_id=pad,
            bos_token_id=None,
            eos_token_id=eos,
        ),
        image_token_id=image_token,  # type: ignore[call-arg]
        vision_feature_layer=sizes.layer,
        image_seq_length=sizes.image_tokens,
        tie_word_embeddings=sizes.tied,
    )


def stock(sizes: Sizes, attention: str | None = None) -> Any:
    """Return transformers' model with random weights; `attention=None` leaves its default."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration(config(sizes, positions=1024, image_token=IMAGE_TOKEN))
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


def composed(
    sizes: Sizes, images: bool = True, llm: Mapping[str, Any] | None = None, positions: str = "auto", **slots: Any
) -> ZooModel:
    """Return the composed model of the same sizes with random weights; the LLM alone without `images`.

    Args:
        sizes: of the parts.
        images: whether it has an encoder and a projector.
        llm: further options of the LLM.
        positions: of image tokens that a pruner left.
        slots: further ones, a pruner for example.
    """
    vision = {"name": "hf", "model_type": "clip", "layer": sizes.layer, "image_size": sizes.image_size}
    vision |= {"patch_size": sizes.patch_size, "width": sizes.vision_width, "depth": sizes.vision_depth}
    vision |= {"heads": sizes.vision_heads}
    text = {"name": "hf", "model_type": "llama", "hidden_size": sizes.text_width, "num_layers": sizes.text_depth}
    text |= {"num_heads": sizes.text_heads, "intermediate_size": sizes.intermediate, "max_positions": 1024}
    text |= {"num_kv_heads": sizes.text_kv_heads, "tie_embeddings": sizes.tied}
    seeing = {"vision": vision, "projector": {"name": "mlp"}} if images else {}
    whole = {**seeing, **slots, "llm": text | dict(llm or {})}
    return ZooModel(
        ZooConfig(slots=whole, image_token_id=IMAGE_TOKEN, text_vocab_size=sizes.vocab, positions=positions)
    )


def twins(sizes: Sizes) -> tuple[Any, ZooModel]:
    """Return both models with the same weights, in eval mode."""
    theirs, ours = stock(sizes).eval(), composed(sizes).eval()
    inner = theirs.model
    ours.vision.tower.load_state_dict(inner.vision_tower.state_dict(), strict=False)  # later blocks are not kept
    ours.llm.lm.model.load_state_dict(inner.language_model.state_dict())
    ours.llm.lm.lm_head.load_state_dict(theirs.lm_head.state_dict())
    linears = [m for m in ours.projector.modules() if isinstance(m, torch.nn.Linear)]
    projector = inner.multi_modal_projector
    for mine, other in zip(linears, (projector.linear_1, projector.linear_2), strict=True):
        mine.load_state_dict(other.state_dict())
    return theirs, ours


def batch(sizes: Sizes, rows: int, length: int, labels: int, seed: int = 0) -> dict[str, Tensor]:
    """Return rows of one image, a question, and an answer of `labels` tokens, all of the same length."""
    if length < 1 + sizes.image_tokens + labels:
        raise ZooError(f"length={length} is too short for {sizes.image_tokens} image tokens and {labels} labels.")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(IMAGE_TOKEN + 1, sizes.vocab, (rows, length), generator=generator)
    ids[:, 1 : 1 + sizes.image_tokens] = IMAGE_TOKEN
    wanted = ids.clone()
    wanted[:, : length - labels] = IGNORE_INDEX
    return {
        "input_ids": ids,
        "labels": wanted,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 3, sizes.image_size, sizes.image_size, generator=generator),
    }


def ours_of(plain: dict[str, Tensor]) -> dict[str, Any]:
    """Return a batch of `batch` as `ZooProcessor.collate` would give it."""
    ids = plain["input_ids"]
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    return {**plain, "position_ids": positions, "images_per_row": [1] * len(ids)}
