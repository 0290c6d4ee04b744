"""Shared by pruners that rank image tokens by a row of attention: which rows there are, and what gives them."""

from torch import Tensor

from zoo.registry import ImageFeatures, ZooError, unknown

SCORES = {"cls": "cls_attention", "column_mean": "key_attention", "probe": "pooling_attention"}  # -> field
NEEDS = {"cls": "cls_attention", "column_mean": "key_attention", "probe": "pooling_head"}  # -> capability


def check_score(score: str) -> None:
    """Refuse a score that does not exist."""
    if score not in SCORES:
        raise unknown("score", score, SCORES)


def scores_of(image: ImageFeatures, score: str, pruner: str) -> Tensor:
    """Return the scores of the tokens, (M, N) float32, for the pruner of this name.

    Raises:
        ZooError: the encoder did not compute them.
    """
    scores: Tensor | None = getattr(image, SCORES[score])
    if scores is None:
        raise ZooError(f"pruner {pruner!r} with score={score} needs {NEEDS[score]}.")
    return scores
