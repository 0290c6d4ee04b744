"""What every registered adapter must do, with its default options."""

from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch

from tests.fusion_builders import (
    PEFT_METHODS,
    SMALL,
    VOCAB,
    features,
    llm_node,
    padded_batch,
    peft_node,
    same_state,
    tiny_llm,
)
from zoo import registry
from zoo.registry import Adapter, ZooError
from zoo.registry.forward_pass import running
from zoo.registry.versions import checkpoint_activations

DIM, GRID = 24, (4, 4)
NAMES = [*registry.names("adapter"), *(f"peft.{method}" for method in PEFT_METHODS)]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "smollm3", "mixtral", "qwen3_moe"]
OF_PEFT = ["llama", "mixtral"]  # families that methods of PEFT are tried on, which all do the same with a linear layer
pytestmark = pytest.mark.parametrize("name", NAMES)


def build(name, llm, seed=0, **options):
    torch.manual_seed(seed)
    name, _, method = name.partition(".")
    node = {"name": name, **SMALL.get(name, {}), **(peft_node(method) if method else {}), **options}
    return registry.build("adapter", node, llm=llm, vision_dim=DIM, text_dim=llm.hidden_size, grid=GRID).eval()


def fits(name, llm):
    return cls_of(name).needs & {"moe", "dense"} <= llm.provides


def cls_of(name):
    return registry.get("adapter", name.partition(".")[0]).cls


def llm_for(name, **options):
    return tiny_llm("mixtral" if "moe" in cls_of(name).needs else "llama", **options)


