"""DyCoke's first stage against a twin written from its equations, and the invariants of its specification."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.video_builders import inputs_of, rows_of, video, video_model
from zoo.registry import Cut, ZooError, build

RELEASED = {"order": "released", "last_group": "released", "odd": "drop"}


def dycoke(**options):
    return build("pruner", {"name": "dycoke", **options})


def released(tokens, k):
    """The sequence of the code, in loops over its own pairs and fours: (frame, place) of each token that is left."""
    frames, places, _ = tokens.shape
    m = int((1 - k) * places)

    def thinned(t, other):
        cosine = torch.cosine_similarity(tokens[t].float(), tokens[other].float(), dim=-1)
        return sorted(range(places), key=lambda p: (float(cosine[p]), p))[:m]

    left = {t: list(range(places)) for t in range(frames)}
    for t in range(0, frames - 1, 2):
        left[t + 1] = thinned(t + 1, t)
    for t in range(0, frames - 4, 4):
        if t + 2 < frames:
            left[t + 2] = thinned(t + 2, t)
    if frames % 2:
        del left[frames - 1]
    return [(t, p) for t, some in left.items() for p in some]


def sequence(part, image):
    """(frame, place) of each token that stays, in the order of the columns."""
    kept = part(image)
    frames, places = image.tokens.shape[:2]
    valid = torch.ones(frames, places).bool() if kept.valid is None else kept.valid
    place = torch.arange(places).expand(frames, -1) if kept.keep is None else kept.keep
    at = place.unsqueeze(-1).expand_as(image.tokens)
    assert torch.equal(kept.tokens, image.tokens.gather(1, at))  # unchanged, at most permuted
    return [(t, int(place[t, c])) for t in range(frames) for c in range(places) if valid[t, c]]


@pytest.mark.parametrize("k", [0.0, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("frames", [5, 6, 7, 8, 9, 12])
def test_it_is_the_release_token_for_token(frames, k):
    image = video(frames, seed=frames)
    part = dycoke(k=k, **RELEASED)
    found = sequence(part, image)
    assert found == released(image.tokens, k)
    assert len(found) == part.tokens_of_image(16, image.cuts[0])
    raster = sequence(dycoke(k=k, **{**RELEASED, "order": "raster"}), image)
    assert raster == sorted(found)


def test_the_count_of_the_release():
    cut, part = Cut(32, "frame"), dycoke
    for k, count in ((0.7, 3098), (0.5, 4018), (0.9, 2201)):
        assert part(k=k, **RELEASED).tokens_of_image(196, cut) == count
        n, m = 8, int((1 - k) * 196)
        assert part(k=k, **RELEASED).tokens_of_image(196, cut) == (n + 1) * 196 + (3 * n - 1) * m
        assert part(k=k).tokens_of_image(196, cut) == n * 196 + 3 * n * m
    assert part(k=0.9).thinned(10) == 0 and part(keep_ratio=0.1).thinned(10) == 1 and part(k=0.7).thinned(196) == 58
    assert part(k=0.7).tokens_of_image(16, Cut(5, "crop")) == 80 and part(k=0.7).tokens_of_image(16, Cut(1)) == 16


@pytest.mark.parametrize("frames", range(1, 11))
def test_our_defaults_thin_every_group_alike_and_take_any_length(frames):
    image, part = video(frames, seed=1), dycoke(keep_ratio=0.5)
    found = sequence(part, image)
    assert found == sorted(found) and len(found) == part.tokens_of_image(16, image.cuts[0])
    assert Counter(t for t, _ in found) == {t: 16 if t % 4 == 0 else 8 for t in range(frames)}
    assert part.references(7) == [-1, 0, 0, 2, -1, 4, 4]


def test_nothing_removed_is_the_image_and_images_are_left_alone():
    image = video(6)
    assert dycoke(k=0.0)(image) is image
    for kind, one in (("crop", image), ("frame", video(1)), ("image", video(1))):
        given = replace(one, row_kind=kind)
        assert dycoke(k=0.9)(given) is given
    assert Counter(sequence(dycoke(k=0.0, **RELEASED), image)) == Counter((t, p) for t in range(6) for p in range(16))


def test_sets_are_nested_and_lengths_of_tokens_do_not_count():
    image = video(8, seed=2)
    sets = [set(sequence(dycoke(k=k), image)) for k in (0.2, 0.4, 0.6, 0.8)]
    assert sets[0] > sets[1] > sets[2] > sets[3]
    scaled = replace(image, tokens=image.tokens * torch.rand(8, 16, 1).add(0.5))
    assert set(sequence(dycoke(k=0.6), scaled)) == sets[2]


def test_a_static_video_keeps_first_places():
    image = video(1, dim=64)
    image = replace(video(4, dim=64), tokens=image.tokens.repeat(4, 1, 1) * torch.rand(4, 16, 1).add(0.5))
    assert sequence(dycoke(keep_ratio=0.25), image) == [(0, p) for p in range(16)] + [
        (t, p) for t in (1, 2, 3) for p in range(4)
    ]


def test_scores_options_and_presets():
    image = video(6)
    scores = dycoke().scores(image)
    assert bool((scores[0] == 2).all() and (scores[4] == 2).all()) and dycoke().scores(video(1)) is None
    cosine = torch.cosine_similarity(image.tokens[2], image.tokens[0], dim=-1)
    torch.testing.assert_close(scores[2], 1 - cosine, atol=1e-6, rtol=0)
    for wrong in ({"k": 1.1}, {"order": "cosine"}, {"odd": "half"}, {"last_group": "whole"}, {"keep_ratio": 0}):
        with pytest.raises(ZooError):
            dycoke(**wrong)
    part = build("pruner", {"name": "dycoke", "preset": "as_released"})
    assert (part.config.k, part.config.odd, part.config.order) == (0.7, "drop", "released")


def test_kept_positions_put_the_order_of_the_release_back(make_model):
    logits = {}
    for positions in ("kept", "dense"):
        for order in ("raster", "released"):
            node = {"name": "dycoke", "k": 0.5, "order": order}
            model, processor = video_model(make_model, node, "keep", positions)
            with torch.no_grad():
                logits[positions, order] = model(**inputs_of(processor.collate(rows_of(processor)))).logits
    torch.testing.assert_close(logits["kept", "raster"], logits["kept", "released"], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(logits["dense", "raster"], logits["dense", "released"], atol=1e-3)
