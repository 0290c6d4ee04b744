"""Preference losses of pairs of answers, from the log-probabilities of policy and reference.

For a pair, u and d are the policy's log-probability minus the reference's, of the chosen and of the rejected answer:
sums over the tokens of an answer, or means.

    dpo        -log sigmoid(beta (u - d))                                     Rafailov et al., arXiv:2305.18290, Eq. 7
    kto_pair   1/2 [1 - sigmoid(beta (u - [mean d]+))] + 1/2 [1 - sigmoid(beta ([mean u]+ - d))]
    hinge      [1 - beta (u - d)]+                                            Zhao et al., arXiv:2305.10425
    ipo        (u - d - 1 / (2 beta))^2                                       Azar et al., arXiv:2310.12036, Eq. 17

With label smoothing e, dpo is (1 - e) of that and e of the same with the answers swapped: the conservative DPO of
Mitchell's note of 2023, for pairs of which a share e is labelled the wrong way round.

Sums or means: DPO, hinge, kto_pair and IPO take sums in the release of LLaVA-MoD, as the equations have it. TRL takes
sums too, but means for IPO (and for its `sigmoid_norm`, which is dpo here): according to its source, the authors of IPO
used means. With answers of one token both are the same.

kto_pair applies KTO (Ethayarajh et al., arXiv:2402.01306) to pairs: each half is compared with a mean over the other
answers of the forward pass, [x]+ being max(x, 0). KTO keeps the gradient out of those means, and so does this; the
release of LLaVA-MoD lets it through, which `through_means` does too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("kto_pair", "dpo", "hinge", "ipo")


def preference_loss(
    kind: str,
    chosen: Tensor,
    rejected: Tensor,
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
    through_means: bool = False,
) -> Tensor:
    """Compute the loss of each pair, (P,).

    Args:
        kind: one of `LOSSES`.
        chosen: (P,) u, policy minus reference of the chosen answers.
        rejected: (P,) d, of the rejected ones.
        beta: strength of the pull to the reference; larger keeps the policy closer.
        label_smoothing: of dpo: share of pairs taken to be labelled the wrong way round.
        through_means: of kto_pair: let the gradient through the means it compares with.
    """
    margin = chosen - rejected
    if kind == "dpo":
        loss = -F.logsigmoid(beta * margin)
        if not label_smoothing:
            return loss
        return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-beta * margin)
    if kind == "hinge":
        return torch.relu(1 - beta * margin)
    if kind == "ipo":
        return (margin - 1 / (2 * beta)).square()
    assert kind == "kto_pair", "the config checks names"
    above, below = (x if through_means else x.detach() for x in (chosen, rejected))
    up = 1 - torch.sigmoid(beta * (chosen - below.mean().clamp(min=0)))
    down = 1 - torch.sigmoid(beta * (above.mean().clamp(min=0) - rejected))
    return (up + down) / 2
