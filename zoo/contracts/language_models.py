"""Rules for language models, each built alone with random weights."""

from typing import Any

import torch
import torch.nn.functional as F

from zoo.contracts.case import Case, add_options_rule, add_saving_rule, add_structure_rule
from zoo.contracts.given import VOCAB, padded_batch
from zoo.contracts.rules import Rules, expect, expect_close
from zoo.registry import LanguageModel, build
from zoo.registry.versions import checkpoint_activations

RULES = Rules()


class LanguageModelCase(Case):
    """A language model for 97 tokens."""

    def build(self, seed: int = 0, dtype: torch.dtype | None = None, **options: Any) -> Any:
        torch.manual_seed(seed)
        return build("llm", {**self.node, **options}, vocab_size=VOCAB, dtype=dtype).eval()


@RULES.add("counts", "vocab_size, num_layers and hidden_size are those of its layers and its head")
@torch.no_grad()
def counts(case: LanguageModelCase) -> str:
    llm = case.build()
    expect(isinstance(llm, LanguageModel), f"its class is {type(llm).__mro__[1].__name__}", "a LanguageModel")
    expect(llm.vocab_size >= VOCAB, f"vocab_size is {llm.vocab_size}", f"at least {VOCAB}")
    expect(len(llm.layers) == llm.num_layers, f"{len(llm.layers)} layers, num_layers is {llm.num_layers}", "equal")
    ids, mask = padded_batch()
    hidden = llm.hidden(inputs_embeds=llm.embed(ids), attention_mask=mask).last_hidden_state
    expect(hidden.shape == (2, 9, llm.hidden_size), f"states {tuple(hidden.shape)}", f"(2, 9, {llm.hidden_size})")
    shape = tuple(llm.head(hidden).shape)
    expect(shape == (2, 9, llm.vocab_size), f"logits {shape}", f"(2, 9, {llm.vocab_size})")
    return f"{llm.num_layers} layers of {llm.hidden_size}"


@RULES.add("head", "embed, hidden and head compute the model's own logits, and linear_head is that head in numbers")
@torch.no_grad()
def head(case: LanguageModelCase) -> str:
    llm = case.build()
    ids, mask = padded_batch()
    wanted = llm.lm(input_ids=ids, attention_mask=mask).logits
    hidden = llm.hidden(inputs_embeds=llm.embed(ids), attention_mask=mask).last_hidden_state
    expect_close(llm.head(hidden), wanted, "by embed, hidden and head, the logits", 1e-5)
    if (linear := llm.linear_head()) is None:
        return "no linear_head"
    found = linear.scale * F.linear(hidden, linear.weight, linear.bias)
    found = found if linear.cap is None else linear.cap * torch.tanh(found / linear.cap)
    expect_close(found, wanted, "by linear_head, the logits", 1e-5)
    return "with its linear_head"


@RULES.add("forward on meta", "its decoder and its head run on the meta device, as `zoo check` runs them")
def forward_on_meta(case: LanguageModelCase) -> str:
    with torch.device("meta"):
        llm = case.build()
    real = case.build()
    for what in ("hidden_size", "num_layers", "provides"):
        ours, theirs = getattr(llm, what), getattr(real, what)
        expect(ours == theirs, f"{what} is {ours} on meta", f"{theirs}")
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device="meta")  # transformers reads the values of smaller masks
    embeds = torch.empty(2, 5, llm.hidden_size, device="meta")
    shape = tuple(llm.head(llm.hidden(inputs_embeds=embeds, attention_mask=mask).last_hidden_state).shape)
    expect(shape == (2, 5, llm.vocab_size), f"logits {shape}", f"(2, 5, {llm.vocab_size})")
    return f"{shape}"


@RULES.add("gradient", "a gradient reaches every weight, in float32 and bfloat16")
def gradient(case: LanguageModelCase) -> str:
    for dtype in (torch.float32, torch.bfloat16):
        llm = case.build(dtype=dtype).train()
        ids, mask = padded_batch(4, 16)
        hidden = llm.hidden(inputs_embeds=llm.embed(ids), attention_mask=mask).last_hidden_state
        expect(hidden.dtype == dtype, f"built in {dtype} its states are {hidden.dtype}", f"{dtype}")
        llm.head(hidden).float().logsumexp(-1).sum().backward()
        bare = [n for n, p in llm.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        expect(not bare, f"in {dtype} no finite gradient reaches {', '.join(bare[:3])}", "one for each")
    return f"{sum(1 for _ in llm.parameters())} weights"


@RULES.add("alone", "a row of a batch with padding gives what it gives alone")
@torch.no_grad()
def alone(case: LanguageModelCase) -> str:
    llm = case.build()
    ids, mask = padded_batch()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    embeds = llm.embed(ids)
    both = llm.hidden(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
    expect_close(both[:1, 3:], llm.hidden(inputs_embeds=embeds[:1, 3:]).last_hidden_state, "row 0 alone", 1e-5)
    expect_close(both[1:], llm.hidden(inputs_embeds=embeds[1:]).last_hidden_state, "row 1 alone", 1e-5)
    return "2 rows"


@RULES.add("checkpointing", "activation checkpointing changes no gradient, in both of its forms")
def checkpointing(case: LanguageModelCase) -> str:
    ids, mask = padded_batch()
    grads: list[list[Any]] = []
    for form in (None, False, True):
        llm = case.build().train()
        if form is not None:
            checkpoint_activations(llm.lm, {"use_reentrant": form})
        embeds = llm.embed(ids).detach().requires_grad_()
        llm.head(llm.hidden(inputs_embeds=embeds, attention_mask=mask).last_hidden_state).logsumexp(-1).sum().backward()
        grads.append([embeds.grad, *(p.grad for p in llm.layers.parameters())])
    for form, some in zip((False, True), grads[1:], strict=True):
        off = max(float((a - b).abs().max()) for a, b in zip(grads[0], some, strict=True))
        expect(off <= 1e-6, f"with use_reentrant={form}, gradients differ by {off:.1e}", "at most 1e-06")
    return "both forms"


@RULES.add("generate", "transformers' generate gives the same by ids and by embeddings")
@torch.no_grad()
def generate(case: LanguageModelCase) -> str:
    llm = case.build()
    ids, mask = padded_batch()
    kwargs = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    by_ids = llm.lm.generate(ids, **kwargs)[:, ids.shape[1] :]
    by_embeds = llm.lm.generate(inputs_embeds=llm.embed(ids), **kwargs)
    expect(torch.equal(by_ids, by_embeds), f"by embeddings {by_embeds.tolist()}", f"{by_ids.tolist()}")
    return "4 tokens"


def _logits(llm: Any) -> torch.Tensor:
    ids, mask = padded_batch()
    logits: torch.Tensor = llm.lm(input_ids=ids, attention_mask=mask).logits
    return logits


add_structure_rule(RULES)
add_saving_rule(RULES, _logits)
add_options_rule(RULES)
