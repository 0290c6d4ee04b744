"""PyramidDrop against a twin that runs the layers one by one as the release does, and what it promises."""

from itertools import pairwise

import pytest
import torch

from tests.dropping_builders import IMAGE, embeds_of, forward, generate, kept, labelled, llm_of, loss_of, padded, row
from zoo import registry
from zoo.benches.costs import DecoderSizes, matmul_flops
from zoo.benches.flops import flop_counter
from zoo.registry import IGNORE_INDEX, ZooError
from zoo.registry.versions import cache_of, checkpoint_activations

ROWS = [row("tit", 12), row("titit", 5, 1), row("tt", seed=2)]
SMALL = {"layers": [1, 2], "ratios": [0.5, 0.25]}


def build(llm=None, **options):
    pruner = registry.build("pruner", {"name": "pyramiddrop", **options}).eval()
    if llm is not None:
        pruner.attach(llm)
    return pruner


def twin(llm, ids, counts, dense, voters=None):
    """The release on one row: before a stage, rank by the attention of its first layer to all that is left."""
    hidden, left, sets = embeds_of(llm, ids[None]), torch.arange(len(ids)), []
    voters = torch.tensor([len(ids) - 1] if voters is None else voters)
    for number, layer in enumerate(llm.layers):
        for drops in (number in counts, False):
            positions = (torch.arange(len(left)) if dense else left)[None]
            tables = llm.decoder.rotary_emb(hidden, positions)
            if not drops:
                break
            mask = torch.full((len(left), len(left)), -torch.inf).triu(1)[None, None]
            given = {"position_embeddings": tables, "attention_mask": mask}
            _, weights = layer.self_attn(layer.input_layernorm(hidden), **given)  # (1, H, L, L)
            score = weights[0][:, torch.isin(left, voters)].mean((0, 1))
            image = ids[left] == IMAGE
            best = score.masked_fill(~image, -1).topk(counts[number]).indices
            stays = (~image).index_fill(0, best, True)
            hidden, left = hidden[:, stays], left[stays]
        sets.append(left)
        mask = torch.full((len(left), len(left)), -torch.inf).triu(1)[None, None]
        hidden = layer(hidden, position_embeddings=tables, attention_mask=mask)
    return llm.norm(hidden)[0], sets


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("dense", [False, True], ids=["kept", "dense"])
@torch.no_grad()
def test_it_is_the_release_run_by_hand(model_type, dense):
    eager, llm = llm_of(model_type, "eager"), llm_of(model_type)
    build(llm, **SMALL, as_released=True)
    for ids in ROWS[:2]:
        n = int((ids == IMAGE).sum())
        wanted, sets = twin(eager, ids, {1: int(n * 0.5), 2: int(n * 0.25)}, dense)
        out = forward(llm, True, ids[None], dense=dense)
        assert [k[0].nonzero()[:, 0].tolist() for k in kept(out)] == [s.tolist() for s in sets]
        torch.testing.assert_close(out.last_hidden_state[0], wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_training_ranks_by_the_tokens_in_front_of_each_answer():
    eager, ids = llm_of(attention="eager"), row("titttt", 8)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[13:16], labels[20:] = ids[13:16], ids[20:]
    chosen = {}
    for votes, voters in (("turns", [12, 19]), ("last", [12])):
        llm = llm_of()
        build(llm, **SMALL, votes=votes)
        chosen[votes] = loss_of(llm, ids[None], torch.ones(1, len(ids)).long(), labels[None])[2].dropped.kept()
        sets = twin(eager, ids, {1: 4, 2: 2}, False, voters)[1]
        assert [k[0].nonzero()[:, 0].tolist() for k in chosen[votes]] == [s.tolist() for s in sets]
    assert any(not torch.equal(a, b) for a, b in zip(*chosen.values(), strict=True))
    # What follows the last answer changes nothing; without an answer the last token asks.
    llm = llm_of()
    build(llm, **SMALL)
    longer = torch.cat([ids, row("t", seed=7)])
    more = torch.cat([labels, labels.new_full((3,), IGNORE_INDEX)])
    again = loss_of(llm, longer[None], torch.ones(1, len(longer)).long(), more[None])[2].dropped.kept()
    assert all(torch.equal(a, b[:, : len(ids)]) for a, b in zip(chosen["turns"], again, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_is_each_alone_and_sets_are_nested(side):
    llm = llm_of("qwen2")
    build(llm, layers=[1, 2, 3], keep_ratio=0.4)
    ids, mask = padded(ROWS, side)
    out = forward(llm, True, ids, mask)
    layers = kept(out)
    for i, one in enumerate(ROWS):
        alone = kept(forward(llm, True, one[None]))
        assert all(torch.equal(a[i][mask[i].bool()], b[0]) for a, b in zip(layers, alone, strict=True))
    text = (ids != IMAGE) & mask.bool()
    assert all(bool((k & text).eq(text).all()) for k in layers)
    assert all(bool((b <= a).all()) for a, b in pairwise(layers))
    assert [(k & (ids == IMAGE)).sum(1).tolist() for k in layers] == [[12, 10, 0], [5, 4, 0], [2, 2, 0], [1, 1, 0]]


@torch.no_grad()
def test_generation_in_a_batch_has_short_caches_and_is_each_alone():
    for dense in (False, True):
        llm = llm_of()
        build(llm, **SMALL)
        together = generate(llm, True, *padded(ROWS), dense=dense)
        longest = [19, 14, 12, 12]  # of text and images, in each layer
        assert [cache_of(together).get_seq_length(i) - 4 for i in range(4)] == longest
        for i, one in enumerate(ROWS):
            out = generate(llm, True, one[None], dense=dense)
            assert torch.equal(together.sequences[i], out.sequences[0])
        beams = [generate(llm, True, *padded(ROWS[:n]), dense=dense, num_beams=2).sequences for n in (1, 2)]
        assert torch.equal(beams[0][0], beams[1][0])


@torch.no_grad()
def test_keeping_all_is_no_pruner_to_the_bit_and_none_is_text_alone():
    ids, mask = padded(ROWS)
    llm, plain = llm_of(), llm_of()
    build(llm, keep_ratio=1.0)
    assert torch.equal(*(forward(x, True, ids, mask).last_hidden_state for x in (llm, plain)))
    llm = llm_of()
    build(llm, layers=[2], ratios=[0.0], as_released=True)
    assert (kept(forward(llm, True, ids, mask))[-1] & (ids == IMAGE)).sum() == 0


@pytest.mark.parametrize("on", [False, True], ids=["kept", "recomputed"])
def test_ranking_leaves_no_gradient(on, monkeypatch):
    ids, grads, sets = row("titt", 8)[None], [], []
    for chosen in (False, True):
        llm = llm_of().train()
        pruner = build(llm, **SMALL)
        if on:
            checkpoint_activations(llm.lm)
        if chosen:  # the same sets, without reading a layer
            own = pruner.dropper
            monkeypatch.setattr(own, "score", None)
            monkeypatch.setattr(own, "choose", lambda cut, sets=sets: sets[cut.layer][:, cut.tokens.column[0]])
        total, _, passed = loss_of(llm, ids, torch.ones_like(ids), labelled(ids[0])[None])
        sets = passed.dropped.kept()
        total.backward()
        grads.append([p.grad for p in llm.layers.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_counts_are_those_of_the_release_and_of_the_presets():
    released = build(preset="llava15")
    counts = released.tokens_per_layer(576, 32)
    assert counts == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8 and sum(counts) / 32 == 270
    assert released.tokens_per_layer(7, 32)[-1] == 0 and build().tokens_per_layer(7, 32)[-1] == 1
    assert [round(sum(build(preset="llava15_64").tokens_per_layer(576, 32)) / 32, 1)] == [62.9]
    assert build().tokens_per_layer(64, 28) == [64] * 7 + [32] * 7 + [16] * 7 + [8] * 7
    assert build().tokens_per_layer(64, 4) == [64, 32, 16, 8]
    assert build().tokens_per_layer(64, 2) == [64, 16] and build().tokens_per_layer(64, 1) == [64]
    assert build(as_released=True, layers=[1], ratios=[0.29]).tokens_per_layer(100, 2) == [100, int(100 * 0.29)]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"keep_ratio": 0}, r"keep_ratio must be in \(0, 1\]"),
        ({"layers": [2, 2]}, "layers must ascend from 1 on"),
        ({"layers": [0]}, "layers must ascend from 1 on"),
        ({"ratios": [0.5, 0.6, 0.1]}, "must not grow"),
        ({"layers": [1], "ratios": [0.5, 0.2]}, "one for each stage"),
        ({"votes": "turn"}, "Did you mean 'turns'"),
        ({"reads": "next"}, "reads"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, what):
    with pytest.raises(ZooError, match=what):
        build(**options)


def test_layers_behind_the_llm_are_refused():
    with pytest.raises(ZooError, match="layers must be below the depth of the LLM, 4, got"):
        build(llm_of(), layers=[2, 4])


@torch.no_grad()
def test_the_closed_form_of_ranking_is_torchs_counter_and_nothing_is_quadratic():
    llm = llm_of("qwen2", layers=6)
    pruner, ids = build(llm), row("tit", 40)[None]
    with flop_counter() as counter:
        forward(llm, True, ids)
    sizes, n = DecoderSizes.of(llm.lm.config), pruner.tokens_per_layer(40, 6)
    assert n == [40, 40, 20, 10, 5, 5]
    tokens = [m + 6 for m in n]
    scoring = pruner.score_flops(tokens, sizes.heads, sizes.head_dim)
    rotary = counter.get_total_flops() - matmul_flops(sizes, tokens, head_rows=0) - scoring
    assert 0 <= rotary <= 2 * ids.shape[1] * sizes.head_dim  # the table of angles is a product too
