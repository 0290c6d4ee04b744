"""LLaVA-MoD: mimic distillation of answers, then preference distillation with the teacher as the reference model.

Paper: Shu et al., LLaVA-MoD, arXiv:2408.15881. Two objectives, for the stages of its recipe:

    mimic        mean over the answers' tokens of KL(teacher || student), temperature 1; dense to dense with no other
                 loss (loss_weights: {answer: 0}), dense to sparse with the answer loss and the experts' balance
    preference   a loss of pairs of answers (`zoo.distill.losses.preference`) with the teacher as the reference model;
                 the version of ICLR and the released default is kto_pair, the first version of the paper has DPO

Where we differ from the released code: the divergence is a KL, not the cross-entropy with the same gradient; positions
that predict a label are compared (`unshifted` compares the label's own position, as the release does); the balance loss
enters once (`double_balance`); the means of kto_pair have no gradient (`through_means`). `label_smoothing` of DPO is
the release's, and 0 as there. No preference loss keeps the likelihood of the chosen answer: both answers may lose
probability to other text, which `anchor`, the chosen answer's likelihood, prevents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.distill.losses.chunked import LiveTeacher, divergence
from zoo.distill.losses.logprobs import answer_logprobs, stored_logprobs
from zoo.distill.losses.preference import LOSSES, preference_loss
from zoo.distill.matching.positions import Matched, match_responses, shared_vocab
from zoo.distill.matching.terms import Terms, Weighed, beta_of, check_divergence, token_weights, why_live
from zoo.registry import IGNORE_INDEX, ZooError, register, unknown

OBJECTIVES = ("mimic", "preference")
LOGPROBS = ("sum", "mean")
POSITIONS = ("response", "all")
LABELS_ONLY = "A stored teacher holds predictions of labels only: set unshifted=false and positions=response"


@dataclass
class LLaVAModConfig:
    objective: str = "mimic"  # mimic | preference
    weight: float = 1.0  # of the objective's loss
    warmup: float = 0.0  # share of the stage over which the weight rises from 0, in [0, 1]
    divergence: str = "forward"  # of mimic: forward (the paper's), reverse or jsd
    jsd_beta: float = 0.5  # of jsd, in (0, 1): share of the teacher in the mixture
    temperature: float = 1.0  # of mimic, both models
    per: str = "token"  # of mimic; token: the mean over tokens, answer: over answers
    positions: str = "response"  # of mimic: response, or all, padding included (an option of the release, off there)
    # of mimic, for parity with the release: compare the position of a label, not the one before
    unshifted: bool = False
    double_balance: bool = False  # of mimic, for parity: add the experts' balance loss a second time
    loss: str = "kto_pair"  # of preference: kto_pair (the release's), dpo, hinge or ipo
    beta: float = 0.1  # of preference: how close the student stays to the reference, more than 0
    logprobs: str = "sum"  # of preference: an answer's log-probability is the sum over its tokens, or the mean
    label_smoothing: float = 0.0  # of dpo: share of pairs taken to be labelled the wrong way round, in [0, 0.5)
    through_means: bool = False  # of kto_pair, for parity: let the gradient through the means it compares with
    anchor: float = 0.0  # of preference: weight of the likelihood of chosen answers, a mean over tokens; 1 recommended

    def __post_init__(self) -> None:
        self.terms()
        check_divergence(self.divergence, self.jsd_beta, self.temperature, self.per)
        words = {"objective": OBJECTIVES, "loss": LOSSES, "positions": POSITIONS, "logprobs": LOGPROBS}
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                raise unknown(f"{name} of llava_mod", getattr(self, name), allowed)
        if not self.beta > 0:
            raise ZooError(f"beta must be more than 0, got {self.beta}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ZooError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}.")
        if self.label_smoothing and (self.objective, self.loss) != ("preference", "dpo"):
            raise ZooError(f"label_smoothing is for objective=preference with loss=dpo; loss is {self.loss!r}.")
        if self.positions == "all" and self.per == "answer":
            raise ZooError("positions=all does not distinguish answers: per must be token.")

    def terms(self) -> Terms:
        terms = {self.objective: (self.weight, self.warmup)}
        return Terms(terms | ({"anchor": (self.anchor, 0.0)} if self.objective == "preference" else {}))


@register("distiller", "llava_mod")
class LLaVAMod(Weighed):
    """Losses `mimic`, or `preference` and `anchor`; preference also logs three statistics of pairs with weight 0.

    `margin` is the mean of beta (u - d), `accuracy` the share of pairs with u > d, `chosen` the mean of beta u.
    """

    def __init__(self, config: LLaVAModConfig) -> None:
        self.config, self.terms = config, config.terms()
        self.jsd_beta = beta_of(config.divergence, config.jsd_beta)
        mimic = config.objective == "mimic"
        self.needs = frozenset({"teacher.response" if mimic else "teacher.pairs"})
        self.own_reference = not mimic  # the teacher may be the student before this stage; read by the check
        if mimic:
            placed = config.unshifted or config.positions == "all"
            self.live_only = LABELS_ONLY if placed else why_live(config.temperature)
        self.losses = frozenset({"balance_again"} if config.double_balance else ())  # in addition to weighted ones
        by_label = config.per == "token" and config.positions == "response"
        self.per_label = frozenset({"mimic"} if by_label else ()) if mimic else frozenset({"anchor"})

    @property
    def weights(self) -> dict[str, float]:  # type: ignore[override]
        """Weight of each loss in the current step; 0 for statistics that are only logged."""
        logged = () if self.config.objective == "mimic" else ("margin", "accuracy", "chosen")
        return super().weights | dict.fromkeys(logged, 0.0)

    def __call__(self, student: Any, teacher: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Compare student and teacher, or reward the student for separating answers.

        Args:
            student: its `last_hidden_state` (B, T, C), `labels` (B, T) and `sequence`.
            teacher: the same of the teacher; None if the batch holds its stored predictions.
            batch: `pair_ids` for preference; `num_labels`, the divisor of sums over tokens (absent: their number).
        """
        if self.config.objective == "preference":
            return self._preference(student, teacher, batch)
        losses = {"mimic": self._mimic(student, teacher, batch)}
        if self.config.double_balance:
            again = [value for name, value in (student.losses or {}).items() if name != "answer"]
            losses |= {"balance_again": torch.stack(again).sum()} if again else {}
        return losses

    def _mimic(self, student: Any, teacher: Any, batch: Mapping[str, Any]) -> Tensor:
        config = self.config
        if config.unshifted or config.positions == "all":
            matched = _in_place(student, teacher, config.positions == "all")
        else:
            matched = match_responses(student, teacher, batch)
        count = {} if config.positions == "all" else batch
        return divergence(
            student.llm,
            matched.rows,
            matched.target,
            beta=self.jsd_beta,
            temperature=config.temperature,
            vocab_size=shared_vocab(student, teacher, batch),
            weights=token_weights(matched, count, config.per),
        )

    def _preference(self, student: Any, teacher: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        config = self.config
        ours, tokens = answer_logprobs(student, batch)  # (2 P,)
        with torch.no_grad():
            kept = teacher is None
            theirs = (stored_logprobs(batch, len(ours)) if kept else answer_logprobs(teacher, batch)[0]).to(ours)
        ratios = (ours - theirs) / tokens.clamp(min=1) if config.logprobs == "mean" else ours - theirs  # (2 P,)
        u, d = ratios.unflatten(0, (-1, 2)).unbind(1)  # (P,) each
        switches: dict[str, Any] = {"label_smoothing": config.label_smoothing, "through_means": config.through_means}
        losses = {"preference": preference_loss(config.loss, u, d, config.beta, **switches).mean()}
        if config.anchor:
            learnt = float(batch.get("num_labels") or tokens[::2].sum())
            losses["anchor"] = -ours[::2].sum() / learnt
        with torch.no_grad():
            losses["margin"] = config.beta * (u - d).mean()
            losses["accuracy"] = (u > d).float().mean()
            losses["chosen"] = config.beta * u.mean()
        return losses


def _in_place(student: Any, teacher: Any, everywhere: bool) -> Matched:
    """Match positions of labels, or all positions, by their index, as the release does."""
    if teacher is None:
        raise ZooError(f"{LABELS_ONLY}.")
    rows, groups = [], None
    for seen in (student, teacher):
        where = torch.ones_like(seen.labels, dtype=torch.bool) if everywhere else seen.labels != IGNORE_INDEX
        rows.append(seen.last_hidden_state[where])
        if groups is None:
            starts = where & ~torch.nn.functional.pad(where, (1, -1))
            groups = (starts.flatten().cumsum(0).view_as(where) - 1)[where]
    if len(rows[0]) != len(rows[1]):
        raise ZooError(
            f"The student has {len(rows[0])} positions and the teacher {len(rows[1])}: positions=all needs sequences "
            "of one length."
        )
    return Matched(rows[0], LiveTeacher(rows[1], teacher.llm.head), group=groups)
