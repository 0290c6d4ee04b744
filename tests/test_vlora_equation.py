"""VLoRA's equation against loops, in values and gradients: types, ranks, scales, positions, the order of factors."""

from dataclasses import replace

import pytest
import torch

from tests.fusion_builders import VOCAB, padded_batch
from tests.vlora_builders import double, images, logits, vlora_on
from zoo.fusion.adapters.vlora.generator import GeneratorBlock


def naive_attention(attention, q, memory):
    """Loops over heads of torch's packed attention."""
    wq, wk, wv = attention.in_proj_weight.chunk(3)
    bq, bk, bv = attention.in_proj_bias.chunk(3)
    q, k, v = q @ wq.T + bq, memory @ wk.T + bk, memory @ wv.T + bv
    d = q.shape[-1] // attention.num_heads
    heads = []
    for h in range(attention.num_heads):
        part = slice(h * d, (h + 1) * d)
        heads.append((q[:, part] @ k[:, part].T / d**0.5).softmax(-1) @ v[:, part])
    return torch.cat(heads, -1) @ attention.out_proj.weight.T + attention.out_proj.bias


def norm(layer, x):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * layer.weight + layer.bias


def naive_factor(generator, memory, sites, rank):
    """A of each site (in, R) from one memory (S, W)."""
    q = generator.queries
    for block in generator.blocks:
        q = q + naive_attention(block.own, norm(block.norm1, q), norm(block.norm1, q))
        q = q + naive_attention(block.cross, norm(block.norm2, q), memory)
        first, last = block.mlp[0], block.mlp[2]
        inner = norm(block.norm3, q) @ first.weight.T + first.bias
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        q = q + inner @ last.weight.T + last.bias
    flat = norm(generator.norm, q) @ generator.head.weight.T + generator.head.bias
    a = torch.empty(sites, flat.shape[1] // rank, rank, dtype=flat.dtype)
    rows = []
    for site in range(sites):
        rows.append(torch.stack([flat[site, i * rank : (i + 1) * rank] for i in range(a.shape[1])]))
    return rows  # output i * r + j is A[i, j]


def naive_logits(adapter, image, ids):
    """A plain LLM for each image: dense changes of q, k, v, o, and m as a path of its own; loops over images."""
    rows = []
    for row in range(len(ids)):
        memory = image.tokens[row] @ adapter.memory.proj.weight.T + adapter.memory.proj.bias + adapter.memory.positions
        types, rank, sites = adapter.config.types, adapter.config.rank, adapter.sites
        a = {t: naive_factor(adapter.generators[t], memory, len(sites), rank) for t in types}
        weights, hooks = {}, []
        for number, site in enumerate(sites):
            for name, letters in site.linears:
                change = [adapter.scale * adapter.b[t][number] @ a[t][number].T for t in letters if t != "m"]
                if letters == "m":
                    factors = a["m"][number], adapter.scale * adapter.b["m"][number]
                    add = lambda m, x, out, f=factors: out + x[0] @ (f[0] @ f[1].T)  # noqa: E731
                    hooks.append(adapter.lm.get_submodule(name).register_forward_hook(add))
                else:
                    weights[f"{name}.weight"] = adapter.lm.get_submodule(name).weight.detach() + torch.cat(change)
        inputs = {"input_ids": ids[row : row + 1]}
        rows.append(torch.func.functional_call(adapter.lm, weights, (), inputs).logits)
        for hook in hooks:
            hook.remove()
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"alpha": 6.0}),
        ("phi3", {}),
        ("qwen3", {"extra": {"head_dim": 12}}),  # o is wider than the model
    ],
)
def test_values_and_gradients_are_those_of_dense_changes(model_type, options):
    extra = {"extra": options.pop("extra")} if "extra" in options else {}
    llm = double(model_type, **extra)
    adapter = vlora_on(llm, **options)
    ids, image = padded_batch()[0], images(dtype=torch.float64)
    weight = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
    results = []
    for naive in (False, True):
        image.tokens = image.tokens.detach().requires_grad_()
        adapter.detach() if naive else adapter.condition(image, [1, 1])
        out = naive_logits(adapter, image, ids) if naive else logits(llm)
        results.append([out, *torch.autograd.grad((out * weight).sum(), [image.tokens, *adapter.parameters()])])
    assert all(torch.allclose(a, b, atol=1e-10 * max(1, b.abs().max())) for a, b in zip(*results, strict=True))
    assert all(g.abs().max() > 1e-6 for g in results[0][1:])


