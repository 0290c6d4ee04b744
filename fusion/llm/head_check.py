"""The vocabulary projection as we compute it, compared with the language model's own forward."""

from typing import Any

import torch

from zoo.registry import ZooError, one_line


def check_head(llm: Any) -> None:
    """Compare `llm.head` with the model's own forward on two fixed vectors, the decoder standing aside.

    Raises:
        ZooError: this family computes its logits in a way that `head` does not know.
    """
    from transformers.modeling_outputs import MoeModelOutputWithPast

    class Aside(MoeModelOutputWithPast):
        def __getattr__(self, name: str) -> Any:  # what families read beside: cross_attentions, shared_kv_states
            if name.startswith("__"):
                raise AttributeError(name)

    lm = llm.lm
    weight = lm.get_input_embeddings().weight
    if weight.is_meta:
        return
    hidden = torch.linspace(-3, 3, 2 * llm.hidden_size, device=weight.device, dtype=weight.dtype).sin()
    hidden = hidden.view(1, 2, llm.hidden_size)
    decoder = lm.get_decoder()  # OPT's head asks the one inside of its decoder
    if decoder is lm or decoder is lm.get_output_embeddings():  # no way to ask these families
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
    except Exception as error:  # the head of a family may do anything
        wanted, got, why = hidden, hidden[:1, :1], f": {one_line(error)}"
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
    if wanted.shape != got.shape or not torch.allclose(got.float(), wanted.float(), rtol=1e-2, atol=1e-4):
        raise ZooError(f"{type(lm).__name__} computes its logits in a way that is not known here{why}.")
