"""Idefics3 and SmolVLM: SigLIP tiles, pixel shuffle, one linear layer; the prompt names the place of each tile.

Paper: Laurencon et al., arXiv:2408.12637; Marafioti et al., arXiv:2504.05299 (SmolVLM). Published as
`HuggingFaceTB/SmolVLM-Instruct`, `SmolVLM-256M-Instruct` (Idefics3) and `SmolVLM2-*` (SmolVLM).
"""

from collections.abc import Mapping
from typing import Any

from zoo.published.family import Family, llm_slot, vision_slot, whole_vision_config

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
            "begin": "<fake_token_around_image>",
            "end": "<fake_token_around_image>",
            "most": 17,
        },
        "llm": llm_slot(hf.text_config, tie),
    }


def config(model: Any, name: str = "Idefics3Config") -> Any:
    """Say a composed model as an `Idefics3Config` or a `SmolVLMConfig`."""
    import transformers

    return getattr(transformers, name)(
        vision_config=whole_vision_config(model).to_dict(),
        text_config=model.llm.lm.config.to_dict(),
        image_token_id=model.image_token_id,
        scale_factor=model.projector.factor,
        tie_word_embeddings=bool(model.llm.lm.config.tie_word_embeddings),
    )


def processor_options(model: Any, processor: Any) -> dict[str, Any]:
    """What the processors count image tokens with."""
    return {"image_seq_len": model.layout.tokens}


FAMILY = Family(
    "idefics3",
    "Idefics3ForConditionalGeneration",
    "Idefics3Processor",
    slots,
    KEYS,
    config,
    processor_options,
    canonical=(),
    call={"return_row_col_info": True},
    nested=False,
)
