"""Dropping image tokens inside unmodified decoders, whatever pruner chooses them."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tests.fusion_builders import VOCAB, same_state, tiny_llm
from zoo.fusion.dropping import Dropper
from zoo.registry import IGNORE_INDEX, ZooError

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "gemma", "stablelm", "granite", "mixtral"]
FAMILIES += ["qwen2_moe"]
IMAGE = 5  # id that stands for an image token here
KEEP = {0: 0.75, 1: 0.5}  # share of the image tokens that stays, by the layer after which the others go


def llm_of(model_type="llama", attention="sdpa", layers=4, **options):
    """A decoder whose attention is sharp enough for a wrong mask to show."""
    llm = tiny_llm(model_type, attention=attention, num_layers=layers, **options)
    with torch.no_grad():
        for p in llm.parameters():
            p.mul_(6) if p.dim() > 1 else None
    return llm


def dropper(llm, keep=None, hide=False, attach=True):
    """Drop by the size of the keys: a score that no other token of the batch has a part in."""
    keep = KEEP if keep is None else keep
    made = Dropper(
        llm,
        "pruner 'test'",
        sorted(keep),
        lambda layer, total: (total * keep[layer]).long(),
        lambda given: given.key.float().norm(dim=-1).mean(1),
        hide,
    )
    if attach:
        made.attach()
    return made


def row(text="tiiit", images=6, seed=0):
    """Ids of a prompt: t stands for three words, i for an image."""
    g = torch.Generator().manual_seed(seed)
    return torch.cat(
        [torch.full((images,), IMAGE) if c == "i" else torch.randint(IMAGE + 1, VOCAB, (3,), generator=g) for c in text]
    )


def padded(rows, side="left"):
    """Stack rows; padding is id 0."""
    longest = max(map(len, rows))
    ids = torch.stack([F.pad(r, (longest - len(r), 0) if side == "left" else (0, longest - len(r))) for r in rows])
    return ids, (ids != 0).long()


def sequence(ids, mask=None, labels=None, **given):
    return SimpleNamespace(
        image_mask=ids == IMAGE, attention_mask=mask, position_ids=None, labels=labels, block_ids=None, **given
    )


def embeds_of(llm, ids):
    """Embeddings in which every image token is another vector, a function of its place in the row's image tokens."""
    embeds = llm.embed(ids)
    place = (ids == IMAGE).long().cumsum(1).float()[..., None] * torch.arange(1, embeds.shape[-1] + 1)
    return torch.where((ids == IMAGE)[..., None], place.sin() * 0.2, embeds)


def forward(llm, drop, ids, mask=None, **kwargs):
    if drop is not None:
        drop.begin(sequence(ids, mask))
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    return llm.hidden(inputs_embeds=embeds_of(llm, ids), attention_mask=mask, position_ids=positions, **kwargs)


def generate(llm, drop, ids, mask=None, **kwargs):
    if drop is not None:
        drop.begin(sequence(ids, mask))
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "output_scores": True, **kwargs}
    options |= {"return_dict_in_generate": True}
    with torch.no_grad():
        return llm.lm.generate(inputs_embeds=embeds_of(llm, ids), attention_mask=mask, **options)


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
    lengths = [a.past_key_values.get_seq_length(i) for i in range(4)]
    assert lengths == [19 + 4, 9 + 7 + 4, 9 + 5 + 4, 9 + 5 + 4]
    assert [b.past_key_values.get_seq_length(i) for i in range(4)] == [23] * 4
    assert [k.sum(1).tolist() for k in drop.kept()] == [[12, 19], [10, 16], [9, 14], [9, 14]]
    assert all(torch.equal(x, y) for x, y in zip(drop.kept(), hide.kept(), strict=True))
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
    together = forward(llm, drop, ids, mask).last_hidden_state
    seen = drop.run.layers[-1].seen
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
    drop.begin(sequence(ids))
    assert before and torch.equal(forward(llm, None, ids).last_hidden_state, wanted)
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
    forward(llm, drop, ids, mask)
    layers = drop.kept()
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
    forward(llm, drop, ids)
    left = torch.arange(ids.shape[1])
    for layer, many in ((0, 6), (1, 3)):
        images = ids[0, left] == IMAGE
        best = scores[layer][0].masked_fill(~images, -1).topk(many).indices
        left = left[(~images).index_fill(0, best, True)]
        assert torch.equal(left, drop.kept()[layer + 1][0].nonzero()[:, 0])


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "phi3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_sliding_windows_count_the_places_that_tokens_had(model_type, attention):
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    extra = {"sliding_window": 8} | (
        {"layer_types": kinds, "use_sliding_window": True} if model_type == "qwen2" else {}
    )
    ids, mask = padded([row("titt", 8), row("titit", 3, 1)])
    found = []
    for hide in (False, True):
        llm = llm_of(model_type, attention, extra=extra)
        found.append(generate(llm, dropper(llm, hide=hide), ids, mask, max_new_tokens=12))
    a, b = found
    assert torch.equal(a.sequences, b.sequences)
    assert all(torch.allclose(x, y, atol=3e-6, rtol=3e-6) for x, y in zip(a.scores, b.scores, strict=True))


