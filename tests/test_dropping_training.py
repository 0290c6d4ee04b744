"""Dropping inside decoders that train: labels follow the survivors, gradients, checkpointing, packed rows."""

import pytest
import torch

from tests.dropping_builders import dropper, embeds_of, labelled, llm_of, loss_of, padded, row, sequence
from zoo.fusion.pruners.inside.sequence import TokenSequence
from zoo.registry import IGNORE_INDEX
from zoo.registry.forward_pass import running
from zoo.registry.versions import checkpoint_activations


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_follow_the_survivors_and_gradients_are_those_of_hiding(side):
    rows = [row("titt", 8), row("titt", 4, 1), row("it", 6, 3)]
    ids, mask = padded(rows, side)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[mask.bool()] = torch.cat([labelled(r) for r in rows])
    grads, losses = [], []
    for hide in (False, True):
        llm = llm_of().train()
        dropper(llm, hide=hide)
        total, seen, _ = loss_of(llm, ids, mask, labels)
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
    dropper(llm, {0: 0.0})
    _, seen, passed = loss_of(llm, ids, torch.ones_like(ids), labels)
    assert passed.dropped.kept()[-1][0].nonzero()[:, 0].tolist() == [0, 1, 2, 10, 11, 12, 13]
    assert seen.tolist() == [[IGNORE_INDEX] * 4 + ids[0, -3:].tolist()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    ids = row("titt", 8)[None]
    labels = labelled(ids[0])[None]
    grads = []
    for on in (False, True):
        llm = llm_of("qwen2").train()
        if on:
            checkpoint_activations(llm.lm, {"use_reentrant": reentrant})
        dropper(llm)
        total, _, _ = loss_of(llm, ids, torch.ones_like(ids), labels)
        total.backward()
        grads.append([p.grad for p in llm.layers.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6 * float(a.abs().max() + 1)) for a, b in zip(*grads, strict=True))


def test_packed_samples_are_each_alone():
    from zoo.fusion.llm.attention import block_mask

    rows = [row("titt", 8), row("titit", 3, 1), row("tt", seed=2)]
    ids = torch.cat([*rows, torch.zeros(2, dtype=torch.long)])[None]
    labels = torch.cat([*[labelled(r) for r in rows], torch.full((2,), IGNORE_INDEX)])[None]
    segment = torch.cat([*[torch.full((len(r),), i) for i, r in enumerate(rows)], torch.full((2,), -1)])[None]
    positions = torch.cat([*[torch.arange(len(r)) for r in rows], torch.zeros(2, dtype=torch.long)])[None]
    mask = (segment >= 0).long()
    llm = llm_of()
    dropper(llm)
    embeds = torch.cat([*[embeds_of(llm, r[None]) for r in rows], llm.embed(ids[:, -2:])], 1)
    seq = sequence(ids, mask, labels, segment_ids=segment)
    with running(seq) as passed:
        out = llm.hidden(inputs_embeds=embeds, attention_mask=block_mask(mask, segment), position_ids=positions)
    hidden, left = out.last_hidden_state, passed.dropped.layers[-1]
    for i, alone in enumerate(rows):
        one = sequence(alone[None], None, labelled(alone)[None])
        with running(one):
            out = llm.hidden(inputs_embeds=embeds_of(llm, alone[None])).last_hidden_state
        where = (left.segment[0] == i) & left.seen[0]
        assert torch.allclose(hidden[0, where], out[0], atol=1e-5)
        assert torch.equal(seq.labels[0, where], one.labels[0])


def test_answers_ahead_of_a_later_image_are_not_learnt_where_tokens_are_dropped():
    """Which tokens stay is told by all that stands before the last answers: an earlier one would be told of itself."""
    image = torch.tensor([[0, 1, 0, 0, 1, 0, 0]]).bool()
    labels = torch.tensor([[-100, -100, -100, 5, -100, -100, 6]])
    tokens = TokenSequence.of(image, None, None, labels)
    assert tokens.labels.tolist() == [[-100, -100, -100, -100, -100, -100, 6]]
    assert tokens.voter.tolist() == [[True] * 6 + [False]]
