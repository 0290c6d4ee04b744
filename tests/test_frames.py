"""Frames of videos: a tower of their own, their [CLS] in front of their patches, and numbers in words."""

import pytest
import torch

from zoo.fusion.layouts.tiles import in_words
from zoo.registry import Cut, ImageFeatures, ZooError, build

TOWER = {"name": "hf", "model_type": "clip", "image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2}
KINDS = ["frame", "image", "frame", "crop"]


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return build("vision", {**TOWER, "frame_tower": True}).eval()


def test_each_kind_of_row_goes_to_its_tower(tower):
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    need = frozenset({"prefix_tokens", "cls_attention", "keys"})
    both = tower(pixels, need=need, kinds=KINDS)
    for kinds, rows in ((["frame"] * 4, [0, 2]), (None, [1, 3])):
        alone = tower(pixels, need=need, kinds=kinds)
        for name in ("tokens", "prefix", "cls_attention", "keys"):
            torch.testing.assert_close(getattr(both, name)[rows], getattr(alone, name)[rows])
    assert not torch.allclose(tower(pixels).tokens, tower(pixels, kinds=["frame"] * 4).tokens, atol=1e-2)
    assert both.grid == (2, 2)


def test_a_tower_that_sees_nothing_still_meets_in_backward():
    tower = build("vision", {**TOWER, "frame_tower": True}).train()
    tower(torch.randn(2, 3, 16, 16), kinds=["image", "image"]).tokens.square().sum().backward()
    grads = {part: [p.grad for p in getattr(tower, part).encoder.parameters()] for part in ("tower", "frame_tower")}
    assert all(g is not None for gs in grads.values() for g in gs)
    assert all(g.abs().sum() == 0 for g in grads["frame_tower"]) and any(g.abs().sum() > 0 for g in grads["tower"])


def test_cls_stands_before_the_patches_of_frames_alone():
    layout = build("layout", {"name": "frames", "cls": True}, num_tokens=2)
    assert layout.needs == {"prefix_tokens"}
    cuts = [Cut(2, "frame"), Cut(1, "image")]
    assert [layout.count(c) for c in cuts] == [6, 2]
    image = ImageFeatures(torch.arange(6.0).view(3, 2, 1), None, prefix=torch.tensor([[[-1.0]], [[-2.0]], [[-3.0]]]))

    def double(seen):
        return seen.tokens * 2

    laid = layout(layout.project(image, double, cuts), cuts).flatten()
    assert laid.tolist() == [-2.0, 0.0, 2.0, -4.0, 4.0, 6.0, 8.0, 10.0]
    plain = build("layout", {"name": "frames"}, num_tokens=2)
    assert not plain.needs and plain.count(cuts[0]) == 4
    assert plain(plain.project(image, double, cuts), cuts).flatten().tolist() == [0, 2, 4, 6, 8, 10]


def test_cls_of_frames_needs_an_encoder_that_has_one():
    from zoo.composed.assembly import assemble

    llm = {"name": "hf", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}
    slots = {"projector": {"name": "mlp"}, "layout": {"name": "frames", "cls": True}, "llm": llm}
    with torch.device("meta"):
        assemble({**slots, "vision": TOWER}, vocab_size=300)
        with pytest.raises(ZooError, match="layout 'frames' needs prefix_tokens, but vision 'hf' does not give it"):
            assemble({**slots, "vision": {**TOWER, "model_type": "siglip"}}, vocab_size=300)


@pytest.mark.parametrize(
    ("number", "words"),
    [(1, "one"), (8, "eight"), (13, "thirteen"), (20, "twenty"), (64, "sixty-four"), (100, "one hundred"),
     (101, "one hundred and one"), (342, "three hundred and forty-two"), (1000, "1000")],
)  # fmt: skip
def test_numbers_in_words(number, words):
    assert in_words(number) == words


def test_cls_refuses_a_projector_of_grids_by_what_it_takes(make_model):
    """Its own message was hidden by that of the projector, which named a grid that was there."""
    parts = {"layout": {"name": "frames", "cls": True}, "projector": {"name": "pixel_shuffle"}}
    model, _ = make_model(**parts)
    assert model.encode_images(torch.zeros(1, 3, 32, 32), [Cut(1)]).tokens.shape[0] == 4, "images have no [CLS]"
    with pytest.raises(ZooError, match="one by one: mlp or linear"):
        model.encode_images(torch.zeros(2, 3, 32, 32), [Cut(2, "frame")])
