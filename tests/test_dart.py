"""DART against a twin that follows the release token by token, and what its specification promises."""

import random

import pytest
import torch
from torch.nn import functional as F

from tests.dropping_builders import IMAGE, forward, generate, kept, labelled, llm_of, loss_of, padded, row
from zoo import registry
from zoo.benches.costs import DecoderSizes, matmul_flops
from zoo.benches.flops import flop_counter
from zoo.fusion.pruners.inside.attention_tap import tap_attention
from zoo.fusion.pruners.inside.dropper import LayerCut
from zoo.fusion.pruners.inside.sequence import TokenSequence
from zoo.registry import ZooError
from zoo.registry.versions import cache_of

ROWS = [row("tit", 24), row("titit", 9, 1), row("tt", seed=2), row("it", 16, 3)]


def build(llm=None, **options):
    pruner = registry.build("pruner", {"name": "dart", **options}).eval()
    if llm is not None:
        pruner.attach(llm)
    return pruner


def twin(norm, states, image, text, many, released, pivots=(4, 4)):
    """The release on one sample: `norm` of keys, `states` behind the final norm, indices of image and of later text."""
    order = sorted(image, key=lambda i: -norm[i])
    held, asked = order[: pivots[0]], sorted(text, key=lambda i: -norm[i])[: pivots[1]]
    keep, free = list(held), [i for i in image if i not in held]
    turns = list({*()}.union([*held, *asked])) if released else [*held, *asked]
    if many >= len(image):
        return sorted(image)
    left = many - len(held)
    for turn, pivot in enumerate(turns):
        t = many // sum(pivots) if released else left // len(turns) + (turn < left % len(turns))
        by_cosine = sorted(free, key=lambda i: float(F.cosine_similarity(states[pivot], states[i], dim=0)))
        keep += by_cosine[:t]
        free = [i for i in free if i not in by_cosine[:t]]
    return sorted(keep)


def given(n, lead, tail, seed, width=16):
    g = torch.Generator().manual_seed(seed)
    length = lead + n + tail
    image = torch.zeros(1, length, dtype=torch.bool)
    image[0, lead : lead + n] = True
    tokens = TokenSequence.of(image, None, None, None)
    norm, hidden = torch.rand(1, length, generator=g), torch.randn(1, length, width, generator=g)
    return LayerCut(2, hidden, tokens, tokens.count(), norm)


@pytest.mark.parametrize("released", [False, True])
@torch.no_grad()
def test_it_is_the_release_index_for_index(released):
    chance, llm = random.Random(0), llm_of()
    for seed in range(60):
        n, lead, tail = chance.randint(12, 60), chance.randint(1, 60), chance.randint(4, 20)
        cut = given(n, lead, tail, seed, width=32)
        pruner = build(llm, num_keep=chance.randint(8, n), as_released=released)
        image, text = range(lead, lead + n), range(lead + n, lead + n + tail)
        wanted = twin(cut.scores[0], llm.norm(cut.hidden)[0], image, text, pruner.config.num_keep, released)
        assert pruner._choose(cut)[0].nonzero()[:, 0].tolist() == wanted
        assert len(wanted) == pruner.tokens_per_layer(n, 4)[-1]
        pruner.detach()


