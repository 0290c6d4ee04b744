"""SparseVLM and SparseVLM+ against a twin that runs the layers one by one with eager attention, and their promises."""

import math

import pytest
import torch

from tests.dropping_builders import IMAGE, embeds_of, forward, generate, kept, labelled, llm_of, loss_of, padded, row
from zoo import registry
from zoo.fusion.pruners.density_peaks import cluster_means, density_peaks
from zoo.fusion.pruners.inside.pruned_prompt import LayerCut
from zoo.fusion.pruners.inside.raters import raters
from zoo.fusion.pruners.inside.sequence import TokenSequence
from zoo.registry import IGNORE_INDEX, ZooError
from zoo.registry.versions import cache_of, checkpoint_activations

ROWS = [row("titt", 24), row("titit", 9, 1), row("tt", seed=2), row("itt", 16, 3)]
SMALL = {"after": [0, 1], "num_keep": [12, 6]}


def build(llm=None, **options):
    pruner = registry.build("pruner", {"name": "sparsevlm", **options}).eval()
    if llm is not None:
        pruner.attach(llm)
    return pruner


# ---- the release, row by row -----------------------------------------------------------------------------------------


def raters_of(hidden, image):
    """Step 1 of the specification on one row: hidden (T, C), image (T,) bool."""
    first = int(image.nonzero()[0])
    text = [i for i in range(first, len(image)) if not image[i]]
    match = (hidden[image] @ hidden[text].T).softmax(1)  # (N, W)
    share = match.mean(0)
    return [text[i] for i in range(len(text)) if share[i] > share.mean()]


def clusters_of(x, count):
    """Step 5 with loops: centres, best first, and the cluster of each row."""
    n = len(x)
    d = [[float((x[i] - x[j]).norm()) / math.sqrt(x.shape[1]) for j in range(n)] for i in range(n)]
    rho = [math.exp(-sum(v * v for v in sorted(d[i])[:count]) / count) for i in range(n)]
    away = [min((d[i][j] for j in range(n) if rho[j] > rho[i]), default=max(map(max, d))) for i in range(n)]
    centres = sorted(range(n), key=lambda i: -rho[i] * away[i])[:count]
    cluster = [
        centres.index(i) if i in centres else min(range(count), key=lambda c: d[i][centres[c]]) for i in range(n)
    ]
    return centres, cluster


