"""Statistics of attention without its matrix, against the matrix in float64."""

import pytest
import torch

from zoo.fusion.pruners.inside.attention_flow import attention_flow, walk_flops


def inputs(b=2, h=4, kv=2, length=37, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(b, h, length, d, generator=g),
        torch.randn(b, kv, length, d, generator=g),
        torch.rand(b, length, generator=g),
    )


def matrix(query, key, scaling, temperature=1.0, visible=None, softcap=None):
    """P, (B, H, L, L) float64; rows that see nothing are zero."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.double() @ key.mT * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    length = scores.shape[-1]
    seen = torch.ones(len(query), length, length, dtype=torch.bool).tril()
    if visible is not None:
        seen &= visible
    return (scores / temperature).masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)


def walked(p, start, steps, damping=0.0):
    """The walk as it is defined, with the dense matrix."""
    u = start.double()[:, None].expand(*p.shape[:3])
    for _ in range(steps):
        u = (1 - damping) * (u.unsqueeze(2) @ p).squeeze(2) + damping * start.double()[:, None]
    return u


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.1},
        {"damping": 0.15},
        {"damping": 0.15, "temperature": 0.3},
        {"softcap": 2.0, "temperature": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("block", [5, 16, 128])
def test_the_walk_is_that_along_the_matrix(steps, how, block):
    query, key, start = inputs()
    damping = how.get("damping", 0.0)
    p = matrix(query, key, 0.35, **{k: v for k, v in how.items() if k != "damping"})
    wanted = walked(p, start, steps, damping)
    got = attention_flow(query, key, start, scaling=0.35, steps=steps, block=block, **how)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), wanted, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("steps", [1, 5])
def test_grouped_heads_and_who_sees_whom(heads, groups, steps):
    query, key, start = inputs(h=heads, kv=groups, seed=1)
    visible = torch.rand(2, 37, 37, generator=torch.Generator().manual_seed(2)) < 0.6
    visible[0, 7] = False  # a row that sees nothing gives nothing
    p = matrix(query, key, 0.3, visible=visible)
    got = attention_flow(
        query, key, start, scaling=0.3, steps=steps, visible=lambda rows, keys: visible[:, rows, :keys], block=8
    )
    assert torch.allclose(got.double(), walked(p, start, steps), atol=2e-6, rtol=2e-6)


def test_nothing_is_lost_on_the_way_and_one_step_gives_column_means():
    query, key, _ = inputs()
    start = torch.full((2, 37), 1 / 37)
    for steps in (1, 3, 5):
        u = attention_flow(query, key, start, scaling=0.35, steps=steps, temperature=0.1)
        assert torch.allclose(u.sum(-1), torch.ones(2, 4), atol=1e-5)
    once = attention_flow(query, key, start, scaling=0.35)
    assert torch.allclose(once.double(), matrix(query, key, 0.35).mean(2), atol=1e-7)


def test_rows_without_a_vote_change_nothing():
    query, key, start = inputs()
    start[:, :-1] = 0
    one = attention_flow(query, key, start, scaling=0.35)
    assert torch.allclose(one.double(), start[:, -1:, None].double() * matrix(query, key, 0.35)[:, :, -1], atol=1e-7)


def test_bf16_inputs_are_walked_in_float32_also_under_autocast():
    query, key, start = (x.bfloat16() for x in inputs())
    wanted = walked(matrix(query, key, 0.35, temperature=0.1), start, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention_flow(query, key, start, scaling=0.35, steps=5, temperature=0.1)
    assert torch.allclose(got.double(), wanted, atol=5e-6, rtol=5e-6)


def test_counted_flops_are_those_of_torchs_counter():
    from zoo.benches.flops import flop_counter

    query, key, start = inputs(b=1, length=300)
    with flop_counter() as counter:
        attention_flow(query, key, start, scaling=0.35, steps=5)
    assert counter.get_total_flops() == walk_flops(300, 4, 8, 5)
