"""What every registered language model must do, with its default options on tiny sizes."""

import pytest
import torch

from tests.fusion_builders import DENSE, MOE, VOCAB, llm_node, padded_batch, same_state
from zoo import registry
from zoo.registry import LanguageModel
from zoo.registry.versions import checkpoint_activations

NODES = [llm_node(t) for t in (DENSE[0], "qwen3", "gemma", MOE[0])]
NODES += [{"name": n} for n in registry.names("llm") if n != "hf"]
IDS = [f"{n['name']}-{n.get('model_type', '')}" for n in NODES]


def build(node, dtype=None, seed=0):
    torch.manual_seed(seed)
    return registry.build("llm", node, vocab_size=VOCAB, dtype=dtype).eval()


pytestmark = pytest.mark.parametrize("node", NODES, ids=IDS)


def test_keeps_the_contract(node):
    llm = build(node)
    assert isinstance(llm, LanguageModel)
    assert llm.vocab_size >= VOCAB
    assert len(llm.layers) == llm.num_layers


def test_structure_on_meta_is_that_of_the_real_one(node):
    with torch.device("meta"):
        meta = build(node)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    real = build(node)
    assert {k: v.shape for k, v in meta.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert (meta.hidden_size, meta.num_layers, meta.provides) == (real.hidden_size, real.num_layers, real.provides)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device="meta")  # transformers reads the values of smaller masks
    embeds = torch.empty(2, 5, meta.hidden_size, device="meta")
    out = meta.hidden(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    assert meta.head(out).shape == (2, 5, VOCAB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_reaches_every_parameter(node, dtype):
    llm = build(node, dtype).train()
    ids, mask = padded_batch(4, 16)
    hidden = llm.hidden(inputs_embeds=llm.embed(ids), attention_mask=mask).last_hidden_state
    assert hidden.dtype == dtype
    llm.head(hidden).float().logsumexp(-1).sum().backward()
    assert [n for n, p in llm.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in llm.parameters())


@torch.no_grad()
def test_a_batch_is_each_row_alone(node):
    llm = build(node)
    ids, mask = padded_batch()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    embeds = llm.embed(ids)
    both = llm.hidden(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
    alone = llm.hidden(inputs_embeds=embeds[:1, 3:]).last_hidden_state
    assert torch.allclose(both[:1, 3:], alone, atol=1e-5)
    assert torch.allclose(both[1:], llm.hidden(inputs_embeds=embeds[1:]).last_hidden_state, atol=1e-5)


@torch.no_grad()
def test_state_dict_makes_another_the_same(node):
    a, b = build(node), build(node, seed=1)
    assert not same_state(a.state_dict(), b.state_dict())
    b.load_state_dict(a.state_dict())
    ids, mask = padded_batch()
    assert torch.equal(a.lm(input_ids=ids, attention_mask=mask).logits, b.lm(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(node, reentrant):
    ids, mask = padded_batch()
    grads = []
    for checkpointing in (False, True):
        llm = build(node).train()
        if checkpointing:
            checkpoint_activations(llm.lm, {"use_reentrant": reentrant})
        embeds = llm.embed(ids).detach().requires_grad_()
        llm.head(llm.hidden(inputs_embeds=embeds, attention_mask=mask).last_hidden_state).logsumexp(-1).sum().backward()
        grads.append([embeds.grad, *(p.grad for p in llm.layers.parameters())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_generates_as_a_transformers_model(node):
    llm = build(node)
    ids, mask = padded_batch()
    kwargs = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    by_ids = llm.lm.generate(ids, **kwargs)
    assert torch.equal(by_ids[:, ids.shape[1] :], llm.lm.generate(inputs_embeds=llm.embed(ids), **kwargs))
