"""FasterVLM: keep the image tokens that [CLS] attends to most, before they enter the LLM.

Paper: Zhang et al., arXiv:2412.01818 (v1; v2 is another method, VisPruner).

score_j = mean over heads of softmax_j(q_cls . k_j / sqrt(d)) in the block that made the features, over all keys, [CLS]
among them; the patches' share is not normalised again, so a head that looks at [CLS] has a smaller vote. The encoder
gives that row without leaving its fused kernel. Each crop and each frame keeps the same number of its own tokens, in
raster order; in their code positions in the LLM are counted over what is left, which is `positions=dense` of a model.

Departures. Equal scores are decided in favour of the first token, where the authors' `topk` leaves it open. We drop
before the projector, as the paper writes and the video branch of the code does; the main branch projects first, which
gives the same. Encoders without [CLS] are none of the paper's: `score=column_mean`, how much a patch is looked at on
average, is what its authors recommend for them; `score=probe` is the row of SigLIP's own pooling head.
"""

from dataclasses import dataclass

from torch import Tensor

from zoo.fusion.pruners.keeps import KeepsSome
from zoo.fusion.pruners.scores import NEEDS, SCORES, check_score, scores_of
from zoo.fusion.pruners.topk import best, check_ratio
from zoo.registry import ImageFeatures, register, require_at_least


@dataclass
class FasterVLMConfig:
    keep_ratio: float = 0.25  # share of image tokens kept, in (0, 1]
    num_keep: int = 0  # tokens kept of each image, crop or frame, as in the authors' scripts; 0: by keep_ratio
    score: str = "cls"  # cls | column_mean (any encoder) | probe (SigLIP with vision.pooling_head=true)

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        require_at_least(0, num_keep=self.num_keep)
        check_score(self.score)


@register("pruner", "fastervlm")
class FasterVLM(KeepsSome):
    """Training-free; kept tokens stay in grid order."""

    needs: frozenset[str] = frozenset({"cls_attention"})
    choices = {"score": tuple(SCORES)}  # what the check may offer beside defaults

    def __init__(self, config: FasterVLMConfig, *, num_tokens: int | None = None) -> None:
        super().__init__(config, num_tokens)
        self.needs = frozenset({NEEDS[config.score]})

    def scores(self, image: ImageFeatures) -> Tensor:
        """Return the scores that tokens are ranked by, (M, N) float32.

        Raises:
            ZooError: the encoder did not compute them.
        """
        return scores_of(image, self.config.score, "fastervlm")

    def choose(self, image: ImageFeatures, k: int) -> Tensor:
        """Choose the tokens with the best scores, (M, K)."""
        return best(self.scores(image), k)
