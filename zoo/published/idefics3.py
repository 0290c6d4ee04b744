"""Idefics3 and SmolVLM: SigLIP tiles, pixel shuffle, one linear layer; the prompt names the place of each tile.

Paper: Laurencon et al., arXiv:2408.12637; Marafioti et al., arXiv:2504.05299 (SmolVLM). Published as
`HuggingFaceTB/SmolVLM-Instruct`, `SmolVLM-256M-Instruct` (Idefics3) and `SmolVLM2-*` (SmolVLM).
"""

import math
from collections.abc import Mapping
from typing import Any

from zoo.published.encoders import Encoder
from zoo.published.family import Family, layout_misfit, llm_slot, text_options, vision_slot
from zoo.registry import config_of

LARGEST = 4096  # side in pixels that their image processors never exceed
FAKE = "<fake_token_around_image>"
KEYS = (
    ("model.text_model.", "llm.lm.model."),
    ("lm_head.", "llm.lm.lm_head."),
    ("model.vision_model.", "vision.tower."),
    ("model.connector.modality_projection.proj.", "projector.net.0."),
)


def slots(hf: Any, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an `Idefics3Config` or a `SmolVLMConfig`."""
    tie = bool(hf.tie_word_embeddings)
    return {
        "vision": vision_slot(hf.vision_config, pixels, layer=-1, norm=True),
        "projector": {"name": "pixel_shuffle", "factor": hf.scale_factor},
        "layout": {
            "name": "tiles",
            "style": "grid",
            "begin": FAKE,
            "end": FAKE,
            "most": _most(pixels),
        },
        "llm": llm_slot(hf.text_config, tie),
    }


def _most(pixels: Mapping[str, Any]) -> int:
    """Return the largest number of tiles of an image, the overview included."""
    if not pixels.get("do_image_splitting", True):
        return 1
    longest = min(max(filter(None, (pixels.get("size") or {"longest_edge": 4}).values())), LARGEST)
    side = max((pixels.get("max_image_size") or {"longest_edge": 1}).values())
    lines = math.ceil(longest / side)
    return lines**2 + 1 if lines > 1 else 1


def misfit(model: Any, encoder: Encoder) -> str:
    """Return why `Idefics3ForConditionalGeneration` does not support a model."""
    wrong = layout_misfit(model, "tiles", style="grid", begin=FAKE, end=FAKE, overview="<global-img>")
    if not wrong and not encoder.norm:
        wrong = (
            "image tokens are taken before the encoder's final norm, and the layout takes them behind it (vision.norm)"
        )
    return wrong or _projector_misfit(model)


def _projector_misfit(model: Any) -> str:
    name, wanted = model.config.slots["projector"]["name"], {"depth": 1, "bias": False, "norm": False}
    _, node = config_of("projector", model.config.slots["projector"])
    if name == "pixel_shuffle" and all(getattr(node, key) == value for key, value in wanted.items()):
        return ""
    return f"its projector is {name!r}, and the layout's is 'pixel_shuffle' of one linear layer without bias or norm"


def config(model: Any, encoder: Encoder, name: str = "Idefics3Config") -> Any:
    """Translate a composed model to an `Idefics3Config` or a `SmolVLMConfig`."""
    import transformers

    return getattr(transformers, name)(
        vision_config=encoder.config.to_dict(),
        image_token_id=model.image_token_id,
        scale_factor=model.projector.factor,
        **text_options(model),
    )


def processor_options(model: Any, processor: Any) -> dict[str, Any]:
    """Return the arguments by which the processors count image tokens."""
    return {"image_seq_len": model.layout.tokens}


def tokens(model: Any, processor: Any) -> dict[str, str]:
    """Return the tokens that the processors need in the tokenizer."""
    return {"image_token": processor.image_token}


FAMILY = Family(
    "idefics3",
    "Idefics3ForConditionalGeneration",
    "Idefics3Processor",
    slots,
    KEYS,
    config,
    processor_options,
    misfit,
    frozenset({"idefics3_vision"}),
    tokens,
    canonical=(),
    call={"return_row_col_info": True},
)
