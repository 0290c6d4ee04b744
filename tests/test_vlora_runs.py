"""VLoRA in use: generation, checkpointing, precision, compilation, merging, copies."""

from copy import deepcopy

import pytest
import torch

from tests.fusion_builders import padded_batch, tiny_llm
from tests.vlora_builders import FAMILIES, double, images, logits, pick, vlora_on
from zoo import registry
from zoo.registry import ZooError
from zoo.registry.versions import cache_argument, cache_of, checkpoint_activations

# ---- generation --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma"])
def test_cached_steps_are_those_of_a_whole_pass(model_type):
    llm = tiny_llm(model_type)
    adapter = vlora_on(llm)
    adapter.condition(images(), [1, 1])
    ids = padded_batch(2, 12)[0]
    whole = logits(llm, ids)
    first = llm.lm(input_ids=ids[:, :7], use_cache=True)
    steps, cache = [first.logits], cache_of(first)
    for t in range(7, 12):
        out = llm.lm(input_ids=ids[:, t : t + 1], **cache_argument(cache), use_cache=True)
        steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)


@torch.no_grad()
def test_beams_and_several_sequences_share_the_image_of_their_row():
    llm = tiny_llm()
    adapter = vlora_on(llm)
    ids, mask = padded_batch()
    before = ids.clone(), mask.clone()
    fixed = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    adapter.condition(images(), [1, 1], expand=3)
    both = llm.lm.generate(ids, attention_mask=mask, **fixed)
    for i in (0, 1):
        adapter.condition(pick(images(), i), [1], expand=3)
        alone = llm.lm.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], **fixed)
        assert torch.equal(alone[0], both[i])
    adapter.condition(images(), [1, 1], expand=2)
    torch.manual_seed(0)
    several = llm.lm.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=2, max_new_tokens=3)
    assert several.shape == (4, 12)
    adapter.condition(images(), [1, 1], expand=2)
    copies = logits(llm, ids.repeat_interleave(2, 0))
    adapter.condition(images(), [1, 1])
    assert torch.allclose(copies, logits(llm, ids).repeat_interleave(2, 0), atol=1e-5)
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])


def test_rows_that_are_not_those_of_the_images_are_refused():
    llm = tiny_llm()
    adapter = vlora_on(llm)
    adapter.condition(images(1), [1])
    with pytest.raises(ZooError, match="The LLM runs 2 rows, but adapter 'vlora' took the images of 1"):
        logits(llm)


# ---- checkpointing, precision, compilation -----------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_both_forms_of_checkpointing_change_nothing_even_with_two_batches_before_backward(reentrant, frozen):
    """In backward a layer runs again with the factors of its own pass, though other images came since."""
    grads = []
    for checkpointing in (False, True):
        llm = double()
        llm.requires_grad_(not frozen)
        adapter = vlora_on(llm, skip=1, max_images=2)
        llm.train()
        if checkpointing:
            checkpoint_activations(llm.lm, {"use_reentrant": reentrant})
        total = 0
        for image, rows in (
            (images(dtype=torch.float64), [1, 1]),
            (None, [0, 0]),
            (images(3, 5, torch.float64), [1, 2]),
        ):
            adapter.condition(image, rows)
            if frozen and image is None and reentrant:
                continue  # a plain frozen LLM has no gradient there, which torch warns of
            out = llm.lm(input_ids=padded_batch()[0], use_cache=False).logits
            total = total + out.logsumexp(-1).sum() if out.requires_grad else total
        total.backward()
        grads.append({n: p.grad for n, p in [*adapter.named_parameters(), *llm.lm.named_parameters()]})
    assert all(frozen or g is not None for g in grads[0].values())
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None)
        assert grad is None or torch.allclose(grads[1][name], grad, atol=1e-9 * max(1, grad.abs().max())), name


