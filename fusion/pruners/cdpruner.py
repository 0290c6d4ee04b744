"""CDPruner: keep image tokens that are relevant to the question and unlike each other.

Paper: Zhang et al., arXiv:2506.10967, and the authors' code. Each token has a relevance r to the question, and tokens
are compared by the cosine of x, what they are behind the projector. L_ij = r_i cos(x_i, x_j) r_j is the kernel of a
determinantal point process; the kept set is its greedy maximum: the first token is the most relevant one, and each
further one has the largest part, r_i^2 dist^2(x_i, span of the tokens chosen), that those do not explain.

Relevance is the cosine of a patch and the question in CLIP's space. The paper has relevant tokens score high; the
authors' code takes the negative (`sign=-1`, the default here, as its results were made), since tokens of the layer
before the last point away from matching texts in CLIP. `relevance=embeddings` is for encoders without a text tower: the
mean cosine of a projected token with the LLM's embeddings of the question, as in OpenVINO's variant.

Departures. Where the tokens chosen explain all others, which happens once more are kept than the projector's output has
dimensions, the rest goes by relevance; the authors' code then repeats a token. Where all tokens are equally relevant,
or the question has no words, tokens are chosen by diversity alone; that code divides by zero. A question longer than
the text tower takes is read in pieces that each begin and end as a text does; that code cuts the padded ids. Of images
that keep their shapes those of one grid have the range of their relevance in common, not all of a prompt. Rows of the
kernel are computed as they are needed, so that memory grows with N K, never with N x N.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.fusion.pruners.keeps import KeepsSome
from zoo.fusion.pruners.topk import check_ratio
from zoo.registry import ImageFeatures, Preset, ZooError, register, require_at_least, unknown

RELEVANCE = ("clip", "embeddings", "none")
SIMILARITY = ("projected", "encoder")
NORMALISE = ("prompt", "crop")
EPS = 1e-6  # of the relevance, as released; relevances that differ by less are equal
SPENT = 1e-6  # squared distance to the span of the tokens chosen below which a token adds nothing: float32 rounding


@dataclass
class CDPrunerConfig:
    keep_ratio: float = 0.25  # share of image tokens kept, in (0, 1]
    num_keep: int = 0  # tokens kept of each image, crop or frame; 0: by keep_ratio
    # clip: by the text tower of the encoder's CLIP or SigLIP | embeddings: the LLM's (any encoder) | none: diversity
    relevance: str = "clip"
    sign: int = -1  # -1: tokens that are less alike the question are relevant, as released | 1: more alike
    # balance of relevance (towards 1) and diversity (0), in [0, 1); null: relevance as it is, as released
    theta: float | None = None
    normalise: str = "prompt"  # range of the relevance: of all crops and images of a prompt, of one grid | of each crop
    similarity: str = "projected"  # tokens are compared behind the projector | as the encoder gives them, for less
    as_released: bool = False  # cosines of tokens normalised in their own data type; an empty question counts

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        require_at_least(0, num_keep=self.num_keep)
        for name, known in (("relevance", RELEVANCE), ("similarity", SIMILARITY), ("normalise", NORMALISE)):
            if (value := getattr(self, name)) not in known:
                raise unknown(name, value, known)
        if self.sign not in (-1, 1):
            raise ZooError(f"sign must be -1 or 1, got {self.sign}.")
        if self.theta is not None and not 0 <= self.theta < 1:
            raise ZooError(f"theta must be in [0, 1), got {self.theta}.")


@register("pruner", "cdpruner")
class CDPruner(KeepsSome):
    """Training-free; kept tokens stay in grid order. Which they are differs from question to question."""

    needs = frozenset({"question", "text_tower", "projected"})
    choices = {"relevance": ("embeddings", "none"), "similarity": ("encoder",)}
    presets = {
        "llava15_128": Preset(
            {"num_keep": 128, "relevance": "clip", "sign": -1, "similarity": "projected"}, "the release's LLaVA-1.5"
        ),
        "llava15_64": Preset(
            {"num_keep": 64, "relevance": "clip", "sign": -1, "similarity": "projected"}, "the release's LLaVA-1.5"
        ),
        "llava_next_640": Preset(
            {"num_keep": 128, "relevance": "clip", "sign": -1, "similarity": "projected"},
            "the usual budget of LLaVA-NeXT, five crops",
        ),
        "llava_next_320": Preset(
            {"num_keep": 64, "relevance": "clip", "sign": -1, "similarity": "projected"},
            "the usual budget of LLaVA-NeXT, five crops",
        ),
        "llava_next_160": Preset(
            {"num_keep": 32, "relevance": "clip", "sign": -1, "similarity": "projected"},
            "the release's LLaVA-NeXT, five crops",
        ),
        "embeddings": Preset(
            {"relevance": "embeddings", "similarity": "encoder", "theta": 0.5, "normalise": "crop"},
            "OpenVINO's variant, for encoders without a text tower",
        ),
    }

    def __init__(self, config: CDPrunerConfig, *, num_tokens: int | None = None) -> None:
        super().__init__(config, num_tokens)
        words = {"clip": {"question", "text_tower"}, "embeddings": {"question", "projected"}, "none": set()}
        compared = {"projected"} if config.similarity == "projected" else set()
        self.needs = frozenset(words[config.relevance] | compared)

    @torch.no_grad()
    def choose(self, image: ImageFeatures, k: int) -> Tensor:
        """Choose `k` tokens by relevance and diversity, in the order of choice: (M, K).

        Raises:
            ZooError: the image lacks what tokens are compared by.
        """
        tokens = _given(image.projected, "projected") if self.config.similarity == "projected" else image.tokens
        x = F.normalize(tokens if self.config.as_released else tokens.float(), dim=-1).float()
        return greedy(x, self.relevance(image), k)

    def scores(self, image: ImageFeatures) -> Tensor | None:
        """Return the relevance (M, N)."""
        return None if self.config.relevance == "none" else self.relevance(image)

    @torch.no_grad()
    def relevance(self, image: ImageFeatures) -> Tensor:
        """Compute the relevance r of each token to the question: (M, N) float32, above 0.

        Raises:
            ZooError: the image lacks the question, or the embeddings to compare it with.
        """
        rows, n = image.tokens.shape[:2]
        even = torch.ones(rows, n, device=image.tokens.device)
        if self.config.relevance == "none":
            return even
        asked = _given(image.question, "question")
        if self.config.relevance == "clip":
            patches, words, mask = _given(image.patch_embeds, "text_tower"), asked.text_embeds, asked.text_mask
        else:
            patches, words, mask = _given(image.projected, "projected"), asked.embeds, asked.mask
        words, mask = _given(words, "question"), _given(mask, "question")
        alike = self.config.sign * mean_cosine(patches, words, mask)  # (M, N)
        silent = ~mask.any(dim=1)  # (M,) a question without words
        if asked.texts is not None and not self.config.as_released:
            silent = silent | torch.tensor([not text for text in asked.texts], device=silent.device)
        low, high = alike.amin(1), alike.amax(1)  # (M,)
        if self.config.normalise == "prompt":
            same = asked.prompts.unsqueeze(1) == asked.prompts  # (M, M)
            low = low.masked_fill(silent, torch.inf).expand(rows, -1).masked_fill(~same, torch.inf).amin(1)
            high = high.masked_fill(silent, -torch.inf).expand(rows, -1).masked_fill(~same, -torch.inf).amax(1)
        span = (high - low).unsqueeze(1)
        r = (alike - low.unsqueeze(1) + EPS) / span.clamp(min=EPS)
        if self.config.theta is not None:  # a factor common to a row changes no choice: exp(0) is the largest
            r = torch.exp(self.config.theta / (2 * (1 - self.config.theta)) * (r - r.amax(1, keepdim=True)))
        return even.where(silent.unsqueeze(1) | ~(span > EPS), r)


def _given(value: Any, word: str) -> Any:
    if value is None:
        raise ZooError(f"pruner 'cdpruner' needs {word}, which is not known here.")
    return value


def mean_cosine(tokens: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean cosine of tokens (M, N, C) with words (M, L, C), where `mask` (M, L) is true: (M, N)."""
    unit = F.normalize(words.float(), dim=-1) * mask.unsqueeze(-1)
    mean = unit.sum(1, keepdim=True) / mask.sum(1).clamp(min=1).view(-1, 1, 1)  # (M, 1, C): a cosine is linear in it
    return (F.normalize(tokens.float(), dim=-1) @ mean.transpose(1, 2)).squeeze(-1)


