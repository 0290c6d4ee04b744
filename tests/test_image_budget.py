"""One number of tokens for all rows of an image, crops or frames: HoloV's rows compete, HiPrune's get equal shares."""

import math
from dataclasses import replace

import pytest
import torch

from tests import test_left_out as left_out
from tests.conftest import sample
from tests.fusion_builders import features
from tests.test_holov import naive, runs
from zoo import registry
from zoo.composed.behind import run
from zoo.registry import Cut, ImageFeatures, ZooError


def build(name, **options):
    given = {"hiprune": {"object_layer": 1, "alpha": 0.5}, "holov": {"score": "cls"}}.get(name, {})
    return registry.build("pruner", {"name": name, "budget": "image", **given, **options}).eval()


def cut_image(rows=5, grid=(4, 6), seed=0):
    """Rows of one image, of which some get much more attention than others."""
    image = features(m=rows, grid=grid, dim=8, seed=seed)
    peaks = torch.randn(rows, math.prod(grid), generator=torch.Generator().manual_seed(seed))
    cuts = (Cut(rows, "crop"),)
    share = torch.linspace(0.2, 1, rows).unsqueeze(1)  # of the patches, [CLS] keeps the rest for itself
    scores = {"cls_attention": (2 * peaks).softmax(1) * share, "key_attention": (2 * peaks).softmax(1)}
    return replace(image, **scores, rows=(rows,), cuts=cuts, row_kind="crop")


def kept_of(out):
    return [sorted(out.keep[i][out.valid[i]].tolist()) for i in range(len(out.keep))]


@pytest.mark.parametrize("shape", ["run", "grid"])
@pytest.mark.parametrize(("rows", "total", "parts"), [(5, 40, 16), (3, 7, 4), (5, 110, 10), (2, 24, 1), (4, 3, 8)])
def test_crops_of_all_rows_compete_in_holov(rows, total, parts, shape):
    image, n = cut_image(rows), 24
    part = build("holov", num_keep=total, crops=parts, shape=shape)
    out = run(part, image)
    if shape == "run" or parts == 1:
        crops = runs(rows * n, parts)
    else:
        side = math.sqrt(rows * n / parts)
        lines, columns = (min(s, max(1, round(s / side))) for s in (4, 6))
        crops = [
            [r * n + y * 6 + x for y in ys for x in xs]
            for r in range(rows)
            for ys in runs(4, lines)
            for xs in runs(6, columns)
        ]
    wanted, _ = naive(image.tokens.flatten(0, 1), image.cls_attention.flatten(), crops, total, spread="image")
    assert [r * n + j for r, some in enumerate(kept_of(out)) for j in some] == wanted
    assert int(out.valid.sum()) == total == part.tokens_of_image(n, Cut(rows)) and out.valid.sum(
        1
    ).max() <= part.num_tokens(n)
    assert len(set(out.valid.sum(1).tolist())) > 1  # rows that [CLS] attends to less get less