def flash(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What a flash kernel makes of padding (B, S), computed plainly; it takes no other mask."""
    (b, h, q, _), s = query.shape, key.shape[2]
    assert attention_mask is None or attention_mask.shape == (b, s)
    mask = torch.ones(q, s, dtype=torch.bool).tril(s - q).expand(b, 1, q, s)
    if attention_mask is not None:
        mask = mask & attention_mask.bool()[:, None, None]
        mask = mask | ~mask.any(-1, keepdim=True)
    key, value = (x.repeat_interleave(h // x.shape[1], 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash_llm(monkeypatch):
    """Makes decoders that are set to FlashAttention, which is `flash` here."""
    from transformers import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)

    def made(model_type="qwen2", **options):
        llm = llm_of(model_type, **options)
        llm.lm.config._attn_implementation = "flash_attention_2"
        return llm

    return made


@torch.no_grad()
def test_flash_kernels_are_given_the_masks_they_take(flash_llm):
    rows = [row("tit", 8), row("titit", 4, 1)]
    for ids, mask in (padded(rows), (rows[1][None], None)):
        found = []
        for llm in (flash_llm(), llm_of("qwen2")):
            drop = dropper(llm)
            found.append((generate(llm, drop, ids, mask), drop.kept()))
        (a, kept), (b, same) = found
        assert torch.equal(a.sequences, b.sequences)
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a.scores, b.scores, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(kept, same, strict=True))


@torch.no_grad()
def test_flash_kernels_with_a_window_in_effect_are_refused(flash_llm):
    llm = flash_llm("mistral", extra={"sliding_window": 8})
    with pytest.raises(ZooError, match=r"sliding window of 8 the sequence of 24 exceeds.*attention=sdpa"):
        forward(llm, dropper(llm), row()[None])


@torch.no_grad()
def test_a_cache_goes_on_with_several_tokens_at_once():
    llm = llm_of()
    drop = dropper(llm)
    ids, mask = padded([row("tit", 8), row("titit", 4, 1)])
    more = row("tt", seed=9).expand(2, -1)
    whole = torch.cat([mask, torch.ones_like(more)], 1)
    states = []
    for chunks in ([6], [1, 2, 3]):
        cache = forward(llm, drop, ids, mask, use_cache=True).past_key_values
        at = 0
        for size in chunks:
            here = slice(ids.shape[1] + at, ids.shape[1] + at + size)
            out = llm.hidden(
                inputs_embeds=llm.embed(more[:, at : at + size]),
                attention_mask=whole[:, : here.stop],
                position_ids=(whole.cumsum(1) - 1)[:, here],
                past_key_values=cache,
                use_cache=True,
            )
            at += size
        states.append(out.last_hidden_state[:, -1])
    assert torch.allclose(*states, atol=1e-5)


def labelled(ids):
    """Labels on the last three words."""
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[-3:] = ids[-3:]
    return labels


def loss_of(llm, drop, ids, mask, labels):
    seq = sequence(ids, mask, labels)
    drop.begin(seq)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = llm.hidden(
        inputs_embeds=embeds_of(llm, ids), attention_mask=mask, position_ids=positions
    ).last_hidden_state
    logits = llm.head(hidden)[:, :-1]
    total = F.cross_entropy(logits.flatten(0, 1), seq.labels[:, 1:].flatten(), reduction="sum", ignore_index=-100)
    return total, seq.labels


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_follow_the_survivors_and_gradients_are_those_of_hiding(side):
    rows = [row("titt", 8), row("titt", 4, 1), row("it", 6, 3)]
    ids, mask = padded(rows, side)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[mask.bool()] = torch.cat([labelled(r) for r in rows])
    grads, losses = [], []
    for hide in (False, True):
        llm = llm_of().train()
        total, seen = loss_of(llm, dropper(llm, hide=hide), ids, mask, labels)
        assert int((seen != IGNORE_INDEX).sum()) == 9
        total.backward()
        losses.append(total)
        grads.append(torch.cat([p.grad.flatten() for p in llm.parameters()]))
    assert torch.allclose(*losses, rtol=1e-5)
    assert torch.allclose(*grads, atol=1e-5 * float(grads[0].abs().max()))


def test_a_label_right_after_an_image_keeps_its_predictor():
    ids = torch.cat([row("t"), row("i", 8), row("t", seed=1)])[None]
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -3:] = ids[:, -3:]
    llm = llm_of()
    drop = dropper(llm, {0: 0.0})
    _, seen = loss_of(llm, drop, ids, torch.ones_like(ids), labels)
    assert drop.kept()[-1][0].nonzero()[:, 0].tolist() == [0, 1, 2, 10, 11, 12, 13]
    assert seen.tolist() == [[IGNORE_INDEX] * 4 + ids[0, -3:].tolist()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    ids = row("titt", 8)[None]
    labels = labelled(ids[0])[None]
    grads = []
    for on in (False, True):
        llm = llm_of("qwen2").train()
        if on:
            llm.lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
        total, _ = loss_of(llm, dropper(llm), ids, torch.ones_like(ids), labels)
        total.backward()
        grads.append([p.grad for p in llm.layers.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6 * float(a.abs().max() + 1)) for a, b in zip(*grads, strict=True))


def test_packed_samples_are_each_alone():
    from zoo.fusion.attention import block_mask

    rows = [row("titt", 8), row("titit", 3, 1), row("tt", seed=2)]
    ids = torch.cat([*rows, torch.zeros(2, dtype=torch.long)])[None]
    labels = torch.cat([*[labelled(r) for r in rows], torch.full((2,), IGNORE_INDEX)])[None]
    segment = torch.cat([*[torch.full((len(r),), i) for i, r in enumerate(rows)], torch.full((2,), -1)])[None]
    positions = torch.cat([*[torch.arange(len(r)) for r in rows], torch.zeros(2, dtype=torch.long)])[None]
    mask = (segment >= 0).long()
    llm = llm_of()
    drop = dropper(llm)
    embeds = torch.cat([*[embeds_of(llm, r[None]) for r in rows], llm.embed(ids[:, -2:])], 1)
    seq = sequence(ids, mask, labels, segment_ids=segment)
    drop.begin(seq)
    hidden = llm.hidden(
        inputs_embeds=embeds, attention_mask=block_mask(mask, segment), position_ids=positions
    ).last_hidden_state
    left = drop.run.layers[-1]
    for i, alone in enumerate(rows):
        one = sequence(alone[None], None, labelled(alone)[None])
        drop.begin(one)
        out = llm.hidden(inputs_embeds=embeds_of(llm, alone[None])).last_hidden_state
        where = (left.segment[0] == i) & left.seen[0]
        assert torch.allclose(hidden[0, where], out[0], atol=1e-5)
        assert torch.equal(seq.labels[0, where], one.labels[0])


def test_what_would_go_wrong_is_refused():
    llm = llm_of()
    with pytest.raises(ZooError, match="at the output of layer 3; the LLM has the layers 0 to 3"):
        dropper(llm, {3: 0.5})
    drop = dropper(llm)
    with pytest.raises(ZooError, match="both drop tokens inside the LLM"):
        dropper(llm)
    seq = sequence(row()[None])
    seq.block_ids = torch.full((1, len(row())), 2)
    with pytest.raises(ZooError, match="Set pack=none"):
        drop.begin(seq)
    with pytest.raises(ZooError, match="needs a cache that grows"):
        generate(llm, drop, row()[None], cache_implementation="static")
    drop.begin(sequence(row()[None]))
    with pytest.raises(ZooError, match="was told of"):
        llm.hidden(inputs_embeds=embeds_of(llm, row()[None, :-1]))
    with pytest.raises(ZooError, match="'bloom'"):
        dropper(tiny_llm("bloom", num_kv_heads=0))
    llm.lm.base_model.compile()
    with pytest.raises(ZooError, match="compile=false"):
        drop.begin(sequence(row()[None]))
    moe = llm_of("mixtral", router_aux_coef=0.01).train()
    with pytest.raises(ZooError, match="router_aux_coef"):
        dropper(moe).begin(sequence(row()[None]))
