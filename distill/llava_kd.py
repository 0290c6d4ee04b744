"""LLaVA-KD: distil answers, image tokens, and relations between image tokens.

Paper: Cai et al., LLaVA-KD, arXiv:2410.16236. Its three terms are three losses here:

    response   forward KL of the next token wherever an answer's token is predicted
    visual     the same at the positions of image tokens, whose predictions are otherwise thrown away; not shifted
    relation   1 - cosine of R_student and R_teacher, R = Y Y^T of the raw logits Y of an image's tokens

The authors' repository has no training code; a public copy of the project has a trainer that seems to be the authors',
called "the code" here. Means over positions, as in the code; the paper writes sums. Each image counts the same in
`visual`, in the code each image token does. `relation_weight` is the paper's 0.5, the code adds the term with 1. The
code flattens the relations of a whole batch into one vector, here each image has its own cosine. With one image a
batch, as its scripts have, all of this agrees. Text alone may be mixed in, and a sample may have several images, which
the code refuses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.distill.losses.chunked import LiveTeacher, divergence
from zoo.distill.losses.relation import NORMALISE, by_image, gram_of, relation_loss, relations
from zoo.distill.matching.positions import match_images, match_responses, num_shown, shared_vocab
from zoo.distill.matching.terms import Terms, Weighed, beta_of, check_divergence, token_weights, why_live
from zoo.registry import ZooError, register, unknown


@dataclass
class LLaVAKDConfig:
    response_weight: float = 1.0  # weight of `response`, the paper's alpha
    visual_weight: float = 1.0  # weight of `visual`, the paper's beta
    relation_weight: float = 0.5  # weight of `relation`, the paper's gamma; 1 in the code
    response_warmup: float = 0.0  # share of the stage over which its weight rises from 0
    visual_warmup: float = 0.0  # the same for `visual`
    relation_warmup: float = 0.0  # the same for `relation`
    divergence: str = "forward"  # forward (the paper's), reverse or jsd; of response and visual
    beta: float = 0.5  # of jsd, in (0, 1)
    temperature: float = 1.0  # of response and visual; the paper has none
    per: str = "token"  # of response; token: the mean over tokens, answer: over answers
    relation_normalise: str = "none"  # none (the published form) | unit | centred_unit: of each token's logits first

    def __post_init__(self) -> None:
        self.terms()
        check_divergence(self.divergence, self.beta, self.temperature, self.per)
        if self.relation_normalise not in NORMALISE:
            raise unknown("relation_normalise", self.relation_normalise, NORMALISE)
        if not (self.response_weight or self.visual_weight or self.relation_weight):
            raise ZooError("All three weights of llava_kd are 0: nothing is left to learn from the teacher.")

    def terms(self) -> Terms:
        names = ("response", "visual", "relation")
        return Terms({n: (getattr(self, f"{n}_weight"), getattr(self, f"{n}_warmup")) for n in names})


@register("distiller", "llava_kd")
class LLaVAKD(Weighed):
    """Losses `response`, `visual` and `relation`, unweighted; `weights` are those of the current step."""

    def __init__(self, config: LLaVAKDConfig) -> None:
        self.config, self.terms = config, config.terms()
        self.beta = beta_of(config.divergence, config.beta)
        on = {"response": config.response_weight, "visual": config.visual_weight, "relation": config.relation_weight}
        self.needs = frozenset(f"teacher.{name}" for name, weight in on.items() if weight)
        self.live_only = why_live(config.temperature)
        self.per_label = frozenset({"response"}) if config.per == "token" else frozenset()
        self.per_image = frozenset({"visual", "relation"})
        self._gram: tuple[Any, Tensor | None] = (None, None)  # the teacher's head, and its G

    def __call__(self, student: Any, teacher: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Compare student and teacher.

        Args:
            student: its `last_hidden_state` (B, T, C), `labels` (B, T), and where its image tokens are.
            teacher: the same of the teacher, or None if the batch holds its stored predictions.
            batch: `num_labels` and `num_images`, divisors of sums over tokens and over images; absent: those of this
                batch.

        Returns:
            The losses whose weight is not 0; without an image, `response` alone.
        """
        losses: dict[str, Tensor] = {}
        vocab = shared_vocab(student, teacher, batch)
        common: dict[str, Any] = {"beta": self.beta, "temperature": self.config.temperature, "vocab_size": vocab}
        if self.weights["response"]:
            matched = match_responses(student, teacher, batch)
            weights = token_weights(matched, batch, self.config.per)
            losses["response"] = divergence(student.llm, matched.rows, matched.target, weights=weights, **common)
        if not (self.weights["visual"] or self.weights["relation"]):
            return losses
        matched = match_images(student, teacher, batch)
        if not len(matched.rows):
            return losses
        assert matched.group is not None, "image tokens come with the index of their image"
        shown = num_shown(student)
        images = float(batch.get("num_images") or shown)
        if self.weights["visual"]:
            counts = torch.bincount(matched.group, minlength=shown)  # weights of an image's tokens sum to 1
            weights = 1.0 / (counts[matched.group].float() * images)
            losses["visual"] = divergence(student.llm, matched.rows, matched.target, weights=weights, **common)
        if self.weights["relation"]:
            losses["relation"] = self._relation(student, teacher, matched, vocab, shown) / images
        return losses

    def _relation(self, student: Any, teacher: Any, matched: Any, vocab: int, shown: int) -> Tensor:
        """Sum of 1 - cosine over images."""
        if not isinstance(matched.target, LiveTeacher):
            raise ZooError(
                "A stored teacher has no relations of image tokens: set relation_weight=0, or use a live teacher."
            )
        how = self.config.relation_normalise
        # G of the teacher costs V C^2: it is kept as long as the head is the same parameter.
        head = teacher.llm.linear_head()
        if self._gram[0] is not (head and head.weight):
            with torch.no_grad():
                self._gram = (head and head.weight, gram_of(teacher.llm, vocab, how))
        with torch.no_grad():
            rows = matched.target.rows
            theirs = by_image(rows, matched.group.to(rows.device), shown)  # (M, N, C)
            wanted = relations(teacher.llm, theirs, vocab, how, self._gram[1])
        ours = by_image(matched.rows, matched.group, shown)
        each = relation_loss(relations(student.llm, ours, vocab, how), wanted.to(ours.device))  # (M,)
        there = torch.bincount(matched.group, minlength=shown) > 0  # an image may have lost all of its tokens
        return (each * there).sum()