def test_under_bf16_autocast_the_weights_stay_float32_and_learn():
    llm = tiny_llm()
    llm.requires_grad_(False)
    adapter = vlora_on(llm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapter.condition(images(), [1, 1])
        logits(llm).float().logsumexp(-1).sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in adapter.parameters())
    llm.lm.bfloat16()  # an LLM in bf16 below float32 weights of the adapter
    adapter.zero_grad()
    adapter.condition(images(), [1, 1])
    out = logits(llm)
    assert out.dtype == torch.bfloat16
    out.float().logsumexp(-1).sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in adapter.parameters())


def test_compiled_layers_are_one_graph_with_the_same_numbers():
    llm = tiny_llm()
    adapter = vlora_on(llm)
    results = []
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()
            for layer in llm.layers:
                layer.compile(backend="eager", fullgraph=True)
        outs = []
        for image, rows in ((images(), [1, 1]), (images(seed=3), [1, 1]), (None, [0, 0])):
            adapter.condition(image, rows)
            out = logits(llm)
            grads = torch.autograd.grad(out.logsumexp(-1).sum(), adapter.b["k"]) if image else ()
            outs += [out, *grads]
        results.append(outs)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


# ---- merging, copies, others -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("model_type", FAMILIES)
def test_merged_for_an_image_it_says_the_same_and_unmerged_the_weights_are_back(model_type):
    llm = double(model_type)
    plain = logits(llm)
    base = {n: (id(p), p.clone()) for n, p in llm.lm.named_parameters()}
    adapter = vlora_on(llm)
    ids = padded_batch()[0]
    adapter.condition(images(dtype=torch.float64), [1, 1])
    wanted = logits(llm)[1:]
    adapter.merge(row=1)
    assert torch.allclose(logits(llm, ids[1:]), wanted, atol=1e-10)
    assert logits(llm, ids.repeat(2, 1)).shape[0] == 4  # any number of rows, all with this image
    adapter.condition(None, [0, 0])
    assert torch.allclose(logits(llm)[1:], wanted, atol=1e-10)
    with pytest.raises(ZooError, match="merged for one image: call unmerge"):
        adapter.condition(images(dtype=torch.float64), [1, 1])
    with pytest.raises(ZooError, match="merged already"):
        adapter.merge()
    adapter.unmerge()
    assert torch.equal(logits(llm), plain)
    assert all(id(p) == base[n][0] and torch.equal(p, base[n][1]) for n, p in llm.lm.named_parameters())
    with pytest.raises(ZooError, match="no image to merge"):
        adapter.merge()
    adapter.condition(images(dtype=torch.float64), [1, 1])
    adapter.merge()
    adapter.detach()
    assert torch.equal(logits(llm), plain)


@torch.no_grad()
def test_its_own_file_holds_it_whole(tmp_path):
    first, second = vlora_on(tiny_llm(), max_images=2), vlora_on(tiny_llm(), seed=5, max_images=2)
    first.save(tmp_path)
    second.load(tmp_path)
    outs = []
    for adapter in (first, second):
        adapter.condition(images(3), [1, 2])
        outs.append(adapter.lm(input_ids=padded_batch()[0]).logits)
    assert torch.equal(*outs)
    with pytest.raises(ZooError, match="has rank=4, this one has rank=3"):
        vlora_on(tiny_llm(), rank=3, max_images=2).load(tmp_path)


def test_without_m_a_merged_llm_is_plain():
    llm = double()
    adapter = vlora_on(llm, types="qvo")
    adapter.condition(images(dtype=torch.float64), [1, 1])
    wanted = logits(llm)[:1]
    adapter.merge()
    assert adapter._given is None
    assert torch.allclose(logits(llm)[:1], wanted, atol=1e-10)


def test_the_path_around_a_block_is_not_merged():
    adapter = vlora_on(tiny_llm(), types="m")
    adapter.condition(images(), [1, 1])
    with pytest.raises(ZooError, match="types=m has nothing to merge"):
        adapter.merge()


