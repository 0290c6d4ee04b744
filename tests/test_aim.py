"""AIM: schedule, importance, dropping with the walk as score, and the cost figures of the paper."""

from dataclasses import replace

import pytest
import torch

from tests.dropping_builders import IMAGE, embeds_of, forward, generate, llm_of, padded, row, sequence
from tests.fusion_builders import features, tiny_llm
from tests.test_attention_walk import matrix, walked
from zoo import registry
from zoo.benches.costs import QWEN2_7B, VICUNA_7B, DecoderSizes, cache_bytes, matmul_flops, roofline_flops
from zoo.benches.flops import flop_counter
from zoo.fusion.pruners.inside.attention_flow import walk_flops
from zoo.fusion.pruners.token_merging import merge
from zoo.registry import ZooError
from zoo.registry.forward_pass import running
from zoo.registry.versions import cache_of


def build(name="aim", llm=None, **options):
    pruner = registry.build("pruner", {"name": name, **options}).eval()
    if llm is not None:
        pruner.attach(llm)
    return pruner


def inside(llm, **options):
    """AIM that merges nothing and drops after layers 0 and 1: half, then none."""
    return build(llm=llm, **{"merge_ratio": 1.0, "start": 0, "stop": 2, **options})


# ---- schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "start", "stop"), [(28, 14, 22), (32, 13, 21)])
def test_the_schedule_is_the_released_list(depth, start, stop):
    released = [1.0] * start + [0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125] + [0.0] * (depth - stop + 1)
    counts = build(start=start, stop=stop).tokens_per_layer(1569, depth)
    # the list holds at the output of its layer, so for the layer behind it
    assert counts == [1569] + [int((1669 - 100) * share + 100) - 100 for share in released[:-1]]
    if depth == 28:
        assert build().tokens_per_layer(1569, depth) == counts
    assert counts[start] == 1569 and counts[start + 1] == 1372 and counts[stop] == 0


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 12, 28, 32, 80])
def test_the_schedule_fits_any_depth(depth):
    counts = build().tokens_per_layer(40, depth)
    assert len(counts) == depth and counts[0] == 40
    assert counts == sorted(counts, reverse=True)
    if depth > 2:
        assert counts[-1] == 0
    assert build(prune=False).tokens_per_layer(40, depth) == [40] * depth


def test_a_share_above_zero_keeps_one():
    assert build(start=0, stop=8).tokens_per_layer(3, 10) == [3, 2, 2, 1, 1, 1, 1, 1, 0, 0]


# ---- importance -------------------------------------------------------------------------------------------------


def attended(pruner, llm, ids, mask=None):
    """What is scored in each layer, with the score, and the pass."""
    found, own = [], pruner.dropper.score
    pruner.dropper.score = lambda given: found.append((given, own(given))) or found[-1][1]
    return found, forward(llm, pruner, ids, mask).passed


def dense(given, start, temperature=0.1, steps=5, damping=0.0, hidden=None):
    """The importance by the attention matrix in float64."""
    seen = given.tokens.seen[:, None, :].expand(-1, given.query.shape[2], -1)
    p = matrix(given.query, given.key, given.scaling, temperature, visible=seen)
    return walked(p, start, steps, damping)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma", "granite"])
@torch.no_grad()
def test_importance_is_that_of_the_dense_matrix(model_type):
    llm = llm_of(model_type)
    pruner = inside(llm, stop=3)
    ids, mask = padded([row("tit", 8), row("titit", 4, 1)])
    scored, _ = attended(pruner, llm, ids, mask)
    assert len(scored) == 3 and [g.tokens.seen.shape[1] for g, _ in scored] == [17, 14, 11]
    for given, score in scored:
        seen = given.tokens.seen
        wanted = dense(given, seen / seen.sum(1, True)).square().mean(1).sqrt()
        assert torch.allclose(score[seen].double(), wanted[seen], atol=1e-6)