def twin(llm, ids, counts, dense, recycle=False, plus=None, least=-math.inf):
    """The release on one row; `plus` is the number of heads. Returns states and the columns of each layer."""
    hidden, left, sets = embeds_of(llm, ids[None]), torch.arange(len(ids)), []
    raters = raters_of(hidden[0], ids == IMAGE)
    for number, layer in enumerate(llm.layers):
        sets.append(left)
        positions = (torch.arange(len(left)) if dense else left)[None]
        tables = llm.decoder.rotary_emb(hidden, positions)
        mask = torch.full((len(left), len(left)), -torch.inf).triu(1)[None, None]
        given = {"position_embeddings": tables, "attention_mask": mask}
        weights = layer.self_attn(layer.input_layernorm(hidden), **given)[1][0]  # (H, L, L)
        hidden = layer(hidden, **given)
        if number not in counts:
            continue
        image = ids[left] == IMAGE
        rows = torch.isin(left, torch.tensor(raters))
        if plus:
            freq = llm.decoder.rotary_emb.inv_freq
            apart = positions[0][:, None] - positions[0][None]
            ones = 2 * (apart[..., None] * freq).cos().sum(-1) / math.sqrt(2 * len(freq))
            weights = weights / ones.clamp(min=least)
            sums = weights[:, rows][:, :, image].sum((1, 2))
            weights = weights[sums.topk(plus).indices]
        score = weights[:, rows].mean((0, 1)).masked_fill(~image, -1)
        stays = (~image).index_fill(0, score.topk(min(counts[number], int(image.sum()) - 1)).indices, True)
        if recycle:
            gone = (~stays).nonzero()[:, 0]
            chosen = gone[score[gone].sort(descending=True).indices[: int(0.3 * len(gone)) + 1]]
            count = int(len(chosen) / 10) + 1
            centres, cluster = clusters_of(hidden[0, chosen], count)
            rows_of = [chosen[[i for i, mine in enumerate(cluster) if mine == c]] for c in range(count)]
            merged = torch.stack([hidden[0, members].mean(0) for members in rows_of])
            stays[chosen[centres]], hidden[0, chosen[centres]] = True, merged
        hidden, left = hidden[:, stays], left[stays]
    return llm.norm(hidden)[0], sets


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dense", [False, True], ids=["kept", "dense"])
@pytest.mark.parametrize("how", [{}, {"recycle": True}, {"plus": True}], ids=["plain", "recycled", "plus"])
@torch.no_grad()
def test_it_is_the_release_run_by_hand(model_type, dense, how):
    eager, llm = llm_of(model_type, "eager"), llm_of(model_type)
    build(llm, **SMALL, as_released=True, **how)
    for ids in ROWS[:2]:
        wanted, sets = twin(eager, ids, {0: 12, 1: 6}, dense, "recycle" in how, 4 if how.get("plus") else None)
        out = forward(llm, True, ids[None], dense=dense)
        assert [k[0].nonzero()[:, 0].tolist() for k in kept(out)] == [s.tolist() for s in sets]
        torch.testing.assert_close(out.last_hidden_state[0], wanted, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_half_of_the_heads_are_chosen_by_their_own_sums():
    eager, llm, ids = llm_of(attention="eager"), llm_of(), ROWS[0]
    build(llm, **SMALL, plus=True)
    layers = kept(forward(llm, True, ids[None]))
    sets = twin(eager, ids, {0: 12, 1: 6}, False, plus=2, least=0.1 * 8**0.5)[1]
    assert [k[0].nonzero()[:, 0].tolist() for k in layers] == [s.tolist() for s in sets]


@torch.no_grad()
def test_the_divisor_falls_with_distance_and_is_kept_from_zero():
    from types import SimpleNamespace

    given = SimpleNamespace(
        query=torch.zeros(1, 1, 1, 128), tokens=SimpleNamespace(place=torch.tensor([[4095]])), layer=0
    )
    frequencies = 10000.0 ** (-torch.arange(64) / 64)
    found = {}
    for released in (False, True):
        pruner = build(plus=True, as_released=released)
        pruner.dropper = SimpleNamespace(arguments=SimpleNamespace(frequencies=lambda layer: frequencies))
        found[released] = pruner._of_ones(given)
    assert int((found[True] <= 0).nonzero()[0]) == 1707 and found[True][0] == pytest.approx(128**0.5)
    assert bool((found[False] >= 0.0999 * 128**0.5).all()) and torch.equal(found[False][:500], found[True][:500])


# ---- raters and clusters ---------------------------------------------------------------------------------------------


def at_input(rows, seed=0, labels=None, segments=None, width=16):
    """The LLM's input of padded rows, with random states."""
    ids, mask = padded(rows, "left")
    tokens = TokenSequence.of(ids == IMAGE, mask, segments, labels)
    hidden = torch.stack(
        [
            torch.nn.functional.pad(
                torch.randn(len(r), width, generator=torch.Generator().manual_seed(len(r))),
                (0, 0, ids.shape[1] - len(r), 0),
            )
            for r in rows
        ]
    )
    return LayerCut(0, hidden, tokens, tokens.count())


def test_raters_are_those_of_the_specification_whatever_stands_ahead():
    rows = [row("titt", 12), row("ttittt", 9, 1), row("titit", 5, 2), row("tt", seed=3)]
    together = raters(at_input(rows))
    for i, one in enumerate(rows[:3]):
        alone = at_input([one])
        wanted = raters_of(alone.hidden[0], one == IMAGE)
        votes = raters(alone)[0]
        assert votes.nonzero()[:, 0].tolist() == wanted and 0 < len(wanted) < len(one)
        torch.testing.assert_close(votes[wanted], torch.full((len(wanted),), 1 / len(wanted)))
        torch.testing.assert_close(together[i, -len(one) :], votes)
    ahead = at_input([row("tttitt", 12)])
    ahead.hidden[0, 6:] = at_input([rows[0]]).hidden[0]
    assert torch.equal(raters(ahead)[0, 6:], raters(at_input([rows[0]]))[0])


def test_raters_stand_in_front_of_the_answer_and_there_is_always_one():
    ids = row("titt", 12)
    labels = torch.full_like(ids, IGNORE_INDEX)[None]
    labels[0, -2:] = 1
    assert not raters(at_input([ids], labels=labels))[0, -2:].any()
    same = at_input([ids])
    same.hidden[0, 15:] = same.hidden[0, 15]
    assert raters(same)[0].nonzero()[:, 0].tolist() == list(range(15, 21))
    assert raters(at_input([row("ti", 5)]))[0].nonzero()[:, 0].tolist() == [7]  # no text follows: the last token
    packed = at_input([torch.cat([row("titt", 12), row("itt", 7, 1)])], segments=torch.tensor([[0] * 21 + [1] * 13]))
    one = at_input([row("titt", 12)])
    one.hidden = packed.hidden[:, :21]
    assert torch.equal(raters(packed)[:, :21], raters(one))


def test_clusters_are_those_of_loops():
    for seed, (n, count) in enumerate([(1, 1), (2, 1), (5, 1), (7, 2), (12, 2), (25, 3), (40, 5)]):
        x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        centres, cluster = density_peaks(x, count)
        wanted, of = clusters_of(x.double(), count)
        if count != 2:  # of two, mutual neighbours tie in density
            assert centres.tolist() == wanted and cluster.tolist() == of
        again = density_peaks(x, count)
        assert torch.equal(centres, again[0]) and torch.equal(cluster, again[1])
        assert torch.bincount(cluster, minlength=count).min() > 0
        means = cluster_means(x, cluster, count)
        for c in range(count):
            torch.testing.assert_close(means[c], x[cluster == c].mean(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_large_states_are_rounded_once(dtype):
    """Some hidden states of an LLM are in the thousands: their sum leaves the range of float16."""
    x = (1000 + 60 * torch.randn(300, 8, generator=torch.Generator().manual_seed(0))).to(dtype)
    cluster = torch.arange(300) % 2
    wanted = torch.stack([x[cluster == c].float().mean(0) for c in range(2)]).to(dtype)
    torch.testing.assert_close(cluster_means(x, cluster, 2), wanted, rtol=torch.finfo(dtype).eps, atol=0)


# ---- what it promises ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        SMALL,
        {**SMALL, "recycle": True},
        {**SMALL, "plus": True},
        {"after": [0, 1], "counts": "rank", "rank_scale": 2.0},
    ],
    ids=["plain", "recycled", "plus", "rank"],
)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_is_each_alone_and_text_stays(how, side):
    llm = llm_of("qwen2")
    pruner = build(llm, **how)
    ids, mask = padded(ROWS, side)
    out = forward(llm, True, ids, mask)
    layers, seen = kept(out), out.passed.dropped.layers[-1].seen
    for i, one in enumerate(ROWS):
        alone = forward(llm, True, one[None])
        assert all(torch.equal(a[i][mask[i].bool()], b[0]) for a, b in zip(layers, kept(alone), strict=True))
        torch.testing.assert_close(out.last_hidden_state[i][seen[i]], alone.last_hidden_state[0], atol=2e-5, rtol=1e-4)
        counts = pruner.tokens_per_layer(int((one == IMAGE).sum()), 4)
        found = [int((k[i] & (ids[i] == IMAGE)).sum()) for k in layers]
        assert found == counts if "counts" not in how else all(a <= b for a, b in zip(found, counts, strict=True))
    text = (ids != IMAGE) & mask.bool()
    assert all(bool((k & text).eq(text).all()) for k in layers)


@torch.no_grad()
def test_counts_by_rank_are_a_multiple_of_the_raters():
    llm, ids = llm_of(), ROWS[0]
    build(llm, after=[0], counts="rank", rank_scale=2.5, rank_bias=1.0)
    many = len(raters_of(embeds_of(llm, ids[None])[0], ids == IMAGE))
    assert int((kept(forward(llm, True, ids[None]))[-1][0] & (ids == IMAGE)).sum()) == int(many * 2.5 + 1)


@torch.no_grad()
def test_generation_in_a_batch_is_each_alone():
    for dense in (False, True):
        llm = llm_of()
        build(llm, **SMALL, recycle=True)
        together = generate(llm, True, *padded(ROWS), dense=dense)
        for i, one in enumerate(ROWS):
            assert torch.equal(together.sequences[i], generate(llm, True, one[None], dense=dense).sequences[0])
        left = registry.build("pruner", {"name": "sparsevlm", **SMALL, "recycle": True}).tokens_per_layer(24, 4)
        assert [cache_of(together).get_seq_length(i) - 4 for i in range(4)] == [n + 9 for n in left]
        beams = [generate(llm, True, *padded(ROWS[:n]), dense=dense, num_beams=2).sequences for n in (1, 2)]
        assert torch.equal(beams[0][0], beams[1][0])


@pytest.mark.parametrize("on", [False, True], ids=["kept", "recomputed"])
def test_gradients_pass_through_merged_rows(on):
    ids, grads = row("tittt", 20)[None], []
    for hide in (False, True):
        llm = llm_of().train()
        pruner = build(llm, after=[0], num_keep=[3], recycle=True)
        pruner.dropper.hide = hide
        if on:
            checkpoint_activations(llm.lm)
        states = []
        handle = llm.layers[0].register_forward_hook(
            lambda m, a, out, states=states: states.append(out) or out.retain_grad()
        )
        loss_of(llm, ids, torch.ones_like(ids), labelled(ids[0])[None])[0].backward()
        handle.remove()
        grads.append(states[0].grad[0, 3:23].abs().sum(-1))
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-6)
    assert int((grads[0] > 0).sum()) == 3 + int(0.3 * 17) + 1  # those kept, and those merged