def test_the_order_of_a_set_hangs_on_the_prompt_and_the_order_by_norm_does_not():
    llm, moved = llm_of(), {False: 0, True: 0}
    for released in moved:
        pruner = build(llm, num_keep=24, as_released=released, state_norm="none")
        for seed in range(20):
            sets = []
            for lead in (1, 2, 29):
                cut, tail = given(40, lead, 8, 0), given(40, 0, 8, seed)
                cut.hidden[:, lead:], cut.scores[:, lead:] = tail.hidden, tail.scores
                sets.append((pruner._choose(cut)[0].nonzero()[:, 0] - lead).tolist())
            moved[released] += sets[0] != sets[1] or sets[0] != sets[2]
        pruner.detach()
    assert moved[False] == 0 and moved[True] > 3


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_keys_of_the_layer_before_and_states_at_the_cut_decide(model_type):
    plain, llm, keys = llm_of(model_type), llm_of(model_type), []
    build(llm, num_keep=10)
    for ids in ROWS[:2]:
        undo = tap_attention(plain.layers[1], lambda query, key, *rest: keys.append(key), "test")
        states = plain.norm(forward(plain, None, ids[None], output_hidden_states=True).hidden_states[2])[0]
        undo()
        norm, image = keys.pop()[0].abs().sum((0, 2)), (ids == IMAGE).nonzero()[:, 0].tolist()
        text = list(range(image[-1] + 1, len(ids)))
        rest = [i for i in range(image[-1]) if i not in image]
        asked = (sorted(text, key=lambda i: -norm[i]) + sorted(rest, key=lambda i: -norm[i]))[:4]  # three words follow
        first = sorted(image, key=lambda i: -norm[i])[:4]
        keep, free = list(first), [i for i in image if i not in first]
        for t, pivot in zip((1, 1, 1, 1, 1, 1, 0, 0), [*first, *asked], strict=True):
            keep += sorted(free, key=lambda i: float(F.cosine_similarity(states[pivot], states[i], dim=0)))[:t]
            free = [i for i in free if i not in keep]
        out = forward(llm, True, ids[None])
        layers = kept(out)
        assert layers[1].all() and layers[2][0].nonzero()[:, 0].tolist() == sorted({*keep, *text, *rest})


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "zoo_eager"])
@torch.no_grad()
def test_a_batch_is_each_alone_with_any_kernel(released, side, kernel):
    llm = llm_of("qwen2", kernel)
    build(llm, num_keep=9, as_released=released)
    ids, mask = padded(ROWS, side)
    layers = kept(forward(llm, True, ids, mask))
    for i, one in enumerate(ROWS):
        alone = kept(forward(llm, True, one[None]))
        assert all(torch.equal(a[i][mask[i].bool()], b[0]) for a, b in zip(layers, alone, strict=True))
    text = (ids != IMAGE) & mask.bool()
    assert bool((layers[-1] & text).eq(text).all())
    assert (layers[-1] & ~text).sum(1).tolist() == ([12, 12, 0, 11] if released else [9, 9, 0, 9])


def test_packed_samples_are_each_alone():
    rows = [given(20, 3, 6, 0), given(9, 1, 5, 1), given(14, 0, 9, 2)]
    llm = llm_of()
    for released in (False, True):
        pruner = build(llm, num_keep=8, as_released=released, state_norm="none")
        hidden, scores = (torch.cat([getattr(r, n) for r in rows], 1) for n in ("hidden", "scores"))
        image = torch.cat([r.tokens.image for r in rows], 1)
        segment = torch.cat([torch.full_like(r.tokens.column, i) for i, r in enumerate(rows)], 1)
        tokens = TokenSequence.of(image, None, segment, None)
        together = pruner._choose(LayerCut(2, hidden, tokens, tokens.count(), scores))
        assert torch.equal(together, torch.cat([pruner._choose(r) for r in rows], 1))
        pruner.detach()


@torch.no_grad()
def test_a_full_budget_is_no_pruner_to_the_bit():
    ids, mask = padded(ROWS)
    plain = forward(llm_of(), None, ids, mask).last_hidden_state
    for options in ({"keep_ratio": 1.0}, {"num_keep": 24}, {"num_keep": 24, "as_released": True}):
        llm = llm_of()
        build(llm, **options)
        assert torch.equal(forward(llm, True, ids, mask).last_hidden_state, plain)