def test_reading_an_image_is_torchs_own_attention():
    torch.manual_seed(0)
    block = GeneratorBlock(16, 4, 2.0).double()
    torch.nn.init.normal_(block.cross.in_proj_bias)
    g = torch.Generator().manual_seed(0)
    results = []
    for way in (block.read, lambda q, m: block.cross(q, m, m, need_weights=False)[0]):
        queries, memory = (torch.randn(3, n, 16, generator=g.manual_seed(n), dtype=torch.float64) for n in (5, 9))
        wanted = [queries.requires_grad_(), memory.requires_grad_(), *block.cross.parameters()]
        out = way(queries, memory)
        results.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), wanted)])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_m_has_no_place_in_the_feed_forward_weights():
    llm = double()
    adapter = vlora_on(llm, types="m", skip=2)
    adapter.condition(images(1, dtype=torch.float64), [1])
    wanted, (a, b) = logits(llm, padded_batch()[0][:1]), adapter._given[0]["m"]
    adapter.detach()
    down = llm.layers[1].mlp.down_proj
    down.weight += torch.nn.functional.pad(b @ a[0].T, (0, down.in_features - 32))
    assert not torch.allclose(logits(llm, padded_batch()[0][:1]), wanted, atol=1e-4)


@torch.no_grad()
def test_the_change_of_k_comes_ahead_of_rotary_positions(monkeypatch):
    """A change behind them would not turn with the position; this one does, as the dense change does."""
    from transformers.models.llama import modeling_llama

    llm = double()
    adapter = vlora_on(llm, types="k", skip=2)
    adapter.condition(images(dtype=torch.float64), [1, 1])
    seen = []
    rotate = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, *rest: seen.append(k) or rotate(q, k, *rest)
    )
    logits(llm)
    changed = seen[1]
    adapter.condition(None, [0, 0])
    logits(llm)
    assert (changed - seen[3]).abs().max() > 1e-3 and torch.equal(seen[0], seen[2])


@torch.no_grad()
def test_the_change_has_the_rank_it_says():
    adapter = vlora_on(double(), rank=3)
    adapter.condition(images(dtype=torch.float64), [1, 1])
    for site, factors in zip(adapter.sites, adapter._given, strict=True):
        for t, (a, b) in factors.items():
            assert a.shape == (2, site.widths[t][0], 3) and b.shape == (site.widths[t][1], 3)
            assert [int(torch.linalg.matrix_rank(b @ one.T)) for one in a] == [3, 3]


@torch.no_grad()
def test_alpha_scales_b():
    ids, image = padded_batch()[0], images(dtype=torch.float64)
    outs = []
    for alpha, factor in ((8.0, 1.0), (4.0, 2.0), (None, 2.0)):
        llm = double()
        adapter = vlora_on(llm, alpha=alpha)
        for b in adapter.b.values():
            b.mul_(factor)
        adapter.condition(image, [1, 1])
        outs.append(logits(llm, ids))
    assert torch.allclose(outs[0], outs[1], atol=1e-12) and torch.equal(outs[1], outs[2])


@torch.no_grad()
def test_places_enter_through_positions_alone():
    llm = double()
    adapter = vlora_on(llm)
    image, order = images(dtype=torch.float64), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    adapter.condition(image, [1, 1])
    wanted = logits(llm)
    moved = replace(image, tokens=image.tokens[:, order])
    adapter.condition(moved, [1, 1])
    assert not torch.allclose(logits(llm), wanted, atol=1e-4)
    adapter.memory.positions.copy_(adapter.memory.positions[order])
    adapter.condition(moved, [1, 1])
    assert torch.allclose(logits(llm), wanted, atol=1e-10)


@pytest.mark.parametrize("separate", [True, False])
def test_factors_run_by_type_then_by_layer(separate):
    llm = double("llama", num_layers=3)
    adapter = vlora_on(llm, separate=separate, types="qkv", moved=False)
    whole = torch.cat([g.queries for g in adapter.generators.values()])
    assert whole.shape == (9, 16)
    with torch.no_grad():  # one query alone differs: that of k in the last layer
        adapter.condition(images(1, dtype=torch.float64), [1])
        before = [{t: a.clone() for t, (a, _) in f.items()} for f in adapter._given]
        part, at = (adapter.generators["k"], 2) if separate else (adapter.generators["all"], 5)
        part.blocks = torch.nn.ModuleList()
        adapter.condition(images(1, dtype=torch.float64), [1])
        before = [{t: a.clone() for t, (a, _) in f.items()} for f in adapter._given]
        part.queries[at].mul_(-1)
        adapter.condition(images(1, dtype=torch.float64), [1])
    changed = [(i, t) for i, f in enumerate(adapter._given) for t, (a, _) in f.items() if not a.equal(before[i][t])]
    assert changed == [(2, "k")]
