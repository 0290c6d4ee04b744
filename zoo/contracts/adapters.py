"""Rules for adapters, each on a tiny language model, its weights moved off their start where that hides mistakes."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.contracts.case import Case, add_options_rule
from zoo.contracts.given import VOCAB, features, image_row, llm_node, padded_batch, same_state, tiny_llm
from zoo.contracts.rules import NotForThisPart, Rules, expect, expect_close
from zoo.registry import Adapter, ZooError, build
from zoo.registry.forward_pass import running
from zoo.registry.versions import checkpoint_activations

DIM, GRID = 24, (4, 4)
RULES = Rules()


@dataclass
class AdapterCase(Case):
    """An adapter on a language model of a family: dense, or with experts where it needs these."""

    model_type: str = ""

    @property
    def family(self) -> str:
        return self.model_type or ("mixtral" if "moe" in self.cls.needs else "llama")

    def llm(self) -> Any:
        return tiny_llm(self.family)

    def build(self, seed: int = 0, llm: Any = None, **options: Any) -> Any:
        torch.manual_seed(seed)
        llm = self.llm() if llm is None else llm
        derived = {"llm": llm, "vision_dim": DIM, "text_dim": llm.hidden_size, "grid": GRID}
        return build("adapter", {**self.node, **options}, **derived).eval()

    def attached(self, seed: int = 0, **options: Any) -> tuple[Any, Any]:
        """Build it on a language model of its own, attached, its weights as training would leave them."""
        llm = self.llm()
        adapter = self.build(seed, llm, **options)
        adapter.attach()
        shake(adapter, llm, seed)
        return llm, adapter


def shake(adapter: Any, llm: Any, seed: int = 1) -> dict[str, Any]:
    """Move all of its parameters; returns them by name."""
    g = torch.Generator().manual_seed(seed)
    inside = {n: p for n, p in llm.lm.named_parameters() if adapter.owns(n) and not adapter.idles(n)}
    own = dict(adapter.named_parameters()) | inside
    with torch.no_grad():
        for parameter in own.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g).to(parameter))
    return own


def logits(llm: Any, adapter: Any, embeds: Tensor | None = None, grad: bool = False) -> Tensor:
    """Logits of two prompts with an image each, one of them padded."""
    ids, mask = padded_batch()
    adapter.condition(features(m=2, grid=GRID, dim=DIM), [1, 1])
    with nullcontext() if grad else torch.no_grad():
        embeds = llm.embed(ids) if embeds is None else embeds
        return llm.head(llm.hidden(inputs_embeds=embeds, attention_mask=mask).last_hidden_state)


@RULES.add("base", "fresh it is the base model, if it says so; detached it is gone, with every hook")
def base(case: AdapterCase) -> str:
    llm = case.llm()
    if not case.cls.needs & {"moe", "dense"} <= llm.provides:
        raise NotForThisPart(f"it needs what {case.family!r} does not give")
    ids, mask = padded_batch()
    before = {k: v.clone() for k, v in llm.lm.state_dict().items()}
    tree = [(n, id(m)) for n, m in llm.lm.named_modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llm.lm.modules()]
    with torch.no_grad():
        wanted = llm.lm(input_ids=ids, attention_mask=mask).logits
    adapter = case.build(llm=llm)
    expect(isinstance(adapter, Adapter), f"its class is {type(adapter).__mro__[1].__name__}", "an Adapter")
    adapter.attach()
    random_start = case.node.get("method") == "fourierft"  # PEFT's starts with a random spectrum
    if getattr(adapter, "starts_as_base", True) and not random_start:
        expect_close(logits(llm, adapter), wanted, "with a fresh adapter, the logits", 1e-6)
    shake(adapter, llm)
    moved = float((logits(llm, adapter) - wanted).abs().max())
    expect(moved > 1e-4, f"with its weights changed, the logits differ by {moved:.1e}", "more than 1e-04")
    adapter.detach()
    with torch.no_grad():
        expect_close(llm.lm(input_ids=ids, attention_mask=mask).logits, wanted, "detached, the logits", 0.0)
    expect(same_state(llm.lm.state_dict(), before), "detached, the LLM's weights differ", "bit-identical")
    expect([(n, id(m)) for n, m in llm.lm.named_modules()] == tree, "detached, modules were replaced", "the same")
    left = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llm.lm.modules()]
    expect(left == hooks, f"detached, {sum(left) - sum(hooks)} hooks are left", "none")
    return f"on {case.family}"


@RULES.add("again", "attached again it does what it did")
def again(case: AdapterCase) -> str:
    llm, adapter = case.attached()
    wanted = logits(llm, adapter)
    adapter.detach()
    adapter.attach()
    expect_close(logits(llm, adapter), wanted, "attached again, the logits", 0.0)
    return "equal logits"


@RULES.add("copy", "a deep copy is detached by itself, and the original too")
def copied(case: AdapterCase) -> str:
    llm, adapter = case.attached()
    wanted = logits(llm, adapter)
    adapter.condition(None, [0, 0])
    other, its = copy.deepcopy((llm, adapter))
    ids, mask = padded_batch()
    its.detach()
    expect_close(logits(llm, adapter), wanted, "with a copy detached, the logits", 0.0)
    adapter.detach()
    with torch.no_grad():
        there, here = (one.lm(input_ids=ids, attention_mask=mask).logits for one in (other, llm))
        expect_close(there, here, "the copy and the original detached, the logits", 0.0)
    return "equal logits"


@RULES.add("names", "weights of the LLM keep their names, and it `owns` each that it added")
def names(case: AdapterCase) -> str:
    llm = case.llm()
    before = {k: v.clone() for k, v in llm.lm.state_dict().items()}
    adapter = case.build(llm=llm)
    adapter.attach()
    state = llm.lm.state_dict()
    lost = [k for k, v in before.items() if k not in state or not torch.equal(state[k], v)]
    expect(not lost, f"attached, {', '.join(lost[:3])} are renamed or changed", "the names and values of the LLM")
    foreign = [k for k in state.keys() - before.keys() if not adapter.owns(k)]
    expect(not foreign, f"it added {', '.join(foreign[:3])} and does not own it", "owns(name) is True")
    return f"{len(before)} names"


@RULES.add("meta", "built on the meta device it and the LLM have the same weights, without memory")
def meta(case: AdapterCase) -> str:
    with torch.device("meta"):
        empty = build("llm", llm_node(case.family), vocab_size=VOCAB)
        adapter = case.build(llm=empty)
        adapter.attach()
    there = sorted({p.device.type for m in (empty.lm, adapter) for p in m.parameters()} - {"meta"})
    expect(not there, f"weights are on {', '.join(there)}", "all on meta")
    llm = case.llm()
    real = case.build(llm=llm)
    real.attach()
    for what, a, b in (("the LLM", empty.lm, llm.lm), ("the adapter", adapter, real)):
        ours, theirs = ({k: v.shape for k, v in m.state_dict().items()} for m in (a, b))
        expect(ours == theirs, f"weights of {what} differ on meta", "equal names and shapes")
    return f"{sum(1 for _ in real.parameters())} weights"


@RULES.add("gradient", "a gradient reaches all of its weights and no frozen ones, in float32 and bfloat16")
def gradient(case: AdapterCase) -> str:
    for dtype in (torch.float32, torch.bfloat16):
        llm = case.llm()
        llm.lm.to(dtype)
        llm.requires_grad_(False)
        adapter = case.build(llm=llm)
        adapter.attach()
        llm.train()
        adapter.train()
        own = shake(adapter, llm)
        expect(own, "it has no weights that train", "at least one")
        ids, mask = padded_batch(2, 40)
        with running():
            adapter.condition(features(m=2, grid=GRID, dim=DIM), [1, 1])
            hidden = llm.hidden(inputs_embeds=llm.embed(ids), attention_mask=mask).last_hidden_state
            aux = sum(adapter.aux_losses().values())
        (llm.head(hidden).float().logsumexp(-1).sum() + aux).backward()
        bare = [n for n, p in own.items() if p.grad is None or not p.grad.isfinite().all()]
        expect(not bare, f"in {dtype} no finite gradient reaches {', '.join(bare[:3])}", "one for each")
        thawed = [n for n, p in llm.lm.named_parameters() if not adapter.owns(n) and p.grad is not None]
        expect(not thawed, f"frozen weights have a gradient: {', '.join(thawed[:3])}", "none")
    return f"{len(own)} weights"


@RULES.add("state", "state dicts of it and the LLM make another one give the same")
def state(case: AdapterCase) -> str:
    (llm, adapter), (other_llm, other) = case.attached(0), case.attached(3)
    off = float((logits(llm, adapter) - logits(other_llm, other)).abs().max())
    expect(off > 0, "two seeds gave equal logits", "random or moved weights that have an effect")
    other_llm.lm.load_state_dict(llm.lm.state_dict())
    other.load_state_dict(adapter.state_dict())
    expect_close(logits(other_llm, other), logits(llm, adapter), "with the same state, the logits", 0.0)
    return "equal logits"


@RULES.add("alone", "a row of a batch gives what it gives alone, and twice the same")
def alone(case: AdapterCase) -> str:
    llm, adapter = case.attached()
    ids, mask = padded_batch()
    both = logits(llm, adapter)
    expect_close(logits(llm, adapter), both, "the same batch a second time", 0.0)
    adapter.condition(image_row(features(m=2, grid=GRID, dim=DIM), 1), [1])
    with torch.no_grad():
        hidden = llm.hidden(inputs_embeds=llm.embed(ids[1:]), attention_mask=mask[1:]).last_hidden_state
        expect_close(llm.head(hidden), both[1:], "row 1 alone", 1e-5)
    return "2 rows"


@RULES.add("text alone", "without images, where `condition` gets None, a pass is the same whatever came before it")
@torch.no_grad()
def text_alone(case: AdapterCase) -> str:
    llm, adapter = case.attached()
    ids, mask = padded_batch()

    def text() -> Tensor:
        adapter.condition(None, [0, 0])
        return llm.head(llm.hidden(inputs_embeds=llm.embed(ids), attention_mask=mask).last_hidden_state)

    first = text()
    logits(llm, adapter)
    expect_close(text(), first, "text behind a pass with images", 0.0)
    return "2 rows"


def learnt(case: AdapterCase, prepare: Any, **options: Any) -> list[Tensor]:
    """Gradients of the input and of all its parameters, after `prepare` changed the language model."""
    llm = case.llm()
    adapter = case.build(llm=llm, **options)
    adapter.attach()
    own = shake(adapter, llm)
    llm.train()
    adapter.train()
    prepare(llm)
    embeds = llm.embed(padded_batch()[0]).detach().requires_grad_()
    torch.manual_seed(0)
    with running():
        loss = logits(llm, adapter, embeds, grad=True).logsumexp(-1).sum() + sum(adapter.aux_losses().values())
    loss.backward()
    return [embeds.grad, *(p.grad for p in own.values())]  # type: ignore[list-item]


def _expect_like(there: list[Tensor], wanted: list[Tensor], how: str) -> str:
    off = max(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in zip(there, wanted, strict=True))
    expect(off <= 1e-5, f"{how}, gradients differ by {off:.1e}", "at most 1e-05 of the largest")
    return f"by {off:.0e}"


@RULES.add("checkpointing", "activation checkpointing changes no gradient, or one of its forms is refused")
def checkpointing(case: AdapterCase) -> str:
    wanted = learnt(case, lambda llm: None)
    found = ""
    for reentrant in (False, True):
        try:
            there = learnt(case, lambda llm, r=reentrant: checkpoint_activations(llm.lm, {"use_reentrant": r}))
        except ZooError as refusal:
            expect(reentrant and "use_reentrant=False" in str(refusal), str(refusal), "at least use_reentrant=False")
            continue
        found = _expect_like(there, wanted, f"with use_reentrant={reentrant}")
    return found


@RULES.add("compile", "with compiled decoder layers it learns the same")
def compiled(case: AdapterCase) -> str:
    options = {"dropout": 0.0} if "dropout" in case.options else {}  # compiled code draws other random numbers
    torch._dynamo.reset()
    there = learnt(case, lambda llm: [layer.compile(backend="aot_eager") for layer in llm.layers], **options)
    torch._dynamo.reset()
    return _expect_like(there, learnt(case, lambda llm: None, **options), "compiled")


@RULES.add("generate", "it generates the same with a cache as without, greedily and with beams")
@torch.no_grad()
def generate(case: AdapterCase) -> str:
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        llm, adapter = case.attached()
        ids, mask = padded_batch()
        kwargs = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
        adapter.condition(features(m=2, grid=GRID, dim=DIM), [1, 1], expand=options.get("num_beams", 1))
        cached, whole = llm.lm.generate(ids, **kwargs), llm.lm.generate(ids, use_cache=False, **kwargs)
        expect(torch.equal(cached, whole), f"with a cache it generates {cached.tolist()}", f"{whole.tolist()}")
    return "greedy, 3 beams"


add_options_rule(RULES)
