"""Tiny models of the Qwen-VL families: encoders, and transformers' own towers and processors beside them."""

import numpy as np
import torch
from PIL import Image

from zoo.vision.encoders.qwen import QwenVision, QwenVisionConfig

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
NATIVE = [*FAMILIES, "glm4v", "paddleocr_vl"]
SIZES = {"width": 32, "heads": 2, "depth": 4, "patch_size": 4, "out_width": 64, "max_pixels": 64 * 64, "min_pixels": 64}
EXTRA = {
    "qwen2_vl": {},
    "qwen2_5_vl": {"window_size": 16, "fullatt_block_indexes": [1, 3]},
    "qwen3_vl": {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1, 2]},
}
EXTRA["qwen3_vl_moe"] = EXTRA["qwen3_vl"]
EXTRA["glm4v"] = EXTRA["paddleocr_vl"] = {"image_size": 24}


def encoder_node(family: str, **options) -> dict:
    return {"name": "qwen_vision", "model_type": family, **SIZES, "extra": EXTRA[family], **options}


def encoder(family: str, seed: int = 0, **options) -> QwenVision:
    """An encoder whose attention is sharp enough for a wrong segment to show."""
    torch.manual_seed(seed)
    node = encoder_node(family, **options)
    node.pop("name")
    made = QwenVision(QwenVisionConfig(**node)).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.mul_(6) if p.dim() > 1 and "merger" not in name else None
    return made


def patches(vision: QwenVision, grids, seed: int = 0):
    """Random pixels of rows with these grids, in tokens: (S, P)."""
    unit, width = vision.patch_shape
    n = sum(h * w for h, w in grids) * unit
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB"):
    """Noise of a size."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def slots(family: str, **replaced) -> dict:
    """Slots of a tiny model of the family: 64 wide, 3 layers, its own encoder, positions of three axes."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    if family.startswith("qwen3"):
        rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    rope |= {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5} if family == "glm4v" else {}
    llm = {"name": "hf", "model_type": f"{family}_text", "hidden_size": 64, "num_layers": 4, "num_heads": 4}
    llm |= {"num_kv_heads": 2, "intermediate_size": 96, "max_positions": 1024, "extra": {"rope_parameters": rope}}
    llm |= {"num_experts": 4, "top_k": 2} if family.endswith("moe") else {}
    parts = {
        "vision": encoder_node(family),
        "projector": {"name": "identity"},
        "layout": {"name": "native"},
        "llm": llm,
    }
    return {**parts, **replaced}


def sharpen(model, factor: float = 4.0) -> None:
    """Make weights large enough for a wrong mask or position to show."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(factor) if p.dim() > 1 and "merger" not in name and "lm_head" not in name else None


def whole_of(model, family: str, attention: str = "sdpa"):
    """The class of transformers with the weights of a composed model."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    vision = {k: v for k, v in model.vision.tower.config.to_dict().items() if k != "model_type"}
    text = model.llm.lm.config.to_dict()
    config = CONFIG_MAPPING[family](text_config=text, vision_config=vision, tie_word_embeddings=False)
    config.image_token_id, config.video_token_id = model.config.image_token_id, model.llm.vocab_size - 1
    config.vision_start_token_id = config.vision_end_token_id = model.llm.vocab_size - 2
    theirs = AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()
    theirs.model.language_model.load_state_dict(model.llm.decoder.state_dict())
    for mine, other in towers(model, theirs):
        other.load_state_dict(mine.state_dict())
    theirs.lm_head.load_state_dict(model.llm.lm.lm_head.state_dict())
    return theirs


def towers(model, theirs) -> list:
    """The encoder of a composed model, and that of transformers' class: PaddleOCR-VL's are the ViT and the merger."""
    inner, tower = theirs.model, model.vision.tower
    if hasattr(inner, "projector"):
        return [(tower.visual, inner.visual), (tower.projector, inner.projector)]
    return [(tower, inner.visual)]


def for_whole(batch: dict, image_token_id: int) -> dict:
    """The inputs of transformers' class for a batch of ours."""
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if cuts := batch.get("cuts"):
        grids = torch.tensor([(c.rows, 2 * c.patches[0], 2 * c.patches[1]) for c in cuts])
        shown = batch["pixel_values"]
        one_frame = shown.shape[1] == 3 * SIZES["patch_size"] ** 2  # PaddleOCR-VL's, which are not flat there
        given |= {"pixel_values": shown.unflatten(1, (3, 4, 4)) if one_frame else shown, "image_grid_thw": grids}
        given["mm_token_type_ids"] = (batch["input_ids"] == image_token_id).int()
    return given
