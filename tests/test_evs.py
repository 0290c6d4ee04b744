"""EVS against a twin written from its equations, and the invariants of its specification."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.video_builders import video
from zoo.registry import Cut, ZooError, build


def evs(**options):
    return build("pruner", {"name": "evs", **options})


def twin(tokens, q, still=1e-6, after_first=False):
    """Index for index: which of the tokens (T, P, C) stay, in loops."""
    frames, places, _ = tokens.shape
    keep = places + int((frames - 1) * places * (1 - q)) if after_first else max(places, int(frames * places * (1 - q)))
    ranked = []
    for t in range(frames):
        for p in range(places):
            if t == 0:
                change = math.inf
            else:
                a, b = tokens[t, p].float(), tokens[t - 1, p].float()
                change = 1 - float(a @ b / (a.norm().clamp(min=1e-8) * b.norm().clamp(min=1e-8)))
                change = 0.0 if change < still else change
            ranked.append((-change, t, p))
    stays = torch.zeros(frames, places, dtype=torch.bool)
    for _, t, p in sorted(ranked)[:keep]:
        stays[t, p] = True
    return stays


def marks(part, image):
    kept = part(image)
    return torch.ones(image.tokens.shape[:2]).bool() if kept.valid is None else kept.valid


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.7, 0.75, 0.9])
@pytest.mark.parametrize("frames", [1, 2, 3, 9])
def test_it_is_the_rule_spelt_out(frames, q):
    image = video(frames, seed=frames)
    for after_first in (False, True):
        part = evs(q=q, count="after_first" if after_first else "total")
        found = marks(part, image)
        assert torch.equal(found, twin(image.tokens, q, after_first=after_first))
        assert int(found.sum()) == part.tokens_of_image(16, image.cuts[0]) >= 16 and bool(found[0].all())


def test_the_count_is_that_of_double_precision_truncated():
    cut = Cut(100, "frame")
    assert evs(q=0.9).tokens_of_image(16, cut) == 159 and evs(keep_ratio=0.1).tokens_of_image(16, cut) == 160
    assert evs(q=0.7).tokens_of_image(196, Cut(32, "frame")) == int(32 * 196 * (1 - 0.7))
    # As many frames as 1 / (1 - q) pay for the first alone.
    for q, frames in ((0.7, 3), (0.75, 4)):
        assert [evs(q=q).tokens_of_image(16, Cut(n, "frame")) for n in (1, frames, frames + 1)][:2] == [16, 16]
        assert evs(q=q).tokens_of_image(16, Cut(frames + 1, "frame")) > 16
    assert evs(q=0.7).tokens_of_image(16, Cut(5, "crop")) == 80


def test_all_are_kept_without_a_share_to_remove_and_images_always():
    image = video(4)
    assert evs(q=0.0)(image) is image and evs(keep_ratio=1.0)(image) is image
    assert evs(q=0.9)(video(1)).valid is None
    still = replace(image, row_kind="crop")
    assert evs(q=0.9)(still) is still


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_static_video_keeps_its_first_frames_in_order(dtype):
    image = video(1, dim=64)
    image = replace(image, tokens=image.tokens.repeat(6, 1, 1) * torch.rand(6, 16, 1).add(0.5))  # and of any length
    image.tokens = image.tokens.to(dtype)
    found = marks(evs(q=0.6, still=1e-4 if dtype == torch.bfloat16 else 1e-6), image)
    assert found.flatten().long().diff().max() == 0 and int(found.sum()) == int(96 * (1 - 0.6))


def test_sets_are_nested_and_follow_places_and_cuts_of_scenes():
    image = video(8, seed=3)
    sets = [marks(evs(q=q), image) for q in (0.2, 0.4, 0.6, 0.8)]
    assert all(bool((less <= more).all()) for more, less in pairwise(sets))
    turned = marks(evs(q=0.6), replace(image, tokens=image.tokens.flip(1)))
    assert torch.equal(turned.flip(1), sets[2])
    scene = image.tokens.clone()
    scene[1:] = scene[:1] + 0.1 * image.tokens[1:] * torch.rand(7, 16, 1)
    scene[5:] = -scene[5:]  # all places of frame 5 are new
    found = marks(evs(q=0.7), replace(image, tokens=scene))
    assert bool(found[5].all()) and int(found.sum()) == int(128 * (1 - 0.7))


def test_what_rounding_makes_of_static_places_decides_in_the_release_alone():
    g = torch.Generator().manual_seed(0)
    first = torch.randn(16, 48, generator=g)
    tokens = torch.stack([first * (1 + 0.3 * i) for i in range(8)])  # cosines are 1 up to rounding
    image = video(8, dim=48)
    ours, theirs = (marks(evs(q=0.5, still=s), replace(image, tokens=tokens)) for s in (1e-6, 0.0))
    assert int(ours.sum()) == int(theirs.sum()) == 64 and bool(ours[:4].all()) and not torch.equal(ours, theirs)


def test_a_slow_drift_adds_up_since_the_last_token_kept():
    """One place turns by 3 degrees a frame, another by 40 degrees once: the frame before shows the second alone."""
    angle = torch.zeros(20, 4)
    angle[:, 1] = torch.arange(20) * 3.0
    angle[10:, 2] = 40.0
    tokens = torch.stack([angle.deg2rad().cos(), angle.deg2rad().sin()], -1)
    image = replace(video(20, 4, 2, grid=(2, 2)), tokens=tokens)
    part = evs(q=0.9, reference="last_kept")  # 7 of 80: the first frame, and three more
    found = marks(part, image)
    assert int(found.sum()) == part.tokens_of_image(4, Cut(20, "frame")) == 7 and bool(found[0].all())
    later = found[1:].sum(0).tolist()
    assert later == [0, 2, 1, 0] and bool(found[10, 2])
    assert found[:, 1].nonzero().flatten().tolist() == [0, 7, 14]  # 21 degrees each, and 40 of the other place
    for seed in range(6):  # exactly as many as counted, whatever the video
        image = video(9, seed=seed)
        part = evs(q=0.1 + 0.14 * seed, reference="last_kept")
        assert int(marks(part, image).sum()) == part.tokens_of_image(16, image.cuts[0])


def test_scores_are_the_changes():
    image = video(4)
    scores = evs().scores(image)
    assert scores.shape == (4, 16) and bool((scores[0] == 2).all()) and evs().scores(video(1)) is None
    cosine = torch.cosine_similarity(image.tokens[1:], image.tokens[:-1], dim=-1)
    torch.testing.assert_close(scores[1:], 1 - cosine, atol=1e-6, rtol=0)


def test_options_and_presets():
    for wrong in ({"q": 1.0}, {"q": -0.1}, {"still": -1.0}, {"count": "all"}, {"reference": "next"}, {"keep_ratio": 0}):
        with pytest.raises(ZooError):
            evs(**wrong)
    part = build("pruner", {"name": "evs", "preset": "nemotron_nano_v2_vl"})
    assert (part.config.q, part.config.still) == (0.7, 0.0)