def shake(adapter, llm, seed=1):
    """Move all of its parameters, as training would; zero starts hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    inside = {n: p for n, p in llm.lm.named_parameters() if adapter.owns(n) and not adapter.idles(n)}
    own = dict(adapter.named_parameters()) | inside
    with torch.no_grad():
        for parameter in own.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g).to(parameter))
    return own


def logits(llm, adapter, embeds=None, grad=False, seed=0):
    ids, mask = padded_batch()
    adapter.condition(features(m=2, grid=GRID, dim=DIM, seed=seed), [1, 1])
    with nullcontext() if grad else torch.no_grad():
        embeds = llm.embed(ids) if embeds is None else embeds
        return llm.head(llm.hidden(inputs_embeds=embeds, attention_mask=mask).last_hidden_state)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_fresh_one_is_the_base_model_and_detached_it_is_gone(name, model_type):
    if "." in name and model_type not in OF_PEFT:
        pytest.skip("tried on two families")
    llm = tiny_llm(model_type)
    if not fits(name, llm):
        pytest.skip(f"adapter {name!r} needs what {model_type!r} does not give")
    ids, mask = padded_batch()
    base = {k: v.clone() for k, v in llm.lm.state_dict().items()}
    tree = [(n, id(m)) for n, m in llm.lm.named_modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llm.lm.modules()]
    with torch.no_grad():
        wanted = llm.lm(input_ids=ids, attention_mask=mask).logits
    adapter = build(name, llm)
    assert isinstance(adapter, Adapter)
    adapter.attach()
    if getattr(adapter, "starts_as_base", True) and name != "peft.fourierft":  # its spectrum is random at the start
        assert torch.allclose(logits(llm, adapter), wanted, atol=1e-6)
    shake(adapter, llm)
    assert (logits(llm, adapter) - wanted).abs().max() > 1e-4
    adapter.detach()
    with torch.no_grad():
        assert torch.equal(llm.lm(input_ids=ids, attention_mask=mask).logits, wanted)
    assert same_state(llm.lm.state_dict(), base)
    assert [(n, id(m)) for n, m in llm.lm.named_modules()] == tree
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llm.lm.modules()] == hooks


def test_attached_again_it_does_what_it_did(name):
    llm = llm_for(name)
    adapter = build(name, llm)
    adapter.attach()
    shake(adapter, llm)
    wanted = logits(llm, adapter)
    adapter.detach()
    adapter.attach()
    assert torch.equal(logits(llm, adapter), wanted)


def test_base_weights_keep_their_names(name):
    llm = llm_for(name)
    base = {k: v.clone() for k, v in llm.lm.state_dict().items()}
    adapter = build(name, llm)
    adapter.attach()
    state = llm.lm.state_dict()
    assert all(torch.equal(state[k], base[k]) for k in base)
    assert all(adapter.owns(k) for k in state.keys() - base.keys())


def test_structure_on_meta_is_that_of_the_real_one(name):
    with torch.device("meta"):
        meta = registry.build("llm", llm_node("mixtral" if not fits(name, tiny_llm()) else "llama"), vocab_size=VOCAB)
        adapter = build(name, meta)
        adapter.attach()
    assert {p.device.type for m in (meta.lm, adapter) for p in m.parameters()} == {"meta"}
    llm = llm_for(name)
    real = build(name, llm)
    real.attach()
    for a, b in ((meta.lm, llm.lm), (adapter, real)):
        assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_reaches_all_of_its_parameters_and_no_frozen_ones(name, dtype):
    llm = llm_for(name)
    llm.lm.to(getattr(torch, dtype))
    llm.requires_grad_(False)
    adapter = build(name, llm)
    adapter.attach()
    llm.train()
    adapter.train()
    own = shake(adapter, llm)
    assert own
    ids, mask = padded_batch(2, 40)
    with running():
        adapter.condition(features(m=2, grid=GRID, dim=DIM), [1, 1])
        hidden = llm.hidden(inputs_embeds=llm.embed(ids), attention_mask=mask).last_hidden_state
        aux = sum(adapter.aux_losses().values())
    (llm.head(hidden).float().logsumexp(-1).sum() + aux).backward()
    assert [n for n, p in own.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in llm.lm.named_parameters() if not adapter.owns(n) and p.grad is not None] == []


def test_state_dicts_make_another_the_same(name):
    made = []
    for seed in (0, 3):
        llm = llm_for(name)
        adapter = build(name, llm, seed)
        adapter.attach()
        shake(adapter, llm, seed)
        made.append((llm, adapter))
    (llm, adapter), (other_llm, other) = made
    assert not torch.equal(logits(llm, adapter), logits(other_llm, other))
    other_llm.lm.load_state_dict(llm.lm.state_dict())
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(logits(llm, adapter), logits(other_llm, other))


def test_a_batch_is_each_row_alone(name):
    llm = llm_for(name)
    adapter = build(name, llm)
    adapter.attach()
    shake(adapter, llm)
    ids, mask = padded_batch()
    both = logits(llm, adapter)
    assert torch.equal(both, logits(llm, adapter))
    image = features(m=2, grid=GRID, dim=DIM)
    image.tokens, image.cls_attention = image.tokens[1:], image.cls_attention[1:]
    adapter.condition(image, [1])
    with torch.no_grad():
        hidden = llm.hidden(inputs_embeds=llm.embed(ids[1:]), attention_mask=mask[1:]).last_hidden_state
        assert torch.allclose(llm.head(hidden), both[1:], atol=1e-5)


def learnt(name, prepare, **options):
    """Gradients of the input and of all its parameters, after `prepare` changed the language model."""
    llm = llm_for(name)
    adapter = build(name, llm, **options)
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
    return [embeds.grad, *(p.grad for p in own.values())]


def close(some, others):
    return all(torch.allclose(a, b, atol=1e-5 * max(1, b.abs().max())) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing_or_one_form_is_refused(name, reentrant):
    try:
        there = learnt(name, lambda llm: checkpoint_activations(llm.lm, {"use_reentrant": reentrant}))
    except ZooError as refusal:
        assert reentrant and "use_reentrant=False" in str(refusal)
        return
    assert close(there, learnt(name, lambda llm: None))


def test_compiled_decoder_layers_learn_the_same(name):
    if "." in name and name not in ("peft.dora", "peft.oft"):
        pytest.skip("a compiler takes seconds, and products of small matrices are all alike to it")
    known = {f.name for f in fields(registry.get("adapter", name.partition(".")[0]).config)}
    options = {"dropout": 0.0} if "dropout" in known else {}  # compiled code draws other random numbers
    torch._dynamo.reset()
    there = learnt(name, lambda llm: [layer.compile(backend="aot_eager") for layer in llm.layers], **options)
    torch._dynamo.reset()
    assert close(there, learnt(name, lambda llm: None, **options))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generates_the_same_with_a_cache_as_without(name, options):
    llm = llm_for(name)
    adapter = build(name, llm)
    adapter.attach()
    shake(adapter, llm)
    ids, mask = padded_batch()
    kwargs = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    adapter.condition(features(m=2, grid=GRID, dim=DIM), [1, 1], expand=options.get("num_beams", 1))
    assert torch.equal(llm.lm.generate(ids, **kwargs), llm.lm.generate(ids, use_cache=False, **kwargs))
