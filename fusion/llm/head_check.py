"""Check that `llm.head` computes the logits that the language model's own forward computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ZooError, one_line

_ROWS = 64  # of the vocabulary that are compared first


def check_head(llm: Any) -> None:
    """Compare `llm.head` with the model's own forward on two fixed vectors, with the decoder bypassed.

    Families scale and cap all logits alike, so some rows of the vocabulary show it, and the others need not be read
    from their file. They are looked at where those differ, or where the family's forward wants them all.

    Raises:
        ZooError: logits differ: the family scales or caps them in a way that `head` does not implement.
    """
    weight = llm.lm.get_input_embeddings().weight
    if weight.is_meta:
        return
    hidden = torch.linspace(-3, 3, 2 * llm.hidden_size, device=weight.device, dtype=weight.dtype).sin()
    hidden = hidden.view(1, 2, llm.hidden_size)
    head = llm.lm.get_output_embeddings()
    if type(head) is nn.Linear and head.out_features > 2 * _ROWS:
        # Larger vectors: the largest of few logits is smaller than that of all, and a cap shows in large ones.
        with _few_rows(head):
            if _difference(llm, 4 * hidden) is None:
                return
    if (why := _difference(llm, hidden)) is not None:
        raise ZooError(f"Logits of {type(llm.lm).__name__} cannot be reproduced from its hidden states{why}.")


@contextmanager
def _few_rows(head: nn.Linear) -> Iterator[None]:
    """Leave a head about `_ROWS` rows, from all over the vocabulary, for a while."""
    whole, step = dict(head._parameters), head.out_features // _ROWS
    try:
        for name, tensor in whole.items():
            head._parameters[name] = None if tensor is None else nn.Parameter(tensor.detach()[::step], False)
        yield
    finally:
        head._parameters.update(whole)


def _difference(llm: Any, hidden: Tensor) -> str | None:
    """Return None where logits of hidden states (1, 2, C) are equal; else why they could not be made, if so."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    class Aside(MoeModelOutputWithPast):
        def __getattr__(self, name: str) -> Any:  # None for further fields: cross_attentions, shared_kv_states
            if name.startswith("__"):
                raise AttributeError(name)

    lm = llm.lm
    decoder = lm.get_decoder()  # OPT's forward calls a decoder nested inside its decoder
    if decoder is lm or decoder is lm.get_output_embeddings():  # families without an own `get_decoder`
        decoder = llm.decoder
    aside = Aside(last_hidden_state=hidden)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return aside

    decoder.forward, own = forward, decoder.__dict__.get("forward")
    try:
        with torch.no_grad():
            wanted = lm(inputs_embeds=hidden, use_cache=False).logits
            got = llm.head(hidden)
    except Exception as error:  # a family's forward may raise anything
        return f": {one_line(error)}"
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
    same = wanted.shape == got.shape and torch.allclose(got.float(), wanted.float(), rtol=1e-2, atol=1e-4)
    return None if same else ""
