"""Dropping image tokens inside unmodified decoders while they answer, whatever pruner chooses them."""

import copy
from itertools import pairwise

import pytest
import torch

from tests.dropping_builders import IMAGE, dropper, embeds_of, forward, generate, kept, llm_of, padded, row, sequence
from tests.fusion_builders import same_state, tiny_llm
from zoo.registry import ZooError
from zoo.registry.forward_pass import running
from zoo.registry.versions import cache_argument, cache_of

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "gemma", "stablelm", "granite", "mixtral"]
FAMILIES += ["qwen2_moe"]


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_dropping_is_hiding_and_caches_are_shorter(model_type):
    ids, mask = padded([row("tit"), row("titit", 5, 1)])
    real, hidden = llm_of(model_type), llm_of(model_type)
    drop, hide = dropper(real), dropper(hidden, hide=True)
    a, b = generate(real, drop, ids, mask), generate(hidden, hide, ids, mask)
    assert torch.equal(a.sequences, b.sequences)
    assert all(torch.allclose(x, y, atol=3e-6, rtol=3e-6) for x, y in zip(a.scores, b.scores, strict=True))
    # 6 + 6 and 9 + 10 tokens; four and seven images tokens stay, then three and five
    lengths = [cache_of(a).get_seq_length(i) for i in range(4)]
    assert lengths == [19 + 4, 9 + 7 + 4, 9 + 5 + 4, 9 + 5 + 4]
    assert [cache_of(b).get_seq_length(i) for i in range(4)] == [23] * 4
    assert [k.sum(1).tolist() for k in kept(a)] == [[12, 19], [10, 16], [9, 14], [9, 14]]
    assert all(torch.equal(x, y) for x, y in zip(kept(a), kept(b), strict=True))
    plain = generate(llm_of(model_type), None, ids, mask)
    assert not torch.allclose(plain.scores[0], a.scores[0], atol=1e-3)  # what was dropped did matter