@pytest.mark.parametrize("votes", ["alive", "text", "last"])
@torch.no_grad()
def test_options_of_the_walk(votes):
    llm = llm_of()
    pruner = inside(llm, votes=votes, temperature=1.0, steps=2, damping=0.2, heads="mean")
    (given, score), *_ = attended(pruner, llm, row("tit", 8)[None])[0]
    ids = row("tit", 8)
    start = {"alive": torch.ones(14), "text": (ids != IMAGE).float(), "last": torch.arange(14) == 13}[votes].float()
    wanted = dense(given, (start / start.sum())[None], 1.0, 2, 0.2).mean(1)
    assert torch.allclose(score.double(), wanted, atol=1e-6)


@torch.no_grad()
def test_values_have_no_part_in_it():
    llm = llm_of()
    pruner = inside(llm)
    ids = row("tit", 8)[None]
    before = attended(pruner, llm, ids)[0][0][1]
    llm.layers[0].self_attn.v_proj.weight.mul_(3)
    assert torch.equal(attended(pruner, llm, ids)[0][0][1], before)


# ---- inside the LLM ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "stablelm", "phi3"])
@torch.no_grad()
def test_dropping_is_hiding(model_type):
    ids, mask = padded([row("tit", 8), row("titit", 4, 1)])
    found = []
    for hide in (False, True):
        llm = llm_of(model_type)
        pruner = inside(llm)
        pruner.dropper.hide = hide
        found.append(generate(llm, pruner, ids, mask))
    a, b = found
    assert torch.equal(a.sequences, b.sequences)
    assert all(torch.allclose(x, y, atol=3e-6, rtol=3e-6) for x, y in zip(a.scores, b.scores, strict=True))


@torch.no_grad()
def test_a_batch_is_each_sample_alone():
    llm = llm_of("qwen2")
    pruner = inside(llm)
    rows = [row("tit", 9), row("ttiitit", 4, 1), row("tt", seed=2)]
    for side in ("left", "right"):
        out = forward(llm, pruner, *padded(rows, side))
        together, seen = out.last_hidden_state, out.passed.dropped.layers[-1].seen
        for i, alone in enumerate(rows):
            out = forward(llm, pruner, alone[None]).last_hidden_state[0]
            assert torch.allclose(together[i][seen[i]], out, atol=1e-5)


@torch.no_grad()
def test_votes_of_all_is_the_released_walk_with_masks():
    """Pruned rows go on through the layers, vote, and are seen by nobody."""
    llm = llm_of()
    pruner = inside(llm, votes="all", stop=3)
    ids = row("tit", 9)[None]
    n, protected = ids.shape[1], int((ids != IMAGE).sum())
    alive = torch.ones(n, dtype=torch.bool)
    scored, passed = attended(pruner, llm, ids)
    kept = pruner.kept(passed)
    for layer, (given, _) in enumerate(scored):
        assert given.query.shape[2] == n and torch.equal(given.tokens.seen[0], alive)
        score = dense(given, torch.full((1, n), 1 / n)).square().mean(1).sqrt()[0]
        score = score.masked_fill(~alive, -1).masked_fill(ids[0] != IMAGE, 1.0)
        keep = int((n - protected) * max(0, 1 - (layer + 1) / 3) + protected + 1e-9)
        alive = torch.zeros(n, dtype=torch.bool).index_fill(0, score.argsort(descending=True, stable=True)[:keep], True)
        assert torch.equal(kept[layer + 1][0], alive)


@torch.no_grad()
def test_the_walk_materialises_no_matrix():
    length, peak = 700, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                peak.append(out.numel())
            return out

    llm = llm_of(max_positions=1024)
    inside(llm)
    ids = row("tit", length)[None]
    with Watch(), running(sequence(ids)):
        llm.hidden(inputs_embeds=embeds_of(llm, ids))
    assert max(peak) < 4 * length * length / 4  # four heads; blocks of 128 rows