def greedy(x: Tensor, r: Tensor, k: int) -> Tensor:
    """Choose tokens greedily by the determinant of their kernel, in the order of choice: (M, K).

    Args:
        x: (M, N, C) float32, of length 1, or nearly so where they were rounded.
        r: (M, N) float32, above 0.
        k: tokens chosen; of equal ones the first.
    """
    length = x.square().sum(-1)
    length = torch.where((length - 1).abs() < 1e-5, 1.0, length)  # so that rounding breaks no tie
    residual = r.square() * length  # (M, N) the kernel's diagonal
    floor = SPENT * residual  # up to which a token adds nothing
    # Where no token adds anything the order is that of r, below all residuals: the place in it, negative.
    spare = -1.0 - r.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    rows = x.new_zeros(x.shape[0], k, x.shape[1])  # (M, K, N) of the Cholesky factor
    chosen = []
    for t in range(k):  # few operations a step: on a CPU their calls take longer than their numbers
        most, pick = torch.where(residual > floor, residual, spare).max(1, keepdim=True)  # (M, 1)
        at = pick.unsqueeze(-1)
        token = x.gather(1, at.expand(-1, 1, x.shape[-1]))  # (M, 1, C)
        row = (r * r.gather(1, pick)).mul_((x @ token.transpose(1, 2)).squeeze(-1))  # (M, N) of the kernel
        if t:
            explained = rows[:, :t].gather(2, at.expand(-1, t, 1)).transpose(1, 2)  # (M, 1, t)
            row.sub_((explained @ rows[:, :t]).squeeze(1))
        row.div_(torch.where(most > 0, most, torch.inf).sqrt_())  # zero where no token adds anything
        rows[:, t] = row
        residual.sub_(row.square_())
        floor.scatter_(1, pick, torch.inf)
        spare.scatter_(1, pick, -torch.inf)
        chosen.append(pick)
    return torch.cat(chosen, dim=1)
