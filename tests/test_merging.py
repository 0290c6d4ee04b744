"""Rounds of bipartite merging, against a loop over tokens in float64."""

import pytest
import torch

from zoo.fusion.pruners.token_merging import merge, removals


def tokens_of(m=2, n=12, d=8, seed=0):
    return torch.randn(m, n, d, generator=torch.Generator().manual_seed(seed))


def naive(tokens, rounds, order="released", weigh_sizes=False, metric=None):
    """One row (N, D), token by token; members of each result too."""
    x = [(t.double(), 1.0, [i]) for i, t in enumerate(tokens)]
    like = [t.double() for t in (tokens if metric is None else metric)]
    for r in rounds:
        r = min(r, len(x) // 2)
        if r <= 0:
            continue
        place = list(range(len(x)))
        if metric is None:
            like = [t for t, _, _ in x]
        cosine = {
            (a, b): float(like[a] @ like[b] / (like[a].norm() * like[b].norm()))
            for a in place[::2]
            for b in place[1::2]
        }
        nearest = {a: max(place[1::2], key=lambda b: cosine[a, b]) for a in place[::2]}
        sources = sorted(place[::2], key=lambda a: -cosine[a, nearest[a]])
        gone, left = sources[:r], sources[r:]
        new = {}
        for b in place[1::2]:
            members = [b, *[a for a in gone if nearest[a] == b]]
            weights = [x[i][1] if weigh_sizes else 1.0 for i in members]
            mean = sum(w * x[i][0] for w, i in zip(weights, members, strict=True)) / sum(weights)
            lik = sum(w * like[i] for w, i in zip(weights, members, strict=True)) / sum(weights)
            new[b] = ((mean, sum(x[i][1] for i in members), [m for i in members for m in x[i][2]]), lik)
        kept = [*left, *place[1::2]] if order == "released" else sorted([*left, *place[1::2]])
        x, like = [new[i][0] if i in new else x[i] for i in kept], [new[i][1] if i in new else like[i] for i in kept]
    return torch.stack([t for t, _, _ in x]), [sorted(members) for _, _, members in x]


@pytest.mark.parametrize("order", ["released", "raster"])
@pytest.mark.parametrize("weigh_sizes", [False, True])
@pytest.mark.parametrize(("n", "rounds"), [(12, [6, 3]), (13, [6, 3, 1]), (12, [4, 3]), (16, [8, 2]), (5, [9])])
def test_merging_is_the_loop_over_tokens(order, weigh_sizes, n, rounds):
    x = tokens_of(n=n)
    out, group = merge(x, rounds, order=order, weigh_sizes=weigh_sizes)
    for i in range(2):
        wanted, members = naive(x[i], rounds, order, weigh_sizes)
        assert torch.allclose(out[i].double(), wanted, atol=1e-6)
        assert [(group[i] == k).nonzero()[:, 0].tolist() for k in range(len(members))] == members


@pytest.mark.parametrize("order", ["released", "raster"])
def test_likeness_may_be_measured_on_something_else(order):
    x, keys = tokens_of(), tokens_of(d=5, seed=3)
    out, _ = merge(x, [6, 2], metric=keys, order=order)
    assert torch.allclose(out[0].double(), naive(x[0], [6, 2], order, metric=keys[0])[0], atol=1e-6)
    scaled = merge(x, [6], metric=keys * torch.rand(2, 12, 1).add(0.1), order=order)[0]
    assert torch.allclose(scaled, merge(x, [6], metric=keys, order=order)[0], atol=1e-6)  # lengths do not count


def test_no_rounds_are_nothing():
    x = tokens_of()
    for rounds in ([], [0]):
        out, group = merge(x, rounds)
        assert torch.equal(out, x) and torch.equal(group[0], torch.arange(12))


def test_a_full_round_leaves_the_odd_places_and_a_partial_one_scrambles():
    x = tokens_of(m=1, n=8)
    _, group = merge(x, [4])
    assert group[0, 1::2].tolist() == [0, 1, 2, 3]
    _, group = merge(x, [2])
    assert group[0, 1::2].tolist() == [2, 3, 4, 5]  # behind the sources that are left
    _, group = merge(x, [2], order="raster")
    first = [int((group[0] == k).nonzero().max()) for k in range(6)]
    assert first == sorted(first)  # a source that stays keeps its place, a destination its own


def test_the_mean_stays_where_each_destination_gets_one_source():
    pair = tokens_of(m=1, n=4)
    x = (pair[:, :, None] + 0.01 * torch.randn(1, 4, 2, 8)).flatten(1, 2)  # neighbours look alike
    out, _ = merge(x, [4])
    assert torch.allclose(out.mean(1), x.mean(1), atol=1e-6)
    assert torch.allclose(out, x.unflatten(1, (4, 2)).mean(2), atol=1e-6)


def test_pairs_that_change_places_change_places():
    x = tokens_of(m=1, n=8)
    pairs = torch.tensor([2, 0, 3, 1])
    index = torch.stack([2 * pairs, 2 * pairs + 1], 1).flatten()
    assert torch.allclose(merge(x[:, index], [4])[0], merge(x, [4])[0][:, pairs], atol=1e-6)


def test_frames_are_merged_each_alone_and_gradients_are_shares():
    x = tokens_of(m=3, n=10).requires_grad_()
    out, group = merge(x, [5, 2])
    for i in range(3):
        assert torch.allclose(out[i], merge(x[i : i + 1], [5, 2])[0][0], atol=1e-7)
    out.sum().backward()
    assert torch.allclose(x.grad.sum((1, 2)), torch.full((3,), out[0].numel() * 1.0), atol=1e-4)
    assert group.max() == 2


@pytest.mark.parametrize(
    ("n", "ratio", "wanted"),
    [
        (196, 0.25, [98, 49]),
        (576, 252 / 576, [288, 36]),
        (576, 0.125, [288, 144, 72]),
        (196, 1.0, []),
        (729, 0.25, [364, 182]),
        (10, 0.9, [1]),
        (1, 0.25, []),
        (3, 0.01, [1, 1]),
    ],
)
def test_rounds_are_those_of_the_public_code(n, ratio, wanted):
    assert removals(n, ratio) == wanted