def test_scaled_keys_and_permuted_rows_choose_alike():
    llm = llm_of()
    pruner, cut = build(llm, num_keep=11, state_norm="none"), given(30, 4, 7, 3)
    wanted = pruner._choose(cut)
    cut.scores = cut.scores * 7
    assert torch.equal(pruner._choose(cut), wanted)
    index = torch.arange(41)
    index[4:34] = index[4:34][torch.randperm(30, generator=torch.Generator().manual_seed(0))]
    cut.hidden, cut.scores = cut.hidden[:, index], cut.scores[:, index]
    assert torch.equal(pruner._choose(cut), wanted[:, index])
    # One pivot keeps itself and those least like it; its equal goes last.
    one, cut = build(llm_of(), num_keep=6, image_pivots=1, text_pivots=0, state_norm="none"), given(20, 2, 3, 4)
    pivot = 2 + int(cut.scores[0, 2:22].argmax())
    twin_of = 2 if pivot != 2 else 3
    cut.hidden[0, twin_of] = cut.hidden[0, pivot] * 3
    cosine = F.cosine_similarity(cut.hidden[0], cut.hidden[0, pivot][None], dim=-1)[2:22]
    cosine[pivot - 2] = torch.inf
    least = cosine.argsort()[:5] + 2
    assert one._choose(cut)[0].nonzero()[:, 0].tolist() == sorted([pivot, *least.tolist()])
    many = build(llm_of(), num_keep=19, image_pivots=1, text_pivots=0, state_norm="none")
    assert not many._choose(cut)[0, twin_of] and int(many._choose(cut).sum()) == 19


def test_small_budgets_and_short_prompts_count_right():
    for n, keep, tail in ((5, 3, 2), (3, 2, 0), (12, 4, 1), (12, 5, 0), (2, 1, 1), (1, 1, 0)):
        pruner = build(llm_of(), num_keep=keep, state_norm="none")
        cut = given(n, 1, tail, n)
        chosen = pruner._choose(cut)
        assert int(chosen.sum()) == keep == pruner.tokens_per_layer(n, 4)[-1]
        if keep <= 4:
            best = cut.scores[0, 1 : n + 1].topk(keep).indices + 1
            assert chosen[0].nonzero()[:, 0].tolist() == best.sort().values.tolist()
    released = build(preset="llava15_128")
    assert released.tokens_per_layer(576, 32) == [576] * 2 + [132] * 30
    counts = [build(preset=f"llava15_{k}").tokens_per_layer(576, 4)[-1] for k in (192, 64)]
    assert counts == [196, 68] and build(num_keep=5, as_released=True).tokens_per_layer(50, 3)[-1] == 4


@torch.no_grad()
def test_generation_and_beams_keep_what_the_prompt_kept():
    llm = llm_of()
    build(llm, num_keep=9)
    together = generate(llm, True, *padded(ROWS[:2]))
    assert [cache_of(together).get_seq_length(i) - 4 for i in range(4)] == [30, 30, 18, 18]
    for i, one in enumerate(ROWS[:2]):
        assert torch.equal(together.sequences[i], generate(llm, True, one[None]).sequences[0])
    beams = [generate(llm, True, *padded(ROWS[:n]), num_beams=2).sequences for n in (1, 2)]
    assert torch.equal(beams[0][0], beams[1][0])


def test_choosing_leaves_no_gradient_and_runs_in_bf16():
    ids = row("titt", 20)[None]
    llm = llm_of().train()
    build(llm, num_keep=9)
    with torch.autocast("cpu", torch.bfloat16):
        total, _, passed = loss_of(llm, ids, torch.ones_like(ids), labelled(ids[0])[None])
    total.backward()
    assert int((passed.dropped.kept()[-1] & (ids == IMAGE)).sum()) == 9
    assert all(p.grad is not None for p in llm.layers.parameters())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"keep_ratio": 2}, r"keep_ratio must be in \(0, 1\]"),
        ({"image_pivots": 0}, "image_pivots"),
        ({"layer": 0}, "layer must be at least 1"),
        ({"state_norm": "last"}, "state_norm"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, what):
    with pytest.raises(ZooError, match=what):
        build(**options)


@torch.no_grad()
def test_the_closed_form_of_choosing_is_torchs_counter():
    llm = llm_of("qwen2", layers=4)
    pruner, ids = build(llm, num_keep=12), row("tit", 40)[None]
    with flop_counter() as counter:
        forward(llm, True, ids)
    sizes = DecoderSizes.of(llm.lm.config)
    tokens = [m + 6 for m in pruner.tokens_per_layer(40, 4)]
    scoring = pruner.score_flops(tokens, sizes.heads, sizes.head_dim)
    rotary = counter.get_total_flops() - matmul_flops(sizes, tokens, head_rows=0) - scoring
    assert 0 <= rotary <= 2 * ids.shape[1] * sizes.head_dim
