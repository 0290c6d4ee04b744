"""What a distiller sees of a model: a vocabulary projection, hidden states, labels, pairs of answers; no model."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from zoo.composed.outputs import LLMSequence, Seen
from zoo.registry import LinearHead

VOCAB = 13
ROWS, LENGTH, WIDTH = 3, 9, 6  # of `seen`


class LLM:
    """A vocabulary projection, as a distiller sees it."""

    def __init__(self, width, vocab=VOCAB, bias=False, scale=1.0, cap=None, seed=0, trains=True, plain=True):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).requires_grad_(trains)
        self.bias = torch.randn(vocab, generator=generator, dtype=torch.float64) if bias else None
        self.scale, self.cap, self.vocab_size, self.plain = scale, cap, vocab, plain

    def head(self, hidden):
        logits = F.linear(hidden, self.weight, self.bias) * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def linear_head(self):
        return LinearHead(self.weight, self.bias, self.scale, self.cap) if self.plain else None


def seen(labels, pair_ids=None, llm=None, seed=1, length=LENGTH):
    """Random hidden states (ROWS, length, WIDTH), float64, without images; the projection goes through autograd."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 0.3 * torch.randn(ROWS, length, WIDTH, generator=generator, dtype=torch.float64)
    sequence = LLMSequence(None, None, None, labels, pair_ids=pair_ids)
    out = SimpleNamespace(
        last_hidden_state=hidden.requires_grad_(), labels=labels, sequence=sequence, losses={}, image_tokens=None
    )
    return Seen(out, llm or LLM(WIDTH, plain=False))
