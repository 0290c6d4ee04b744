"""Expert dispatch: sorting, grouped products and their gradients against loops over tokens, the balance loss."""

import pytest
import torch
from torch.nn import functional as F

from zoo.fusion.adapters import moe_dispatch as dispatch

T, E, C, R, OUT = 13, 4, 8, 3, 6


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def choices(k=1, seed=0):
    """Distinct experts for each token; expert 2 is idle."""
    g = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([0, 1, 3])
    chosen = torch.stack([allowed[torch.randperm(3, generator=g)[:k]] for _ in range(T)])  # (T, k)
    return chosen[:, 0] if k == 1 else chosen


def grads(value, *inputs):
    return torch.autograd.grad(value.square().sum(), inputs, retain_graph=True)


def close(ours, theirs, atol=1e-12):
    assert all(torch.allclose(a, b, atol=atol) for a, b in zip(ours, theirs, strict=True))


def test_groups_are_sorted_and_stable():
    chosen = torch.tensor([3, 0, 3, 1, 0, 9, -1])
    groups = dispatch.group(chosen, E, keep=torch.tensor([1, 1, 1, 1, 0, 1, 1]).bool())
    assert groups.order.tolist() == [1, 3, 0, 2, 4, 5, 6], "nobody's rows stand last, in their old order"
    assert groups.ends.tolist() == [1, 2, 2, 4]
    assert groups.order[groups.inverse].tolist() == list(range(7))
    x = random(7, 2)
    assert torch.equal(groups.scatter(groups.gather(x)), x)


def ffn(x, gate_up, down):
    gate, up = (gate_up @ x).chunk(2)
    return down @ (F.silu(gate) * up)


@pytest.mark.parametrize("k", [1, 2])
def test_a_sparse_mixture_is_its_loop_over_tokens(k):
    x, gate_up, down = random(T, C), random(E, 2 * R, C, seed=1), random(E, C, R, seed=2)
    weights = random(T, k, seed=3).softmax(-1)
    inputs = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    chosen = choices(k)
    keep = torch.ones(T).bool()
    keep[[2, 7]] = False
    groups = dispatch.group(chosen, E, keep)
    ours = groups.scatter(dispatch.grouped_ffn(groups.gather(x), gate_up, down, groups), weights)
    rows = [
        sum(w * ffn(x[t], gate_up[e], down[e]) for e, w in zip(chosen.view(T, k)[t], weights[t], strict=True)) * keep[t]
        for t in range(T)
    ]
    theirs = torch.stack(rows)
    assert torch.allclose(ours, theirs, atol=1e-12)
    assert not ours[~keep].any()
    close(grads(ours, *inputs), grads(theirs, *inputs))


def test_a_low_rank_term_is_its_loop_over_tokens():
    x, down, up, base = random(T, C), random(E, R, C, seed=1), random(E, OUT, R, seed=2), random(OUT, C, seed=3)
    scale = random(T, 1, seed=4)
    inputs = [t.requires_grad_() for t in (x, down, up, base, scale)]
    chosen = choices()
    groups = dispatch.group(chosen, E)
    out = groups.gather(x) @ base.T
    rows = dispatch.add_grouped_low_rank(out, groups.gather(x), down, up, groups, groups.gather(scale))
    ours = groups.scatter(rows)
    theirs = torch.stack([base @ x[t] + scale[t] * (up[e] @ (down[e] @ x[t])) for t, e in enumerate(chosen)])
    masked = x @ base.T + dispatch.masked_low_rank(x, down, up, F.one_hot(chosen, E) * scale)
    assert torch.allclose(ours, theirs, atol=1e-12) and torch.allclose(masked, theirs, atol=1e-12)
    close(grads(ours, *inputs), grads(theirs, *inputs))
    close(grads(masked, *inputs), grads(theirs, *inputs))


def test_idle_experts_and_frozen_ones():
    x, weight = random(T, C).requires_grad_(), random(E, OUT, C).requires_grad_()
    groups = dispatch.group(choices(), E)
    (got,) = torch.autograd.grad(dispatch.grouped_linear(groups.gather(x), weight, groups).sum(), weight)
    assert not got[2].any() and got[0].any(), "zero, not none"
    saved = []
    weight.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dispatch.grouped_linear(groups.gather(x), weight, groups)
    assert not [t for t in saved if t.shape == (T, C)], "no rows are kept for a gradient that nobody wants"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_is_that_of_the_products(dtype):
    x, weight = random(T, C, dtype=dtype), random(E, OUT, C, dtype=torch.float32)
    groups = dispatch.group(choices(), E)
    assert dispatch.grouped_linear(x, weight, groups).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.grouped_linear(x, weight, groups).dtype == torch.bfloat16


def test_all_tokens_at_one_expert_and_no_tokens():
    weight = random(E, OUT, C)
    x = random(T, C)
    groups = dispatch.group(torch.full((T,), 3), E)
    assert torch.allclose(dispatch.grouped_linear(x, weight, groups), x @ weight[3].T)
    empty = dispatch.group(torch.empty(0, dtype=torch.long), E)
    assert dispatch.grouped_linear(x[:0], weight, empty).shape == (0, OUT)


def test_compiled_it_is_one_graph_with_the_same_numbers():
    x, gate_up, down = random(T, C), random(E, 2 * R, C, seed=1), random(E, C, R, seed=2)
    inputs = [t.requires_grad_() for t in (x, gate_up, down)]

    def run(x, gate_up, down, chosen):
        groups = dispatch.group(chosen, E)
        return groups.scatter(dispatch.grouped_ffn(groups.gather(x), gate_up, down, groups))

    torch._dynamo.reset()
    ours = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs, choices(2))
    theirs = run(*inputs, choices(2))
    assert torch.allclose(ours, theirs, atol=1e-12)
    close(grads(ours, *inputs), grads(theirs, *inputs))


def test_balance_is_its_formula():
    logits = random(T, E).requires_grad_()
    probs = logits.softmax(-1)
    keep = torch.ones(T).bool()
    keep[[0, 5]] = False
    chosen = probs.topk(2).indices
    ours = dispatch.load_balance(probs, chosen, keep)
    real = [t for t in range(T) if keep[t]]
    theirs = sum(
        E * sum(int(chosen[t, k]) == e for t in real) / len(real) * sum(probs[t, e] for t in real) / len(real)
        for k in (0, 1)
        for e in range(E)
    )
    assert torch.allclose(ours, theirs, atol=1e-6)  # counts are float32
    close(torch.autograd.grad(ours, logits, retain_graph=True), torch.autograd.grad(theirs, logits), 1e-6)
    even = torch.arange(8) % E
    assert dispatch.load_balance(torch.full((8, E), 1 / E), even) == 1
    collapsed = F.one_hot(torch.zeros(8, dtype=torch.long), E).float()
    assert dispatch.load_balance(collapsed, torch.zeros(8, dtype=torch.long)) == E
    changed = probs.detach().clone()
    changed[~keep] = 0.3
    assert torch.equal(dispatch.load_balance(changed, chosen, keep), ours.detach())


def test_the_router_stays_in_float32():
    router = dispatch.Router(C, E, bias=True).to(torch.bfloat16)
    assert {p.dtype for p in router.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert router(random(2, C, dtype=torch.bfloat16)).dtype == torch.float32
    assert router.double().weight.dtype == torch.float64
    fixed = dispatch.Router(C, E, trainable=False)
    assert not list(fixed.parameters()) and set(fixed.state_dict()) == {"weight"}
