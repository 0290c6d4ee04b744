"""Models that differ in their pruner alone: the same weights, the same prompt, and what each costs where."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from zoo.benches.costs import DecoderSizes, matmul_flops
from zoo.benches.llava import Sizes, composed
from zoo.composed.model import ZooModel
from zoo.composed.outputs import LLMSequence
from zoo.registry import ImageFeatures, InsidePruner, get
from zoo.registry.forward_pass import running
from zoo.registry.versions import cache_argument, cache_of

SIZES = {  # as those of zoo.benches.llava
    "random_100m": Sizes(336, 14, 384, 12, 6, -2, 768, 12, 12, 2048, 16384),
    "tiny": Sizes(32, 4, 16, 2, 2, -2, 32, 6, 2, 64, 64),
}


@dataclass
class Variant:
    """A model with a pruner, or none, and a prompt for it: half of the text, the images, the other half.

    Attributes:
        name: of the pruner; `null`: none.
        features: what the encoder gives, whole.
        text: ids (B, T), without image tokens.
    """

    name: str
    model: ZooModel
    pixels: Tensor
    text: Tensor
    features: ImageFeatures

    @property
    def pruner(self) -> Any:
        return next(iter(self.model.pruner.values()), None)

    @property
    def inside(self) -> bool:
        """Whether it drops tokens inside the LLM."""
        return isinstance(self.pruner, InsidePruner)

    @torch.no_grad()
    def encode(self) -> ImageFeatures:
        """Run the encoder, with what the pruner asks of it."""
        assert self.model.vision is not None
        features: ImageFeatures = self.model.vision(self.pixels, need=self.model.requested)
        return features

    @torch.no_grad()
    def choose(self, features: ImageFeatures) -> ImageFeatures:
        """Run what the pruner does before the LLM."""
        return features if self.pruner is None else self.pruner(features)

    @torch.no_grad()
    def prompt(self, features: ImageFeatures) -> tuple[Tensor, Tensor]:
        """Return ids (B, T) and embeddings (B, T, C) of the prompt: pruner, projector, and the places of tokens."""
        assert self.model.projector is not None
        tokens = self.model.projector(self.choose(features))  # (B, K, C)
        half = self.text.shape[1] // 2
        slots = self.text.new_full(tokens.shape[:2], self.model.image_token_id)
        ids = torch.cat([self.text[:, :half], slots, self.text[:, half:]], 1)
        return ids, self.model.merge(ids, tokens)

    @torch.no_grad()
    def read(self, ids: Tensor, embeds: Tensor) -> tuple[Tensor, Any]:
        """Prefill: the logits of the last position (B, V), and the cache."""
        dense = self.model.config.positions == "dense"
        with running(LLMSequence(ids == self.model.image_token_id, None, None, None, dense=dense)):
            out = self.model.llm.hidden(inputs_embeds=embeds, use_cache=True)
        return self.model.llm.head(out.last_hidden_state[:, -1]), cache_of(out)

    def after(self, features: ImageFeatures | None = None) -> Tensor:
        """Go from what the encoder gave to logits."""
        return self.read(*self.prompt(self.features if features is None else features))[0]

    @torch.no_grad()
    def decode(self, cache: Any, steps: int) -> None:
        """Generate `steps` tokens from a cache that is then as it was."""
        token = self.text[:, :1]
        start = self.layer_tokens(self.features.tokens.shape[1])[0]
        for i in range(steps):
            position = torch.full_like(token, start + i)
            out = self.model.llm.hidden(
                inputs_embeds=self.model.llm.embed(token),
                position_ids=position,
                use_cache=True,
                **cache_argument(cache),
            )
            token = self.model.llm.head(out.last_hidden_state[:, -1]).argmax(-1, keepdim=True)
        cache.crop(-steps)

    # ---- counts ------------------------------------------------------------------------------------------------

    def stages(self, n: int) -> dict[str, int]:
        """Count the image tokens behind each part before the LLM."""
        kept = n if self.pruner is None else self.pruner.num_tokens(n)
        assert self.model.projector is not None
        return {"encoder": n, "pruner": kept, "projector": self.model.projector.num_tokens(kept)}

    def image_tokens(self, n: int) -> list[int]:
        """Count the image tokens that each layer of the LLM sees."""
        entered, layers = self.stages(n)["projector"], self.model.llm.num_layers
        return self.pruner.tokens_per_layer(entered, layers) if self.inside else [entered] * layers

    def layer_tokens(self, n: int) -> list[int]:
        """Count all tokens that each layer of the LLM sees."""
        return [m + self.text.shape[1] for m in self.image_tokens(n)]

    def read_flops(self, n: int) -> tuple[int, int]:
        """Count the FLOPs of the prefill in closed form: without scoring, and of scoring."""
        tokens = self.layer_tokens(n)
        sizes = self.sizes
        rows = self.text.shape[0]
        pruner = self.pruner
        scoring = 0 if pruner is None else pruner.score_flops(tokens, sizes.heads, sizes.head_dim)
        return rows * matmul_flops(sizes, tokens, head_rows=1), rows * scoring

    @property
    def sizes(self) -> DecoderSizes:
        return DecoderSizes.of(self.model.llm.lm.config.get_text_config(), self.model.llm.layers[0])


def random_models(sizes: Sizes, nodes: Mapping[str, Mapping[str, Any] | None]) -> dict[str, ZooModel]:
    """Build a model for each pruner, all with the weights of the first."""
    built: dict[str, ZooModel] = {}
    for name, node in nodes.items():
        torch.manual_seed(0)
        pruner = {} if node is None else {name: {"name": name, **node}}
        model = composed(sizes, llm={"max_positions": 8192, "tie_embeddings": True}, pruner=pruner).eval()
        for first in list(built.values())[:1]:
            model.load_state_dict(first.state_dict(), assign=True)
            model.llm.lm.tie_weights()
        built[name] = model
    return built


def named_model(name: str, pruner: str, node: Mapping[str, Any] | None) -> tuple[ZooModel, Any, Any]:
    """Load a saved model with a pruner; returns its processor and the config of its evaluation too."""
    from zoo.loading.build import build
    from zoo.settings.config import compose
    from zoo.settings.source import source_of

    words = [f"model={name}", f"pruner={pruner}"]
    words += [f"pruner.{pruner}.{key}={value}" for key, value in (node or {}).items()]
    config = compose("eval", words)
    model, processor = build(source_of(config))
    return model, processor, config


def accepts(pruner: str, option: str) -> bool:
    """Whether a pruner has an option."""
    return option in {f.name for f in fields(get("pruner", pruner).config)}


def first_tokens(features: ImageFeatures, side: int) -> ImageFeatures:
    """Cut the upper left `side` x `side` patches out, with all that is known of them."""
    assert features.grid is not None, "an encoder gives a grid"
    (h, w), n = features.grid, features.tokens.shape[1]
    index = (torch.arange(side)[:, None] * w + torch.arange(side)).flatten().to(features.tokens.device)
    assert h * w == n, "no pruner has been here"
    cut = {f.name: getattr(features, f.name) for f in fields(features) if f.name != "prefix"}
    known: dict[str, Any] = {k: v[:, index] for k, v in cut.items() if isinstance(v, Tensor) and v.shape[1] == n}
    known["block_attention"] = {word: scores[:, index] for word, scores in features.block_attention.items()}
    return replace(features, grid=(side, side), **known)