def test_a_part_of_a_fused_layer_alone():
    llm = double("phi3")
    adapter = vlora_on(llm, types="qv")
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    adapter.condition(images(dtype=torch.float64), [1, 1])
    q, k, v = adapter._delta(0, "qkv", x).split([32, 16, 16], dim=-1)
    a, b = adapter._given[0]["v"]
    assert torch.allclose(v, x @ a @ b.T) and q.any() and not k.any()


def test_a_copy_of_the_model_is_on_its_own():
    """A teacher, or a moving average: deep copies are made behind steps, when factors hang on a graph."""
    holder = torch.nn.Module()
    holder.llm = tiny_llm()
    holder.adapter = vlora_on(holder.llm)
    holder.adapter.condition(images(), [1, 1])
    wanted = logits(holder.llm)
    other = deepcopy(holder)
    with torch.no_grad():
        assert torch.equal(logits(other.llm), logits(tiny_llm()))
        other.adapter.condition(images(), [1, 1])
        assert torch.allclose(logits(other.llm), wanted, atol=1e-6)  # torch attends by another kernel without gradients
        for b in other.adapter.b.values():
            b.zero_()
        other.adapter.condition(images(), [1, 1])
        assert torch.equal(logits(other.llm), logits(tiny_llm()))
        assert torch.allclose(logits(holder.llm), wanted, atol=1e-6)
        other.adapter.detach()
        assert torch.allclose(logits(holder.llm), wanted, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("first", ["lora", "vlora"])
def test_lora_beside_it(first):
    llm = double()
    torch.manual_seed(0)
    both = {
        "lora": registry.build("adapter", {"name": "lora", "rank": 2}, llm=llm),
        "vlora": vlora_on(llm, attach=False),
    }
    plain = logits(llm)
    outs = []
    for order in ([first], ["lora", "vlora"], ["vlora", "lora"]):
        for name in order:
            both[name].attach()
        for p in (p for n, p in llm.lm.named_parameters() if "lora_B" in n):
            p.fill_(0.05)
        both["vlora"].condition(images(dtype=torch.float64), [1, 1])
        outs.append(logits(llm))
        if len(order) == 2:
            both["vlora"].merge()
            assert torch.allclose(logits(llm)[:1], outs[-1][:1], atol=1e-10)
        for name in reversed(order):
            both[name].detach()
        assert torch.equal(logits(llm), plain)
    assert torch.allclose(outs[1], outs[2], atol=1e-12) and not torch.allclose(outs[0], outs[1], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("order", [["lora", "vlora"], ["vlora", "lora"]])
def test_lora_merged_beside_it_leaves_its_terms_where_they_are(order):
    llm = double()
    plain = logits(llm)
    torch.manual_seed(0)
    lora = registry.build("adapter", {"name": "lora", "rank": 2}, llm=llm)
    both = {"lora": lora, "vlora": vlora_on(llm, attach=False)}
    for name in order:
        both[name].attach()
    for p in (p for n, p in llm.lm.named_parameters() if "lora_B" in n):
        p.fill_(0.05)
    both["vlora"].condition(images(dtype=torch.float64), [1, 1])
    wanted = logits(llm)
    both["lora"].merge()
    assert torch.allclose(logits(llm), wanted, atol=1e-10)
    both["lora"].attach()  # it is in the weights
    both["vlora"].detach()
    assert not any("lora" in n or m._forward_hooks for n, m in llm.lm.named_modules())
    assert not torch.allclose(logits(llm), wanted, atol=1e-4) and not torch.allclose(logits(llm), plain, atol=1e-4)


@torch.no_grad()
def test_a_copy_that_is_merged_for_an_image_comes_back_by_itself():
    llm = tiny_llm()
    adapter = vlora_on(llm)
    adapter.condition(images(), [1, 1])
    adapter.merge()
    wanted = logits(llm)
    other, its = deepcopy((llm, adapter))
    its.detach()
    assert torch.equal(logits(llm), wanted) and torch.equal(logits(other), logits(tiny_llm()))
