"""LoRA: a low-rank term on linear layers of a frozen language model, through PEFT.

Paper: Hu et al., arXiv:2106.09685.

PEFT's layers replace the linear layers inside the language model, and base weights keep the names that checkpoints
have. New weights start in float32 whatever the base has, as `get_peft_model` makes them, and follow the model where it
is cast. Experts that transformers holds in one fused tensor are not linear layers: `all-linear` leaves them out,
`gate_proj` of a Qwen2-MoE means its shared expert alone, and the check reports it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.fusion.adapters.lora_layer import shorten
from zoo.fusion.adapters.peft.layers import Places
from zoo.fusion.attach import find_linears, fused_experts, means, refer
from zoo.registry import Adapter, ImageFeatures, ZooError, register, require_at_least

_NAME = "lora"  # PEFT's name for this set of weights: `q_proj.lora_A.lora.weight`


@dataclass
class LoRAConfig:
    rank: int = 16  # width of the low-rank term
    alpha: float = 32.0  # the term is scaled by alpha / rank
    dropout: float = 0.0  # of the term's input, in [0, 1)
    # Linear layers: last parts of names, shell patterns, or all-linear (all but the vocabulary projection).
    targets: list[str] = field(default_factory=lambda: ["all-linear"])

    def __post_init__(self) -> None:
        require_at_least(1, rank=self.rank)
        if not self.alpha > 0:
            raise ZooError(f"alpha must be more than 0, got {self.alpha}: the term is scaled by it.")
        if not 0 <= self.dropout < 1:
            raise ZooError(f"dropout must be in [0, 1), got {self.dropout}.")
        if not self.targets:
            raise ZooError("targets is empty: name linear layers (q_proj, v_proj), or all-linear.")


@register("adapter", "lora")
class LoRA(Adapter, nn.Module):
    """Computes the base model at the start: B is zero."""

    concurrent = True
    losses: frozenset[str] = frozenset()
    # What the check proposes where another adapter already owns the linear layers of the feed-forward.
    choices = {"targets": (["q_proj", "k_proj", "v_proj", "o_proj"], ["qkv_proj", "o_proj"])}

    lm: Any  # the transformers model, held outside of the module tree: its parameters belong to the LLM
    places: Places | None  # PEFT's layers, once they were made; kept while detached

    def __init__(self, config: LoRAConfig, *, llm: Any) -> None:
        super().__init__()
        self.config = config
        self.targets = find_linears(llm.lm, config.targets, "adapter 'lora'")
        widest = max(max(llm.lm.get_submodule(name).weight.shape) for name in self.targets)
        if config.rank > widest:
            raise ZooError(f"adapter 'lora': rank {config.rank} exceeds {widest}, the width of the widest target.")
        self.exclusive = list(self.targets)  # no other adapter may have these
        self.notes = self._unreached(llm.lm)
        refer(self, lm=llm.lm)
        self.places = None
        self.merged = False  # for good

    def attach(self) -> None:
        """Replace the targets by PEFT's layers; attaching again reuses the layers and weights of the first time."""
        if self.places is not None:
            self.places.attach()
        elif not self.merged:
            self.places = self._inject()

    def detach(self) -> None:
        """Put the linear layers back; the language model computes what it did before, bit for bit."""
        if self.places is not None:
            self.places.detach()

    def merge(self) -> None:
        """Add B A to the base weights and detach for good; a plain language model is left."""
        if self.places is None or not self.places.attached:
            raise ZooError("adapter 'lora' is not attached: there is nothing to merge into.")
        self.places.merge()
        self.places = None
        self.targets = []
        self.merged = True

    def owns(self, name: str) -> bool:
        """Whether the parameter `name` inside the language model belongs to this adapter."""
        return f".lora_A.{_NAME}." in name or f".lora_B.{_NAME}." in name

    def condition(self, image: ImageFeatures | None, images_per_row: Sequence[int], expand: int = 1) -> None:
        """Check that the adapter is active; it does not depend on images.

        Raises:
            ZooError: `get_peft_model` put another adapter on the model, which deactivates this one.
        """
        on = [_NAME]
        if self.places is not None and self.places.attached:
            layer: Any = next(iter(self.places.layers.values()))
            on = layer.active_adapters
        if on != [_NAME]:
            raise ZooError(
                f"PEFT runs {', '.join(map(repr, on)) or 'no adapter'} on this model, which switches the model's own "
                "adapter 'lora' off: call model.adapter['lora'].merge() before get_peft_model."
            )

    def aux_losses(self) -> dict[str, Tensor]:
        """Return an empty dict: there is no auxiliary loss."""
        return {}

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return this adapter's weights by their names in the language model; they share memory with the parameters."""
        return {} if self.places is None else {n: t.detach() for n, t in self.places.tensors().items()}

    def _unreached(self, lm: Any) -> list[str]:
        """Describe the experts of a mixture that the targets do not reach; empty without a mixture."""
        fused = fused_experts(lm)
        if not fused:
            return []
        meant = {word: [n for n in self.targets if means(word, n)] for word in self.config.targets}
        shared = [w for w, names in meant.items() if names and all("shared_expert" in n for n in names)]
        layers = len({name.rpartition(".")[0] for name in fused})
        where = f"{layers} layers hold them in fused tensors ({fused[0]}), which are not linear layers"
        note = f"adapter 'lora' reaches no routed expert: {where}"
        note += f"; {', '.join(shared)} here means the shared expert alone" if shared else ""
        return [f"{note}. Low-rank terms around the experts: adapter=mole; new experts: adapter=moextend."]

    def _peft_config(self) -> Any:
        from peft import LoraConfig

        first = self.lm.get_submodule(self.targets[0])
        return LoraConfig(
            fan_in_fan_out=type(getattr(first, "base_layer", first)).__name__ == "Conv1D",  # GPT-2 keeps (in, out)
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]  # annotated as int, used as a float
            lora_dropout=self.config.dropout,
            target_modules=list(self.targets),
            bias="none",
            task_type="CAUSAL_LM",
        )

    def _inject(self) -> Places:
        from peft import inject_adapter_in_model

        places = Places(self.lm, lambda: inject_adapter_in_model(self._peft_config(), self.lm, adapter_name=_NAME))
        # `inject_adapter_in_model` creates weights in the base's dtype; `get_peft_model` would upcast them.
        for parameter in places.every().values():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        if not self.config.dropout:  # which is exact in float32 alone
            for layer in places.layers.values():
                shorten(layer, _NAME)
        return places
