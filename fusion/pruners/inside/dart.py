"""DART: keep a few pivots and the image tokens least like them, from an early layer of the LLM on.

Paper: Wen et al., arXiv:2502.11494 (EMNLP 2025); the release is read in the copy that VTC-Bench has. Pivots are the
image tokens, and the text tokens behind the images, whose keys in the layer before the cut are largest (L1 norm over
all heads, after rotation). Each pivot in turn keeps the image tokens least like it, by the cosine of hidden states at
the cut after the LLM's final norm, among those that are still free. Training-free; no attention weight is computed.

Where we differ from the public code: pivots take turns by norm, image tokens first, where it takes them in the order of
a CPython set, so that what stays depends on the length of the text before the image; `num_keep` tokens stay, where it
keeps one for each image pivot more, and the rest rounded down to a multiple of the pivots. `as_released` has both. A
budget that leaves nothing to drop drops nothing, and too short a text gives fewer pivots, where it fails; rows of a
batch, padding, packed samples and several images of a sample (one pool, crops and frames alike) are each as alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.fusion.pruners.inside.attention_tap import AttentionInputs
from zoo.fusion.pruners.inside.dropper import Dropper, DropsInside, LayerCut
from zoo.fusion.pruners.topk import check_ratio
from zoo.registry import Preset, ZooError, register, require_at_least, unknown


@dataclass
class DARTConfig:
    keep_ratio: float = 0.222  # share of the image tokens kept, in (0, 1]
    num_keep: int = 0  # number of image tokens kept instead; 0: by keep_ratio
    layer: int = 2  # first layer with fewer tokens (K), counted from 0; at least 1
    image_pivots: int = 4  # image tokens that keep those unlike them, at least 1
    text_pivots: int = 4  # text tokens behind the images that do
    state_norm: str = "final"  # of the states whose cosine is taken: final (the LLM's last norm) | none
    as_released: bool = False  # counts and order of pivots of the public code

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        require_at_least(0, num_keep=self.num_keep, text_pivots=self.text_pivots)
        require_at_least(1, image_pivots=self.image_pivots)
        if self.layer < 1:
            raise ZooError(f"layer must be at least 1, keys of the layer before it are read, got {self.layer}.")
        if self.state_norm not in ("final", "none"):
            raise unknown("state_norm", self.state_norm, ("final", "none"))


@register("pruner", "dart")
class DART(DropsInside, nn.Module):
    """Adds no parameters, and changes nothing before the LLM."""

    presets = {
        "llava15_192": Preset({"num_keep": 192, "layer": 2, "as_released": True}, "the paper's table: 196 of 576 stay"),
        "llava15_128": Preset({"num_keep": 128, "layer": 2, "as_released": True}, "the release's README: 132 of 576"),
        "llava15_64": Preset({"num_keep": 64, "layer": 2, "as_released": True}, "the paper's table: 68 of 576 stay"),
        "qwen2_vl_22": Preset(
            {"keep_ratio": 0.222, "layer": 2, "as_released": True}, "the release for Qwen2-VL: reduction_ratio 0.778"
        ),
        "qwen2_vl_11": Preset(
            {"keep_ratio": 0.111, "layer": 2, "as_released": True}, "the abstract's 88.9 % fewer: reduction_ratio 0.889"
        ),
    }

    def __init__(self, config: DARTConfig) -> None:
        super().__init__()
        self.config = config

    def tokens_per_layer(self, n: int, num_layers: int) -> list[int]:
        """Count the image tokens in each layer, of `n` that enter the LLM; with enough text behind the images."""
        c, kept = self.config, int(self._budget(torch.tensor(n)))
        if c.as_released and kept < n:
            pivots = c.image_pivots + c.text_pivots
            kept = min(n, min(n, c.image_pivots) + pivots * (kept // pivots))
        return [n if layer < c.layer else kept for layer in range(num_layers)]

    def attach(self, llm: Any) -> None:
        """Register the dropper's hooks on the LLM."""
        c = self.config
        after = [] if c.keep_ratio == 1 and not c.num_keep else [c.layer - 1]
        self.drop_by(Dropper(llm, "pruner 'dart'", after, score=_sizes, choose=self._choose))

    def score_flops(self, tokens: Sequence[int], heads: int, head_dim: int) -> int:
        """Count the FLOPs of choosing in one prompt with `tokens` in each layer: a cosine with each pivot."""
        c = self.config
        if c.keep_ratio == 1 and not c.num_keep:
            return 0
        width = heads * head_dim if self.dropper is None else self.dropper.llm.hidden_size
        return 2 * tokens[c.layer - 1] * width * (c.image_pivots + c.text_pivots)

    def _budget(self, total: Tensor) -> Tensor:
        """Count the image tokens to keep of `total`, before pivots are counted."""
        c = self.config
        if c.num_keep:
            return total.clamp(max=c.num_keep)
        kept = total.double() * c.keep_ratio
        return kept.long() if c.as_released else (kept + 0.5).long().clamp(min=1)

    def _picks(self, total: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """Count what each pivot keeps: (..., P); all arguments (...) are counts of image tokens and of pivots."""
        c, budget = self.config, self._budget(total)
        turn = torch.arange(c.image_pivots + c.text_pivots, device=total.device)
        if c.as_released:
            return (budget // len(turn))[..., None].expand(*total.shape, len(turn))
        pivots, left = (image + text).clamp(min=1), (budget - image).clamp(min=0)
        return (left // pivots)[..., None] + (turn < (left % pivots)[..., None])

    @torch.no_grad()
    def _choose(self, cut: LayerCut) -> Tensor:
        """Choose the tokens that stay, (B, L) bool. S samples of a row are treated side by side."""
        c, tokens, norm = self.config, cut.tokens, cut.scores
        assert norm is not None and self.dropper is not None, "the dropper calls it behind a scored layer"
        hidden = self.dropper.llm.norm(cut.hidden) if c.state_norm == "final" else cut.hidden
        states = F.normalize(hidden.float(), dim=-1)  # (B, L, C)
        mine = F.one_hot(tokens.segment, cut.total.shape[1]).bool().transpose(1, 2) & tokens.seen[:, None]  # (B, S, L)
        image = mine & tokens.image[:, None]
        text = mine & (tokens.voter & ~tokens.image)[:, None]
        behind = text & ~image.flip(-1).cumsum(-1).flip(-1).bool()  # no image token of its sample follows
        pivots, on = self._pivots(norm, image, text, behind)  # (B, S, P)
        many = on[..., : c.image_pivots].sum(-1), on[..., c.image_pivots :].sum(-1)
        picks = self._picks(cut.total, *many)  # (B, S, P)
        width = states.shape[-1]
        of = states.gather(1, pivots.flatten(1)[..., None].expand(-1, -1, width))  # (B, S * P, C)
        with torch.autocast(states.device.type, enabled=False):
            alike = (of @ states.transpose(1, 2)).view(*pivots.shape, -1)  # (B, S, P, L)
        held = pivots[..., : c.image_pivots], on[..., : c.image_pivots].byte()
        chosen = image.byte().zero_().scatter_add(-1, *held).bool()
        free = image & ~chosen
        for turn in self._order(pivots, on, mine):  # (B, S)
            at = turn[..., None, None]
            least = alike.gather(2, at.expand(*at.shape[:3], alike.shape[-1]))[:, :, 0].masked_fill(~free, torch.inf)
            many_of = picks.gather(-1, turn[..., None]) * on.gather(-1, turn[..., None])  # (B, S, 1)
            pick = free & (_ranks(least) < many_of)
            free, chosen = free & ~pick, chosen | pick
        budget = self._budget(cut.total)[..., None]
        if not c.as_released:  # a budget below the pivots keeps the largest of them
            chosen &= _ranks((-norm[:, None]).masked_fill(~image, torch.inf)).lt(budget) | budget.gt(c.image_pivots)
        return (chosen | (image & (budget >= cut.total[..., None]))).any(1)

    def _pivots(self, norm: Tensor, image: Tensor, text: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
        """Find the pivots of each sample, (B, S, P) indices, and which of them there are, (B, S, P) bool."""
        c, size = self.config, -norm[:, None]  # (B, 1, L), the largest first
        first = size.masked_fill(~image, torch.inf).argsort(dim=-1, stable=True)[..., : c.image_pivots]
        # Text behind the images by norm, then other text by norm.
        order = size.expand_as(image).argsort(dim=-1, stable=True)
        kind = (~text).long() + (~behind).long()
        second = order.gather(-1, kind.gather(-1, order).argsort(dim=-1, stable=True))[..., : c.text_pivots]
        found, on = [], []
        for index, of, many in ((first, image, c.image_pivots), (second, text, c.text_pivots)):
            short = 0, many - index.shape[-1]  # a sequence of fewer tokens than pivots
            found.append(F.pad(index, short))
            on.append(F.pad(of.gather(-1, index), short))
        return torch.cat(found, -1), torch.cat(on, -1)

    def _order(self, pivots: Tensor, on: Tensor, mine: Tensor) -> list[Tensor]:
        """Return which pivot takes each turn: (B, S), for as many turns as there are pivots."""
        turns = torch.arange(pivots.shape[-1], device=pivots.device).expand_as(pivots)
        if self.config.as_released:
            first = mine.byte().argmax(-1, keepdim=True)  # of the sample: its indices count from there
            places, there, order = (pivots - first).tolist(), on.tolist(), turns.clone()
            for b, row in enumerate(places):
                for s, sample in enumerate(row):
                    turn = {place: i for i, place in enumerate(sample) if there[b][s][i]}
                    by_hash = [turn[place] for place in set(list(turn))]  # noqa: C414, a set of a dict has other sizes
                    rest = [i for i in range(len(sample)) if i not in by_hash]
                    order[b, s] = order.new_tensor(by_hash + rest)
            turns = order
        return list(turns.unbind(-1))


def _sizes(given: AttentionInputs) -> Tensor:
    """Return the L1 norm of each token's keys, over all heads: (B, L) float32."""
    return given.key.float().abs().sum((1, 3))


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each of the values (..., L), the smallest 0; of equal ones the first is lower."""
    order = values.argsort(dim=-1, stable=True)
    rank = torch.arange(order.shape[-1], device=order.device)
    return torch.empty_like(order).scatter(-1, order, rank.expand_as(order))