@torch.no_grad()
def test_default_drops_nothing_where_the_llm_is_too_shallow():
    llm = tiny_llm(num_layers=1)
    pruner = build(llm=llm, merge_ratio=1.0)
    ids = row()[None]
    assert forward(llm, pruner, ids).last_hidden_state.shape[1] == ids.shape[1]


def test_pruned_training_chooses_as_the_prompt_alone_does():
    from tests.dropping_builders import labelled, loss_of

    llm = llm_of().train()
    pruner = inside(llm, stop=3)
    ids = row("titt", 9)
    total, _, passed = loss_of(llm, ids[None], torch.ones(1, len(ids)), labelled(ids)[None])
    total.backward()
    trained = [k[0, :-3] for k in pruner.kept(passed)]
    with torch.no_grad():
        prompt = forward(llm, pruner, ids[None, :-3]).passed
    assert all(torch.equal(a, b[0]) for a, b in zip(trained, pruner.kept(prompt), strict=True))


# ---- merging as a part ------------------------------------------------------------------------------------------


def test_merging_counts_and_says_where_tokens_went():
    image = features(m=2, grid=(4, 6), rows=(1, 1), row_kind="frame")
    pruner = build()
    out = pruner(image)
    assert pruner.num_tokens(24) == out.tokens.shape[1] == 6
    assert out.grid is None and out.keep is None and out.row_kind == "frame"
    assert torch.allclose(out.cls_attention.sum(1), image.cls_attention.sum(1))
    assert out.groups.shape == (2, 24) and out.groups.unique().tolist() == list(range(6))
    again = pruner(out)
    assert again.groups.shape == (2, 24) and again.groups.max() == again.tokens.shape[1] - 1
    kept = image.take(torch.arange(1, 24, 2).expand(2, -1))
    assert (pruner(kept).groups[:, ::2] == -1).all() and (pruner(kept).groups[:, 1::2] >= 0).all()
    assert build(merge_ratio=1.0)(image) is image


