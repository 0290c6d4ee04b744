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
from zoo.registry import ImageFeatures, Preset, register, require_at_least


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
    presets = {
        "llava15_432": Preset({"num_keep": 432, "score": "cls"}, "the paper's LLaVA-1.5: 25 % fewer of 576"),
        "llava15_288": Preset({"num_keep": 288, "score": "cls"}, "the paper's LLaVA-1.5: 50 % fewer of 576"),
        "llava15_144": Preset({"num_keep": 144, "score": "cls"}, "the paper's LLaVA-1.5: 75 % fewer of 576"),
        "llava15_58": Preset({"num_keep": 58, "score": "cls"}, "the paper's LLaVA-1.5: 90 % fewer of 576"),
        "llava15_29": Preset({"num_keep": 29, "score": "cls"}, "the paper's LLaVA-1.5: 95 % fewer of 576"),
        "llava_next_2160": Preset({"num_keep": 432, "score": "cls"}, "its LLaVA-NeXT: 25 % fewer of five crops"),
        "llava_next_1440": Preset({"num_keep": 288, "score": "cls"}, "its LLaVA-NeXT: 50 % fewer of five crops"),
        "llava_next_720": Preset({"num_keep": 144, "score": "cls"}, "its LLaVA-NeXT: 75 % fewer of five crops"),
        "llava_next_290": Preset({"num_keep": 58, "score": "cls"}, "its LLaVA-NeXT: 90 % fewer of five crops"),
        "llava_next_145": Preset({"num_keep": 29, "score": "cls"}, "its LLaVA-NeXT: 95 % fewer of five crops"),
        "video_llava_1536": Preset({"num_keep": 192, "score": "cls"}, "its Video-LLaVA: 25 % fewer of 8 x 256"),
        "video_llava_1024": Preset({"num_keep": 128, "score": "cls"}, "its Video-LLaVA: 50 % fewer of 8 x 256"),
        "video_llava_512": Preset({"num_keep": 64, "score": "cls"}, "its Video-LLaVA: 75 % fewer of 8 x 256"),
        "video_llava_208": Preset({"num_keep": 26, "score": "cls"}, "its Video-LLaVA: 90 % fewer of 8 x 256"),
        "video_llava_104": Preset({"num_keep": 13, "score": "cls"}, "its Video-LLaVA: 95 % fewer of 8 x 256"),
    }

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
