"""Reranking: candidates of a group are ordered by how much likelier "yes" is than "no", and the right one should lead.

Each dialog asks whether one candidate fits; its reference is yes or no, and `meta["group"]` names the list that it
belongs to. The likelihoods are those of the whole answers, end of turn included, as task `choice` has them. Of equal
scores the wrong one comes first, so that a model that answers all alike scores 0. As in MonoT5 (Nogueira et al.,
arXiv:2003.06713), with the words as options.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from zoo.registry import Dialog, Score, Task, ZooError, register
from zoo.tasks.answers import accepted, plain
from zoo.tasks.estimates import column, mean
from zoo.tasks.groups import group_of


@dataclass
class RerankConfig:
    yes: str = "yes"  # answer of a candidate that fits
    no: str = "no"  # answer of one that does not
    at: list[int] = field(default_factory=lambda: [1])  # recall among this many first


@register("task", "rerank")
class Rerank(Task):
    """recall@k and mrr (1 / rank of the first right candidate), means over groups."""

    mode = "scores"
    max_new_tokens = 0

    def __init__(self, config: RerankConfig) -> None:
        if not config.at or min(config.at) < 1:
            raise ZooError(f"at must have numbers from 1 on, got {config.at}.")
        if plain(config.yes) == plain(config.no):
            raise ZooError(f"yes and no must be two answers, got {config.yes!r} and {config.no!r}.")
        self.yes, self.no, self.at = config.yes, config.no, sorted(set(config.at))

    def candidates(self, dialog: Dialog) -> Sequence[str]:
        """The two answers whose likelihoods are compared."""
        return (self.yes, self.no)

    def score(self, dialog: Dialog, prediction: Mapping[str, float]) -> dict[str, float]:
        """Return how much likelier yes is, and whether the candidate is right.

        Raises:
            ZooError: the dialog has no `meta["group"]`, or its reference is neither yes nor no.
        """
        if not (group := group_of(dialog)):
            raise ZooError("Task 'rerank' needs meta[\"group\"], which the candidates of a list have in common.")
        said = {plain(answer) for answer in accepted(dialog)} & {plain(self.yes), plain(self.no)}
        if len(said) != 1:
            raise ZooError(f"Task 'rerank' needs the reference {self.yes!r} or {self.no!r}, got {accepted(dialog)}.")
        right = float(plain(self.yes) in said)
        return {**group, "_right": right, "_score": float(prediction[self.yes] - prediction[self.no])}

    def summarise(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
        """Rank the candidates of each group that has a right one."""
        groups, right, score = (column(rows, name) for name in ("_group", "_right", "_score"))
        ranks = []
        for group in np.unique(groups):
            of = groups == group
            if right[of].any():
                best = score[of][right[of] == 1].max()
                ranks.append(1 + int(((right[of] == 0) & ~(score[of] < best)).sum()))  # NaN is not smaller
        found = np.array(ranks, np.float64)
        return {f"recall@{k}": mean((found <= k).astype(np.float64)) for k in self.at} | {"mrr": mean(1 / found)}
