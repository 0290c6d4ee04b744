"""Models that differ in their pruner alone: the same weights, the same prompt, and what each costs where."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from zoo.benches.abilities import evaluated
from zoo.benches.costs import DecoderSizes, matmul_flops
from zoo.benches.llava import Sizes, composed
from zoo.composed import behind
from zoo.composed.inputs import Inputs
from zoo.composed.model import ZooModel
from zoo.registry import Cut, ImageFeatures, InsidePruner, ZooError, get
from zoo.registry.presets import shown

SIZES = {  # as those of zoo.benches.llava
    "random_100m": Sizes(336, 14, 384, 12, 6, -2, 768, 12, 12, 2048, 16384),
    "tiny": Sizes(32, 4, 16, 2, 2, -2, 32, 6, 2, 64, 64),
}


@dataclass
class Variant:
    """A model with a pruner, or none, and a prompt for it: half of the text, the images, the other half.

    Attributes:
        name: of the pruner; `null`: none.
        pixels: (B, 3, S, S).
        text: ids (B, T), without image tokens.
        features: what the encoder gives, whole.
    """

    name: str
    model: ZooModel
    pixels: Tensor
    text: Tensor
    features: ImageFeatures
    _projected: ImageFeatures | None = None  # for a pruner behind the projector

    @classmethod
    def of(cls, name: str, model: ZooModel, pixels: Tensor, text: Tensor) -> "Variant":
        """Encode the pixels with what the pruner asks of the encoder."""
        with torch.no_grad():
            return cls(name, model, pixels, text, _encoded(model, pixels, model.requested))

    @property
    def pruner(self) -> Any:
        return next(iter(self.model.pruner.values()), None)

    @property
    def inside(self) -> bool:
        """Whether it drops tokens inside the LLM."""
        return isinstance(self.pruner, InsidePruner)

    @property
    def patches(self) -> int:
        """Tokens that the encoder gives."""
        return self.features.tokens.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        assert self.features.grid is not None, "an encoder gives a grid"
        return self.features.grid

    @torch.no_grad()
    def encode(self, need: frozenset[str] | None = None) -> ImageFeatures:
        """Run the encoder, with what the pruner asks of it, or with other requests."""
        return _encoded(self.model, self.pixels, self.model.requested if need is None else need)

    @torch.no_grad()
    def choose(self, features: ImageFeatures | None = None) -> object:
        """Run what the pruner does before the LLM."""
        features = replace(self.features if features is None else features, question=self._question())
        if self.pruner is None:
            return None
        if self.pruner.behind and self._projected is None:
            assert self.model.projector is not None, "images are tokens"
            self._projected = replace(features, tokens=self.model.projector(features), grid=self.model.projected_grid)
        return behind.run(self.pruner, self._projected or self.model._projected(self.pruner, features))

    @torch.no_grad()
    def shown(self, features: ImageFeatures | None = None) -> Any:
        """Run pruner and projector on what the encoder gave."""
        features = self.features if features is None else features
        return self.model.encode_features(features, None, self.pixels, self._question())

    def _question(self) -> Any:
        """What the prompt asks, for a pruner that needs it."""
        if not self.model.asks:
            return None
        given = Inputs(input_ids=self._prompt(self.model.num_image_tokens))
        return self.model.question_of(given, None, len(self.text), self.text.device)

    def ids(self, shown: Any) -> Tensor:
        """The prompt (B, T), with a placeholder for each image token."""
        return self._prompt(shown.tokens.shape[:-1].numel() // len(self.text))  # laid out, they are (S, C)

    def _prompt(self, count: int) -> Tensor:
        half = self.text.shape[1] // 2
        slots = self.text.new_full((len(self.text), count), self.model.image_token_id)
        return torch.cat([self.text[:, :half], slots, self.text[:, half:]], 1)

    @torch.no_grad()
    def read(self, ids: Tensor, shown: Any) -> Any:
        """Prefill: the model's output, with the logits of the last position (B, 1, V) and the cache."""
        return self.model(input_ids=ids, encoded=shown, use_cache=True, logits_to_keep=1)

    def after(self, features: ImageFeatures | None = None) -> Any:
        """Go from what the encoder gave to logits."""
        shown = self.shown(features)
        return self.read(self.ids(shown), shown)

    @torch.no_grad()
    def decode(self, cache: Any, steps: int) -> None:
        """Generate `steps` tokens from a cache that is then as it was."""
        token = self.text[:, :1]
        for _ in range(steps):
            logits = self.model(input_ids=token, cache=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
        cache.crop(-steps)

    # ---- counts ------------------------------------------------------------------------------------------------

    def stages(self, n: int) -> dict[str, int]:
        """Count the image tokens behind each part before the LLM."""
        kept = n if self.pruner is None else self.pruner.num_tokens(n)
        assert self.model.projector is not None
        return {"encoder": n, "pruner": kept, "projector": self.model.projector.num_tokens(kept)}

    def image_tokens(self, n: int) -> list[int]:
        """Count the image tokens that each layer of the LLM sees, as the pruner declares them."""
        entered, layers = self.stages(n)["projector"], self.model.llm.num_layers
        if self.pruner is not None and self.pruner.behind:
            entered = self.pruner.tokens_of_image(entered, Cut())
        return self.pruner.tokens_per_layer(entered, layers) if self.inside else [entered] * layers

    def tokens_of(self, cache: Any) -> list[int]:
        """Count all tokens that entered each layer in the pass that a cache is of: the mean over its rows."""
        return [layer.keys.shape[-2] for layer in cache.layers]

    def read_flops(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Count the FLOPs of the prefill in closed form: without scoring, and of scoring.

        Args:
            tokens: all that enter each layer.
        """
        rows, sizes, pruner = len(self.text), self.sizes, self.pruner
        scoring = 0 if pruner is None else pruner.score_flops(tokens, sizes.heads, sizes.head_dim)
        return rows * matmul_flops(sizes, tokens, head_rows=1), rows * scoring

    @property
    def sizes(self) -> DecoderSizes:
        return DecoderSizes.of(self.model.llm.lm.config.get_text_config(), self.model.llm.layers)


def _encoded(model: ZooModel, pixels: Tensor, need: frozenset[str]) -> ImageFeatures:
    assert model.vision is not None, "it has image tokens"
    features: ImageFeatures = model.vision(pixels, need=need)
    return features


class Arms:
    """Models that differ in their pruner alone, built one by one.

    Args:
        name: of sizes with random weights, or of a saved model.
        data: that a saved model is asked about; empty: its own.
        positions: of kept tokens.
    """

    def __init__(self, name: str, data: str = "", positions: str = "auto") -> None:
        self.name, self.data, self.positions = name, data, positions
        self.trained = name not in SIZES
        self.nodes: dict[str, dict[str, Any]] = {}  # pruner -> its options, as they were built
        self.processor: Any = None  # of the model that was built last
        self.config: Any = None
        self._instead: dict[str, dict[str, Any]] = {}  # pruner -> the choice that fits this model
        self._weights: dict[str, Tensor] | None = None  # of the first random model, for all

    def model(self, pruner: str, node: Mapping[str, Any] | None, draw: int = 0) -> ZooModel:
        """Build a model with a pruner (`node` is None: without). Options that do not fit are tried by other values.

        A pruner that ranks by [CLS], say, goes with an encoder that has none by another of the scores that it states.

        Args:
            pruner: its name.
            node: its options.
            draw: the seed of one that has a seed.

        Raises:
            ZooError: it does not fit, whatever its choices are.
        """
        if node is None:
            return self._built(pruner, None)
        if draw and accepts(pruner, "seed"):
            node = {**node, "seed": draw}
        tried = [self._instead[pruner]] if pruner in self._instead else []
        tried += [{}, *({o: v} for o, values in get("pruner", pruner).choices.items() for v in values)]
        first: ZooError | None = None
        for instead in tried:
            try:
                model = self._built(pruner, {**node, **instead})
            except ZooError as error:
                first = first or error
                continue
            self.nodes[pruner], self._instead[pruner] = {**node, **instead}, instead
            return model
        assert first is not None, "something was tried"
        raise first

    def _built(self, pruner: str, node: dict[str, Any] | None) -> ZooModel:
        if not self.trained:
            return self._random(pruner, node)
        from zoo.loading.build import build
        from zoo.settings.config import compose
        from zoo.settings.source import source_of

        words = [f"model={self.name}", f"pruner=[{'' if node is None else pruner}]", f"positions={self.positions}"]
        words += [f"data=[{self.data}]", "recipe=null"] if self.data else []
        words += [f"pruner.{pruner}.{key}={shown(value)}" for key, value in (node or {}).items()]
        self.config = compose("eval", words)
        model, self.processor = build(source_of(self.config), device="cpu", fixes=0)  # the search takes seconds
        return model

    def _random(self, pruner: str, node: dict[str, Any] | None) -> ZooModel:
        torch.manual_seed(0)
        slot = {} if node is None else {pruner: {"name": pruner, **node}}
        sizes = SIZES[self.name]
        llm = {"max_positions": 8192, "tie_embeddings": True}
        model = composed(sizes, llm=llm, pruner=slot, positions=self.positions).eval()
        if self._weights is None:
            self._weights = model.state_dict()
        model.load_state_dict(self._weights, assign=True)
        model.llm.lm.tie_weights()
        return model

    def pixels(self, model: ZooModel, rows: int) -> Tensor:
        """Return pictures (B, 3, S, S) for a model: of its data, or noise."""
        assert model.vision is not None, "it has image tokens"
        if self.trained and model.layout is None:
            whole = next(iter(evaluated(self.config).values()))
            if not whole.is_stream:
                images = [i for k in range(min(rows, len(whole))) for i in whole.get(k).images][:rows]
                shown = self.processor.prepare(images)
                return torch.stack([shown[i % len(shown)] for i in range(rows)])
        return torch.randn((rows, *model.vision.transform.shape), generator=torch.Generator().manual_seed(0))


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
    known: dict[str, Any] = {k: v[:, index] for k, v in cut.items() if isinstance(v, Tensor) and v.shape[1:2] == (n,)}
    known["block_attention"] = {word: scores[:, index] for word, scores in features.block_attention.items()}
    return replace(features, grid=(side, side), **known)