@torch.no_grad()
def test_keeping_all_is_no_pruner_to_the_bit_and_bf16_runs():
    ids, mask = padded(ROWS)
    plain = forward(llm_of(), None, ids, mask).last_hidden_state
    for options in ({"keep_ratio": 1.0}, {"after": [0], "num_keep": [24]}):
        llm = llm_of()
        build(llm, **options)
        assert torch.equal(forward(llm, True, ids, mask).last_hidden_state, plain)
    for how in ({}, {"recycle": True}, {"plus": True}, {"counts": "rank"}):
        llm = llm_of()
        build(llm, after=[0], **({"keep_ratio": 0.5} | how))
        with torch.autocast("cpu", torch.bfloat16):
            assert forward(llm, True, ids, mask).last_hidden_state.isfinite().all()


def test_counts_are_those_of_the_release():
    table = {"192": ([300, 200, 110], 192.0), "128": ([303, 110, 36], 128.6), "96": ([238, 48, 26], 96.9)}
    for name, (budgets, mean) in (table | {"64": ([66, 30, 17], 64.8)}).items():
        counts = build(preset=f"llava15_{name}").tokens_per_layer(576, 32)
        left = [counts[3], counts[7], counts[16]]
        assert counts[:3] == [576] * 3 and all(0 < a - b <= 30 for a, b in zip(left, budgets, strict=True))
        assert abs(sum([*counts[1:], counts[-1]]) / 32 - mean) < 0.1 if name != "192" else left == [309, 204, 113]
    plus = build(preset="plus_llava15_64").tokens_per_layer(576, 32)
    assert [plus[3], plus[7], plus[16]] == [66, 34, 20] and sum(plus) / 32 == pytest.approx(81.8, abs=0.05)
    assert build(**SMALL, as_released=True).tokens_per_layer(4, 3) == [4, 3, 2]
    assert build(**SMALL).tokens_per_layer(4, 3) == [4, 4, 4]
    assert build(keep_ratio=0.125).tokens_per_layer(64, 32)[3::6] == [32, 16, 16, 8, 8]
    assert build().tokens_per_layer(64, 4) == [64, 37, 21, 12] and build().tokens_per_layer(64, 1) == [64]
    assert build(counts="rank").tokens_per_layer(64, 4) == [64] * 4


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"keep_ratio": 0}, r"keep_ratio must be in \(0, 1\]"),
        ({"after": [2, 2]}, "after must ascend from 0 on"),
        ({"ratios": [0.5, 0.6, 0.1]}, "must not grow"),
        ({"num_keep": [3, 4, 1]}, "num_keep must .* not grow"),
        ({"num_keep": [3]}, "num_keep must have one value for each cut, 3"),
        ({"after": [1], "num_keep": [3], "ratios": [0.5]}, "exclude each other"),
        ({"plus": True, "recycle": True}, "plus has no recycling"),
        ({"counts": "ranks"}, "Did you mean 'rank'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, what):
    with pytest.raises(ZooError, match=what):
        build(**options)