@pytest.mark.parametrize(("rows", "total"), [(5, 40), (5, 43), (3, 7), (5, 3), (2, 47), (3, 72), (2, 100)])
def test_rows_get_equal_shares_in_hiprune(rows, total):
    image, n = cut_image(rows), 24
    out = run(build("hiprune", num_keep=total), image)
    counts = [min(n, total // rows + (r < total % rows)) for r in range(rows)]
    for r, k in enumerate(counts):
        alone = registry.build("pruner", {"name": "hiprune", "object_layer": 1, "alpha": 0.5, "num_keep": max(k, 1)})
        row = alone.eval()(image.picked(slice(r, r + 1)))
        wanted = [] if not k else list(range(n)) if row.keep is None else row.keep[0].tolist()
        assert kept_of(out)[r] == wanted
    assert (
        int(out.valid.sum()) == min(total, rows * n) == build("hiprune", num_keep=total).tokens_of_image(n, Cut(rows))
    )


@pytest.mark.parametrize("name", ["holov", "hiprune"])
def test_one_row_is_as_without_a_budget_of_the_image(name):
    image = cut_image(1)
    for options in ({"num_keep": 7}, {"keep_ratio": 0.4}):
        row = build(name, budget="row", **options)(image)
        out = run(build(name, **options), image)
        assert kept_of(out) == [row.keep[0].tolist()] and torch.equal(out.tokens[out.valid], row.tokens[0])
        order = out.rank[0][out.valid[0]].argsort()
        assert torch.equal(out.keep[0][out.valid[0]][order], row.keep[0][row.rank[0].argsort()])  # given up last first
    whole = build(name, keep_ratio=1.0)
    assert not whole.ragged and not whole.per_image and whole(image) is image
    assert build(name, keep_ratio=0.25).tokens_of_image(24, Cut(5)) == 30
    with pytest.raises(ZooError, match="No budget named 'images'"):
        build(name, budget="images")


# ---- in a whole model --------------------------------------------------------------------------------------------


def node(name, **options):
    given = {"holov": {"score": "column_mean", "crops": 6}, "hiprune": {"object_layer": 1, "alpha": 0.5}}[name]
    return {name: {"name": name, "budget": "image", "num_keep": 20, **given, **options}}


@pytest.mark.parametrize("positions", ["kept", "dense"])
@pytest.mark.parametrize("name", ["holov", "hiprune"])
@pytest.mark.parametrize("newline", [True, False])
def test_crops_and_frames_in_a_model(make_model, name, newline, positions):
    layout = {"name": "anyres", "pinpoints": [[32, 32], [64, 32], [64, 64]], "newline": newline}
    model, _ = make_model(pruner=node(name), layout=layout, positions=positions)
    cuts = [Cut(5, "crop", (64, 64), (2, 2)), Cut(1, "crop", (32, 32)), Cut(3, "frame", (32, 32))]
    pixels = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    both = model.encode_images(pixels, cuts)
    apart = [model.encode_images(x, [c]) for x, c in zip(pixels.split([5, 1, 3]), cuts, strict=True)]
    torch.testing.assert_close(both.tokens, torch.cat([x.tokens for x in apart]), atol=1e-6, rtol=1e-5)
    assert torch.equal(both.valid, torch.cat([x.valid for x in apart]))
    kept = [int(x.kept.valid.sum()) for x in apart]
    assert kept == [20, 16, 20] and isinstance(both.kept, ImageFeatures)  # the most of one row is 16


@pytest.mark.parametrize("positions", ["kept", "dense"])
@pytest.mark.parametrize("name", ["holov", "hiprune"])
def test_an_image_of_one_row_answers_as_without_a_budget_of_the_image(make_model, name, positions):
    options = {"num_keep": 6, "keep_ratio": 0.25}
    mine, processor = left_out.made(make_model, node(name, **options), positions=positions)
    row, short = left_out.made(make_model, node(name, **options, budget="row"), positions=positions)
    samples = [sample((left_out.QUESTIONS[i], "yes"), images=n, seed=i) for i, n in enumerate((1, 2))]
    for some in samples:
        found = []
        for model, made in ((mine, processor), (row, short)):
            model.generation_config.eos_token_id = None
            prompt = made.collate([made.encode_prompt(some, some.dialogs[0])])
            given = {k: prompt[k] for k in ("input_ids", "attention_mask", "pixel_values")}
            out = model.generate(**given, max_new_tokens=4, do_sample=False)
            found.append(out[0, prompt["input_ids"].shape[1] :].tolist())
        assert found[0] == found[1]


@pytest.mark.parametrize("name", ["holov", "hiprune"])
def test_training(make_model, name):
    given = (make_model, {name: node(name, num_keep=6)}, name)
    left_out.test_packed_rows_learn_what_each_learns_alone(*given, "kept")