@pytest.mark.parametrize("attention", ["sdpa", "eager", "zoo_eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_is_each_sample_alone(attention, side):
    llm = llm_of("qwen2", attention)
    drop = dropper(llm)
    rows = [row("tit", 7), row("ttiitit", 4, 1), row("tt", seed=2), row("iit", 5, 3)]
    ids, mask = padded(rows, side)
    out = forward(llm, drop, ids, mask)
    together, seen = out.last_hidden_state, out.passed.dropped.layers[-1].seen
    for i, alone in enumerate(rows):
        out = forward(llm, drop, alone[None]).last_hidden_state[0]
        assert torch.allclose(together[i][seen[i]], out, atol=1e-5)
        images = int((alone == IMAGE).sum())
        assert len(out) == len(alone) - images + images // 2


@pytest.mark.parametrize("attention", ["sdpa", "eager", "zoo_eager"])
@torch.no_grad()
def test_generating_in_a_batch_is_generating_alone(attention):
    llm = llm_of("llama", attention)
    drop = dropper(llm)
    rows = [row("tit", 7), row("ttiitit", 4, 1), row("tt", seed=2)]
    together = generate(llm, drop, *padded(rows))
    for i, alone in enumerate(rows):
        out = generate(llm, drop, alone[None])
        assert torch.equal(together.sequences[i], out.sequences[0])
        assert all(torch.allclose(x[i], y[0], atol=1e-5) for x, y in zip(together.scores, out.scores, strict=True))


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 2.0},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=["beams", "beams_returned", "samples", "beam_samples"],
)
@torch.no_grad()
def test_beams_and_samples_are_those_of_hiding(how):
    ids, mask = padded([row("tit", 8), row("titit", 4, 1)])
    found = []
    for hide in (False, True):
        llm = llm_of("qwen3")
        torch.manual_seed(1)
        found.append(generate(llm, dropper(llm, hide=hide), ids, mask, **how).sequences)
    assert torch.equal(*found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_keeping_all_is_no_pruner_to_the_bit(attention):
    llm, plain = llm_of(attention=attention), llm_of(attention=attention)
    drop = dropper(llm, {0: 1.0, 1: 1.0, 2: 1.0})
    ids, mask = padded([row("tit"), row("titit", seed=1)])
    assert torch.equal(
        forward(llm, drop, ids, mask).last_hidden_state, forward(plain, None, ids, mask).last_hidden_state
    )
    a, b = generate(llm, drop, ids, mask), generate(plain, None, ids, mask)
    assert all(torch.equal(x, y) for x, y in zip(a.scores, b.scores, strict=True))


@torch.no_grad()
def test_what_has_no_image_or_no_announcement_is_left_alone():
    llm, plain = llm_of(), llm_of()
    drop = dropper(llm)
    ids, mask = padded([row("tt"), row("t")])
    wanted = forward(plain, None, ids, mask).last_hidden_state
    assert torch.equal(forward(llm, drop, ids, mask).last_hidden_state, wanted)
    ids = row()[None]
    wanted = forward(plain, None, ids).last_hidden_state
    assert torch.equal(forward(llm, None, ids).last_hidden_state, wanted)
    assert forward(llm, drop, ids).last_hidden_state.shape[1] < ids.shape[1]
    before = same_state(plain.state_dict(), llm.state_dict())
    drop.detach()
    assert before and torch.equal(forward(llm, drop, ids).last_hidden_state, wanted)
    assert not any(layer._forward_pre_hooks for layer in llm.layers)


@torch.no_grad()
def test_a_copy_drops_by_itself():
    llm = llm_of()
    dropper(llm)
    other = copy.deepcopy(llm)
    ids = row()[None]
    hook = next(iter(other.layers[0]._forward_pre_hooks.values())).func.__self__
    assert hook.llm is other and forward(other, hook, ids).last_hidden_state.shape[1] == 15
    assert forward(llm, None, ids).last_hidden_state.shape[1] == 24


@torch.no_grad()
def test_text_padding_and_what_predicts_stay_and_sets_are_nested():
    llm = llm_of()
    drop = dropper(llm, {0: 0.5, 1: 0.25, 2: 0.0})
    rows = [row("tit", 8), row("ti", 8, 1), row("iti", 4, 2)]
    ids, mask = padded(rows)
    layers = kept(forward(llm, drop, ids, mask))
    text = (ids != IMAGE) & mask.bool()
    assert all(bool((k & text).eq(text).all()) and not bool((k & ~mask.bool()).any()) for k in layers)
    assert all(bool((b <= a).all()) for a, b in pairwise(layers))
    assert [(k & (ids == IMAGE)).sum(1).tolist() for k in layers] == [[8, 8, 8], [4, 4, 4], [2, 2, 2], [0, 1, 1]]
    assert layers[-1][1:, -1].all()  # the last token predicts, image or not


@torch.no_grad()
def test_kept_are_the_best_among_those_that_were_left():
    llm = llm_of()
    drop, scores = dropper(llm, {0: 0.5, 1: 0.25}), []
    own = drop.score
    drop.score = lambda given: scores.append(own(given)) or scores[-1]
    ids = row("tit", 12)[None]
    layers = kept(forward(llm, drop, ids))
    left = torch.arange(ids.shape[1])
    for layer, many in ((0, 6), (1, 3)):
        images = ids[0, left] == IMAGE
        best = scores[layer][0].masked_fill(~images, -1).topk(many).indices
        left = left[(~images).index_fill(0, best, True)]
        assert torch.equal(left, layers[layer + 1][0].nonzero()[:, 0])


@torch.no_grad()
def test_a_cache_goes_on_with_several_tokens_at_once():
    llm = llm_of()
    drop = dropper(llm)
    ids, mask = padded([row("tit", 8), row("titit", 4, 1)])
    more = row("tt", seed=9).expand(2, -1)
    whole = torch.cat([mask, torch.ones_like(more)], 1)
    states = []
    for chunks in ([6], [1, 2, 3]):
        cache = cache_of(forward(llm, drop, ids, mask, use_cache=True))
        at = 0
        for size in chunks:
            here = slice(ids.shape[1] + at, ids.shape[1] + at + size)
            out = llm.hidden(
                inputs_embeds=llm.embed(more[:, at : at + size]),
                attention_mask=whole[:, : here.stop],
                position_ids=(whole.cumsum(1) - 1)[:, here],
                **cache_argument(cache),
                use_cache=True,
            )
            at += size
        states.append(out.last_hidden_state[:, -1])
    assert torch.allclose(*states, atol=1e-5)


def test_what_would_go_wrong_is_refused():
    llm = llm_of()
    with pytest.raises(ZooError, match="at the output of layer 3; the LLM has the layers 0 to 3"):
        dropper(llm, {3: 0.5})
    drop = dropper(llm)
    with pytest.raises(ZooError, match="both drop tokens inside the LLM"):
        dropper(llm)
    seq = sequence(row()[None])
    seq.block_ids = torch.full((1, len(row())), 2)
    with pytest.raises(ZooError, match="Set pack=none in the stage, and no pack_length"):
        drop.check(seq)
    with pytest.raises(ZooError, match="needs a cache whose layers grow"):
        generate(llm, drop, row()[None], cache_implementation="static")
    with pytest.raises(ZooError, match=r"expects .* positions"), running(sequence(row()[None])):
        llm.hidden(inputs_embeds=embeds_of(llm, row()[None, :-1]))
    with pytest.raises(ZooError, match="'bloom'"):
        dropper(tiny_llm("bloom", num_kv_heads=0))
    llm.lm.base_model.compile()
    with pytest.raises(ZooError, match="compile=false"):
        drop.check(sequence(row()[None]))
    moe = llm_of("mixtral", router_aux_coef=0.01).train()
    with pytest.raises(ZooError, match="router_aux_coef"):
        dropper(moe).check(sequence(row()[None]))


@torch.no_grad()
def test_dense_places_of_rows_that_are_padded_on_the_right_are_those_of_each_alone():
    """What two cuts leave of unlike rows: padding behind a row was given places below 0."""
    llm = llm_of()
    drop = dropper(llm, {0: 0.5, 1: 0.1})
    rows = [row("tttttt"), row("it", 12, seed=1), row("tiit", seed=2)]
    out = forward(llm, drop, *padded(rows, "right"), dense=True).last_hidden_state
    for found, one in zip(out, rows, strict=True):
        (alone,) = forward(llm, drop, one[None], torch.ones_like(one)[None], dense=True).last_hidden_state
        assert torch.allclose(found[: len(alone)], alone, atol=1e-4)
