"""`positions=kept` where an image is several rows: crops with newlines and cut padding, tiles, frames of videos."""

import math

import pytest
import torch

from tests.test_positions import agree, pruned, whole
from tests.test_pruned_crops import SIZES, batch_of, cropped, filmed, load  # noqa: F401 (fixtures)
from zoo import registry
from zoo.registry import Cut, ImageFeatures


def places_of(model, kept):
    """Places of each token in the run of its image, and how many there would be, image by image."""
    layout, cuts = model.layout, kept.cuts
    runs = model.unpruned.gaps(kept).ahead.split([layout.count(c) for c in cuts])
    return [(run + torch.arange(len(run)), model.unpruned.whole.count(c)) for run, c in zip(runs, cuts, strict=True)]


def numbered(layout, values, cuts):
    """What a layout makes of rows of numbers (M, K), newlines -1: one list for each image."""
    newline = layout.newline
    wide = values.float().unsqueeze(-1).expand(-1, -1, newline.shape[0])
    with torch.no_grad():
        newline.fill_(-1)
        laid = layout(wide, cuts)[:, 0].round().long()
    return laid.split([layout.count(c) for c in cuts])


@pytest.mark.parametrize("words", [[], ["layout.kept_lines=true"]])
def test_kept_patches_of_crops_stand_where_the_unpruned_run_has_them(cropped, words):  # noqa: F811
    (model, processor), (full, _) = load(cropped, "divprune", "positions=kept", *words), load(cropped, "")
    texts, images = batch_of(processor)
    inputs = processor(images=images, text=texts)
    out = pruned(model, inputs)
    agree(
        out, inputs, whole(model, out, inputs["input_ids"], inputs["attention_mask"], places_of(model, out.image_kept))
    )
    kept, cuts, n = out.image_kept, out.image.cuts, out.image.tokens.shape[1]
    first = torch.arange(len(kept.keep)).unsqueeze(1) * n
    before = numbered(full.layout, first + torch.arange(n), cuts)
    runs = places_of(model, kept)
    model.layout.newline.data.fill_(-1)
    index = (first + kept.keep).float().unsqueeze(-1).expand(-1, -1, len(model.layout.newline))
    rows = model.layout._fewer(index, cuts, kept)
    with torch.no_grad():
        after = torch.cat(list(model.layout._images(rows, cuts)))[:, 0].round().long().split([len(r) for r, _ in runs])
    for (places, longest), run, unpruned in zip(runs, after, before, strict=True):
        assert longest == len(unpruned) and bool((places.diff() > 0).all())
        assert torch.equal(unpruned[places], run)  # the patch itself, or a newline


@pytest.mark.parametrize("name", ["divprune", "visionzip", "aim", "pool"])
def test_places_of_scaled_and_merged_crops_lie_in_their_run(filmed, name):  # noqa: F811
    words = {"visionzip": ["pruner.visionzip.score=column_mean"], "aim": ["pruner.aim.prune=false"]}.get(name, [])
    model, processor = load(filmed, name, "positions=kept", *words)
    for size in ((96, 96), (40, 90), (30, 30)):
        from tests import published_builders as build

        out = pruned(model, processor(images=[build.photo(*size)], text="<image> hi"))
        ((places, longest),) = places_of(model, out.image_kept)
        overview = out.image_kept.tokens.shape[1]
        assert int(places.min()) >= 0 and int(places.max()) == longest - 1  # the newline
        assert bool((places[:overview].diff() > 0).all()) and bool((places.diff() >= 0).all())
        assert out.logits.isfinite().all()
        columns = (out.passed.sequence.position_ids[0, -1] + 1).item()
        assert columns == out.logits.shape[1] - len(places) + longest


def test_frames_of_a_film_stand_where_their_frame_did(filmed, tmp_path):  # noqa: F811
    model, _ = load(filmed, "divprune", "positions=kept")
    n, k = model.vision.num_tokens, model.pruner["divprune"].num_tokens(model.vision.num_tokens)
    keep = torch.rand(3, n).argsort(1)[:, :k].sort(1).values
    cut = Cut(3, "frame", (32, 32))
    kept = ImageFeatures(torch.zeros(3, k, 4), None, keep=keep, places=keep, rows=(3,), cuts=(cut,))
    ((places, longest),) = places_of(model, kept)
    of_one = model.unpruned.whole._per_frame()
    assert longest == 3 * of_one + 1 and int(places[-1]) == longest - 1
    assert (places[:-1] // of_one).tolist() == [f for f in range(3) for _ in range(model.layout._per_frame())]


def test_cls_of_a_frame_stands_in_front_of_it():
    node = {"name": "frames", "cls": True}
    layout, full = (registry.build("layout", node, num_tokens=n) for n in (2, 9))
    rows, cuts = torch.tensor([[1, 5], [0, 8], [2, 3]]), (Cut(), Cut(2, "frame"))
    image = ImageFeatures(torch.zeros(3, 2, 4), None, keep=rows, places=rows)
    assert layout.places(rows, image, cuts, full).tolist() == [1, 5, 0, 1, 9, 10, 13, 14]


def test_a_smaller_grid_stands_on_the_corners_of_its_windows(make_model):
    """Pixel shuffle makes 2 x 2 tokens of a pooled grid of 4 x 4, and 4 x 4 of all patches."""
    vision = {"name": "timm", "image_size": 64, "patch_size": 8, "width": 32, "heads": 2, "depth": 2, "layer": -1}
    parts = {"vision": vision, "projector": {"name": "pixel_shuffle"}}
    layout = {"name": "tiles", "begin": "<image>", "end": "yes"}
    for more in ({}, {"layout": layout}):
        model, _ = make_model(positions="kept", pruner={"pool": {"name": "pool"}}, **parts, **more)
        image = ImageFeatures(torch.zeros(2, 16, 32), (4, 4), rows=(2,), cuts=(Cut(2, "crop"),))
        gaps = model.unpruned.gaps(image)
        assert (gaps.ahead + torch.arange(4).repeat(2)).tolist() == [0, 2, 8, 10] * 2
        assert gaps.behind.tolist() == [0, 0, 0, 12] * 2


def test_queries_that_read_all_tokens_leave_no_gap(make_model):
    pruner = {"divprune": {"name": "divprune"}}
    model, _ = make_model(positions="kept", pruner=pruner, projector={"name": "resampler", "num_queries": 4})
    assert model.config.positions == "kept" and model.unpruned is None
    assert math.prod(model.vision.grid) > 4
