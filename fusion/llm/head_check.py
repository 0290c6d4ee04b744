"""Check that `llm.head` computes the logits that the language model's own forward computes."""

from typing import Any

import torch

from zoo.registry import ZooError, one_line


def check_head(llm: Any) -> None:
    """Compare `llm.head` with the model's own forward on two fixed vectors, with the decoder bypassed.

    Raises:
        ZooError: logits differ: the family scales or caps them in a way that `head` does not implement.
    """
    from transformers.modeling_outputs import MoeModelOutputWithPast

    class Aside(MoeModelOutputWithPast):
        def __getattr__(self, name: str) -> Any:  # None for further fields: cross_attentions, shared_kv_states
            if name.startswith("__"):
                raise AttributeError(name)

    lm = llm.lm
    weight = lm.get_input_embeddings().weight
    if weight.is_meta:
        return
    hidden = torch.linspace(-3, 3, 2 * llm.hidden_size, device=weight.device, dtype=weight.dtype).sin()
    hidden = hidden.view(1, 2, llm.hidden_size)
    decoder = lm.get_decoder()  # OPT's forward calls a decoder nested inside its decoder
    if decoder is lm or decoder is lm.get_output_embeddings():  # families without an own `get_decoder`
        decoder = llm.decoder
    aside = Aside(last_hidden_state=hidden)
    why = ""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return aside

    decoder.forward, own = forward, decoder.__dict__.get("forward")
    try:
        with torch.no_grad():
            wanted = lm(inputs_embeds=hidden, use_cache=False).logits
            got = llm.head(hidden)
    except Exception as error:  # a family's forward may raise anything
        wanted, got, why = hidden, hidden[:1, :1], f": {one_line(error)}"
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
    if wanted.shape != got.shape or not torch.allclose(got.float(), wanted.float(), rtol=1e-2, atol=1e-4):
        raise ZooError(f"Logits of {type(lm).__name__} cannot be reproduced from its hidden states{why}.")