def test_likeness_on_keys():
    image = features(m=2, grid=(4, 6))
    pruner = build(metric="keys")
    assert pruner.needs == {"image_tokens", "keys"} and build(metric="keys", merge_ratio=1.0).needs == {"image_tokens"}
    with pytest.raises(ZooError, match="metric=keys needs the keys"):
        pruner(replace(image, keys=None))
    same = pruner(replace(image, keys=image.tokens.unflatten(2, (4, 6))))
    assert torch.allclose(same.tokens, merge(image.tokens, [12, 6], metric=image.tokens)[0])
    other = torch.randn(2, 24, 4, 6, generator=torch.Generator().manual_seed(5))
    assert not torch.allclose(pruner(replace(image, keys=other)).tokens, same.tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_ratio": 0.0}, r"merge_ratio must be in \(0, 1\], got 0.0"),
        ({"order": "rastr"}, "'rastr'. Did you mean 'raster'"),
        ({"votes": "alife"}, "Did you mean 'alive'"),
        ({"heads": "max"}, "heads"),
        ({"start": 5, "stop": 5}, "stop must be greater than start, got start=5 and stop=5"),
        ({"temperature": 0.0}, "temperature must be more than 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"damping": 1.0}, r"damping must be in \[0, 1\)"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        build(**options)


def test_a_stop_before_the_default_start_is_refused_with_both():
    with pytest.raises(ZooError, match="start=14 and stop=9 of 28 layers"):
        build(stop=9).schedule(28)
    assert build(start=25).schedule(28) == (25, 26)


def test_the_default_is_the_released_schedule_where_there_is_one():
    assert build().schedule(28) == (14, 22) and build().schedule(32) == (13, 21)
    assert build().schedule(14) == (7, 11) and build().schedule(56) == (28, 44), "that of 28, scaled"
    assert build(start=20).schedule(32) == (20, 21) and build(start=24).schedule(32) == (24, 25)
    assert build(stop=30).schedule(32) == (13, 30)


# ---- FastV ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_fastv_keeps_what_the_last_prompt_token_attends_to():
    eager = llm_of(attention="eager")
    ids, mask = padded([row("tit", 8), row("titit", 4, 1)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    weights = eager.lm(
        inputs_embeds=embeds_of(eager, ids), attention_mask=mask, position_ids=positions, output_attentions=True
    ).attentions[1]
    llm = llm_of()
    pruner = build("fastv", llm, keep_ratio=0.4, layer=2)
    out = forward(llm, pruner, ids, mask)
    score = weights[:, :, -1].mean(1).masked_fill(ids != IMAGE, -1)
    kept = pruner.kept(out.passed)
    for i, many in enumerate((3, 3)):  # 0.4 of 8 and of 2 * 4, rounded
        best = score[i].topk(many).indices.sort().values
        assert torch.equal((kept[2][i] & (ids[i] == IMAGE)).nonzero()[:, 0], best)
    assert torch.equal(kept[1], mask.bool()) and torch.equal(kept[2], kept[3])
    assert out.last_hidden_state.shape[1] == int(kept[3].sum(1).max())
    assert pruner.tokens_per_layer(8, 4) == [8, 8, 3, 3]


def test_fastv_refuses_what_does_not_fit():
    with pytest.raises(ZooError, match="layer must be at least 1"):
        build("fastv", layer=0)
    with pytest.raises(ZooError, match="pruner 'fastv' drops tokens at the output of layer 1"):
        build("fastv", tiny_llm())


# ---- cost -------------------------------------------------------------------------------------------------------


def printed(n, text, depth, start, stop):
    """Tokens of each layer as the paper's tables count them: layer `start` is reduced already."""
    behind = build(start=start, stop=stop).tokens_per_layer(n, depth + 1)[1:]
    return [int(text + m) for m in behind]


def executed(n, text, depth, start, stop):
    return [text + m for m in build(start=start, stop=stop).tokens_per_layer(n, depth)]


def test_published_costs_to_the_printed_digit():
    def tera(sizes, tokens):
        return f"{roofline_flops(sizes, tokens) / 1e12:.2f}"

    assert tera(QWEN2_7B, [6372] * 28) == "99.63"
    assert tera(QWEN2_7B, [1668] * 28) == "22.90"
    assert tera(QWEN2_7B, [3236] * 28) == "46.48"
    assert tera(QWEN2_7B, printed(1568, 100, 28, 14, 22)) == "14.76"
    assert tera(QWEN2_7B, executed(1568, 100, 28, 14, 22)) == "15.53"
    assert tera(VICUNA_7B, [616] * 32) == "8.18"
    assert tera(VICUNA_7B, printed(252, 40, 32, 13, 21)) == "2.22"
    assert tera(VICUNA_7B, executed(252, 40, 32, 13, 21)) == "2.33"
    assert tera(VICUNA_7B, printed(72, 40, 32, 13, 21)) == "1.00"
    assert tera(VICUNA_7B, executed(72, 40, 32, 13, 21)) == "1.03"


@torch.no_grad()
def test_closed_form_is_torchs_counter_and_caches_are_as_counted():
    llm = tiny_llm("qwen2", num_layers=6)
    pruner = build(llm=llm, merge_ratio=1.0)
    ids = row("tit", 40)[None]
    embeds = embeds_of(llm, ids)
    with flop_counter() as counter, running(sequence(ids)):
        out = llm.lm(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    sizes, n = DecoderSizes.of(llm.lm.config), pruner.tokens_per_layer(40, 6)
    assert n == [40, 40, 40, 40, 20, 0]
    tokens = [m + 6 for m in n]
    scoring = sum(walk_flops(n, sizes.heads, sizes.head_dim, 5) for n in tokens[3:5])
    rotary = counter.get_total_flops() - matmul_flops(sizes, tokens, head_rows=1) - scoring
    assert 0 <= rotary <= 2 * ids.shape[1] * sizes.head_dim  # the table of angles is a product too
    cache = cache_of(out)
    assert [cache.get_seq_length(i) for i in range(6)] == tokens
    held = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    assert held == cache_bytes(sizes, tokens, 4)
