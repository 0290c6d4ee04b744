"""Overlap of captions with those that people wrote: BLEU and chrF, both from sacrebleu.

Papers: Post, arXiv:1804.08771 (BLEU as sacrebleu computes it); Popovic, chrF, WMT 2015. All accepted answers are
references, those that are empty left out. BLEU is that of the corpus, its error a bootstrap over captions; chrF is the
mean over captions, where sacrebleu's own summary is that of the corpus. Both without regard to case unless asked for,
which sacrebleu's defaults are not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from zoo.registry import Dialog, Score, Task, ZooError, register
from zoo.tasks.answers import truths
from zoo.tasks.estimates import column, means

RESAMPLES = 500
ORDER = 4  # longest n-gram of BLEU
COUNTS = [*(f"_correct{n}" for n in range(ORDER)), *(f"_total{n}" for n in range(ORDER)), "_length", "_reference"]


@dataclass
class CaptionConfig:
    max_new_tokens: int = 64  # longest answer
    lowercase: bool = True  # compare without regard to case

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ZooError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}.")


@register("task", "caption")
class Caption(Task):
    """bleu (of the corpus) and chrf, in [0, 1]."""

    mode = "generate"

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config
        self.max_new_tokens = config.max_new_tokens

    def score(self, dialog: Dialog, prediction: str) -> dict[str, float]:
        """Return the overlap of one caption, and the counts from which the corpus's BLEU is made.

        Raises:
            ZooError: the dialog has no accepted caption.
        """
        references = truths(dialog, "caption")
        bleu, chrf = (metric.sentence_score(prediction, references) for metric in self._metrics)
        counts = [*bleu.counts, *bleu.totals, bleu.sys_len, bleu.ref_len]
        row = {"bleu": min(bleu.score / 100, 1.0), "chrf": min(chrf.score / 100, 1.0)}
        return row | {name: float(count) for name, count in zip(COUNTS, counts, strict=True)}

    def summarise(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
        """Average chrF; sum the counts of BLEU."""
        result = means(rows)
        if rows:
            counts = np.stack([column(rows, name) for name in COUNTS], 1)  # (captions, COUNTS)
            n = len(rows)
            draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES) @ counts
            error = float(np.std([self._bleu(draw) for draw in draws], ddof=1)) if n > 1 else 0.0
            result["bleu"] = Score(self._bleu(counts.sum(0)), n, error)
        return result

    def _bleu(self, counts: np.ndarray) -> float:
        correct, total = counts[:ORDER].astype(int).tolist(), counts[ORDER : 2 * ORDER].astype(int).tolist()
        length, reference = counts[2 * ORDER :].astype(int).tolist()
        metric = self._metrics[0]
        smoothed = {"smooth_method": metric.smooth_method, "smooth_value": metric.smooth_value}
        return float(metric.compute_bleu(correct, total, length, reference, **smoothed).score) / 100

    @cached_property
    def _metrics(self) -> tuple[Any, Any]:
        from sacrebleu.metrics import BLEU, CHRF

        return BLEU(lowercase=self.config.lowercase, effective_order=True), CHRF(lowercase=self.config.lowercase)
