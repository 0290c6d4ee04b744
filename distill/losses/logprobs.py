"""Log-probabilities of given answers, computed in chunks of positions."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.registry import ZooError

AT_ONCE = 1 << 26  # logits of a chunk; with several chunks they are recomputed in backward


def token_logprobs(llm: Any, rows: Tensor, wanted: Tensor, chunk: int | None = None) -> Tensor:
    """Give the log-probability of each token `wanted` (S,) after the hidden state in `rows` (S, C): (S,), float32.

    Args:
        llm: the language model, for its vocabulary projection; all of its columns count.
        chunk: positions at once; None: by the size of the vocabulary.
    """
    chunk = chunk or max(1, AT_ONCE // llm.vocab_size)
    if len(wanted) <= chunk:
        return _logprobs(llm, rows, wanted)
    pieces = zip(rows.split(chunk), wanted.split(chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_logprobs(llm, r, w) for r, w in pieces])
    return torch.cat([checkpoint(_logprobs, llm, r, w, use_reentrant=False) for r, w in pieces])  # type: ignore[misc]


def answer_logprobs(seen: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Sum the log-probabilities of the tokens of each answer in the pairs of a batch.

    Tokens are matched by their order among all tokens of pairs, which does not depend on image tokens; so student and
    teacher may have sequences of different length.

    Args:
        seen: view of a model (`zoo.composed.outputs.Seen`): its hidden states, and `sequence.pair_ids`.
        batch: `input_ids` and `pair_ids` (B, T) as the student's processor wrote them.

    Returns:
        The sums (2 * P,): chosen and rejected answer of each pair in turns; and how many tokens each has (2 * P,).

    Raises:
        ZooError: the batch has no pairs.
    """
    pairs = batch.get("pair_ids")
    if pairs is None or not bool((pairs >= 0).any()):
        raise ZooError(
            "A preference loss needs pairs of answers, and the batch has none: train on data=preference, or on "
            "data=scenes_pairs."
        )
    left, hidden = seen.sequence.pairs(), seen.last_hidden_state
    assert left is not None and left.shape == hidden.shape[:2], "pairs follow the tokens that a pruner left"
    rows = hidden[:, :-1][left[:, 1:] >= 0]  # (S, C), the positions before the tokens of an answer
    device = rows.device
    answer = pairs[pairs >= 0].to(device)  # (S,)
    if len(rows) != len(answer):
        raise ZooError(f"The batch has {len(answer)} tokens in pairs of answers, and the model has {len(rows)}.")
    each = token_logprobs(seen.llm, rows, batch["input_ids"][pairs >= 0].to(device))  # (S,)
    count = int(answer.max()) + 1
    sums = torch.zeros(count, device=device, dtype=each.dtype).index_add(0, answer, each)
    return sums, torch.bincount(answer, minlength=count)


def stored_logprobs(batch: Mapping[str, Any], count: int) -> Tensor:
    """Take a stored teacher's log-probabilities of the answers, (2 * P,), from the batch's targets.

    Raises:
        ZooError: there are none, or their number is not that of the answers.
    """
    kept = (batch.get("targets") or {}).get("teacher.pairs.log_probs")
    if kept is None or len(kept) != count:
        found = "no answers" if kept is None else f"{len(kept)} answers"
        raise ZooError(f"The stored teacher has {found} for a batch with {count}: run zoo teach for this stage.")
    return kept.flatten()


def _logprobs(llm: Any, rows: Tensor, wanted: Tensor) -> Tensor:
    logits = llm.head(rows)  # (S, V)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(logits, wanted, reduction="none")
