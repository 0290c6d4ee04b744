"""A causal LM around a text model that transformers has without one: the language models of vision-language families.

transformers builds `Qwen2VLTextModel` and its like inside of `...ForConditionalGeneration` alone. Here such a model
gets what `Qwen2ForCausalLM` adds to `Qwen2Model`: a vocabulary projection, under the same names of weights
(`model.*`, `lm_head.weight`), and `generate`. Its class derives from the base class of the family, so that weights are
initialised and kernels are chosen as the family does it.

Positions of such a model have several axes (time, row, column): `position_ids` are (A, B, T), or (B, T) for text, whose
positions are the same on all of them.
"""

from functools import cache as once
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from zoo.registry.versions import CACHE, cache_of

# Text models of transformers that have no class of a causal LM, by their `model_type`.
TEXT_MODELS = (
    "glm4v_moe_text",
    "glm4v_text",
    "glm_ocr_text",
    "hunyuan_vl_text",
    "paddleocr_vl_text",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3_vl_moe_text",
    "qwen3_vl_text",
)


def causal_types() -> list[str]:
    """Name the families whose language model can be built: those of transformers, and `TEXT_MODELS` that it knows."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    return [name for name in (*CAUSAL, *TEXT_MODELS) if name in CONFIG_MAPPING]


def causal_class(config: Any) -> Any:
    """Return the class that builds the causal LM of a config by `from_config`, and loads it by `from_pretrained`.

    Args:
        config: of transformers.

    Returns:
        `AutoModelForCausalLM`, a class around a text model, or None where there is no causal LM of this config.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if getattr(config, "model_type", "") in TEXT_MODELS and (text := _text_class(type(config))) is not None:
        return _with_head(text)
    return None


def _text_class(config: Any) -> Any:
    """Return the text model of a config's class, also of those that transformers' table of models leaves out."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if config in MODEL_MAPPING:
        return MODEL_MAPPING[config]
    file = import_module(config.__module__.replace(".configuration_", ".modeling_"))
    return getattr(file, config.__name__.replace("Config", "Model"), None)


def axes_of(decoder: nn.Module) -> int:
    """Count the axes of a decoder's rotary positions: 1, or as many as the sections of its frequencies."""
    sections = (getattr(module, "mrope_section", None) for module in decoder.children())
    return next((len(some) for some in sections if some and isinstance(some, (list, tuple))), 1)


def with_sections(config: Any) -> Any:
    """State how many of a text config's frequencies turn by each axis: about a third each, more by the first.

    The families' own numbers are of heads of one width, and others fail in the first pass.
    """
    rope = dict(config.rope_parameters or {})
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    config.rope_parameters = rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    return config


@once
def _with_head(text: Any) -> Any:
    """Make the class of a causal LM around a text model's class."""
    from transformers import GenerationMixin
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    family: Any = next(c for c in text.__mro__[1:] if c.__name__.endswith("PreTrainedModel"))

    class TextCausalLM(family, GenerationMixin):  # type: ignore[misc]  # a class that is found at run time
        config_class = text.config_class
        base_model_prefix = "model"
        input_modalities = ("text",)
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        _tp_plan = {"lm_head": "colwise_gather_output"}

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = text(config)
            self.vocab_size = config.vocab_size
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        @classmethod
        def from_config(cls, config: Any, **options: Any) -> Any:
            return cls._from_config(config, **options)

        def get_decoder(self) -> Any:
            return self.model

        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            cache: Any = None,
            inputs_embeds: Tensor | None = None,
            labels: Tensor | None = None,
            use_cache: bool | None = None,
            logits_to_keep: int | Tensor = 0,
            past_key_values: Any = None,
            **kwargs: Any,
        ) -> Any:
            out = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **{CACHE: past_key_values if cache is None else cache},
                **kwargs,
            )
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(out.last_hidden_state[:, kept])  # -0 keeps all
            loss = None
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
            given = {name: getattr(out, name, None) for name in ("hidden_states", "attentions", "router_logits")}
            return MoeCausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache_of(out)}, **given)

    # transformers reads the file of a model's class for the functions of its family: the balance loss of experts, and
    # whether their kernel can be chosen.
    TextCausalLM.__name__ = TextCausalLM.__qualname__ = f"{text.__name__.removesuffix('Model')}ForCausalLM"
    TextCausalLM.__module__ = text.__module__
    _name_experts(TextCausalLM)
    return TextCausalLM


def _name_experts(cls: Any) -> None:
    """Tell transformers how files hold the experts of a text model alone: as those of the whole model, one by one."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    whole = get_checkpoint_conversion_mapping(cls.config_class.model_type.removesuffix("_text")) or []
    one_by_one = [change for change in whole if any("experts.*" in name for name in change.source_patterns)]
    if one_by_one:
        register_checkpoint_conversion_mapping(cls.__name__, one_by_one, overwrite=True)
