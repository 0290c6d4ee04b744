"""The anyres layout: counts are what comes out, lines end with the newline, padding is cut off."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.fusion_builders import features
from zoo.fusion.layouts.anyres import AnyRes, AnyResConfig
from zoo.fusion.layouts.crop_order import fewer
from zoo.registry import Cut, ZooError, build

PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]


def layout(text_dim=6, grid=(2, 2), num_tokens=4, image_size=(16, 16), encoder_grid=(2, 2), pruned=True, **options):
    given = {"image_size": image_size, "encoder_grid": encoder_grid, "pruned": pruned, "grid": grid}
    node = {"name": "anyres", "pinpoints": PINPOINTS, **options}
    return build("layout", node, text_dim=text_dim, num_tokens=num_tokens, **given)


def cut(size, made):
    return Cut(1 + math.prod(made._crops(size)), "crop", size)


@pytest.mark.parametrize("options", [{}, {"newline": False}, {"max_crops": 1}])
def test_as_many_tokens_come_out_as_were_counted(options):
    made, counts = layout(**options), layout(text_dim=None, **options)
    generator = np.random.default_rng(0)
    for _ in range(60):
        size = tuple(int(n) for n in generator.integers(1, 80, 2))
        one = cut(size, made)
        out = made(torch.randn(one.rows, 4, 6), [one])
        assert len(out) == counts.count(one) <= counts.num_tokens(4)


def test_no_image_has_more_tokens_than_the_largest_count_and_one_has_as_many():
    """An image that fills its resolution in one direction only may have a larger grid than one that fills it."""
    for pinpoints, side, patches, more in (NEXT, ONEVISION):
        config, given = AnyResConfig(pinpoints=pinpoints, **more), {"image_size": (side, side), "text_dim": None}
        made = AnyRes(config, grid=(patches, patches), num_tokens=patches**2, **given)
        whole, step = [tuple(p) for p in pinpoints], 2 * side // patches
        sizes = [(h - n, w) for h, w in whole for n in range(0, h - 20, step)]
        sizes += [(h, w - n) for h, w in whole for n in range(0, w - 20, step)]
        most = max(made.count(cut(size, made)) for size in sizes)
        assert 0.99 * made.num_tokens(0) <= most <= made.num_tokens(0)
        assert made.num_tokens(0) == {24: 2928, 27: 8829}[patches]  # 8154 where a resolution is filled


@pytest.mark.parametrize("grid", [(4, 2), (2, 4), (3, 3)])
def test_a_large_grid_is_scaled_to_the_tokens_of_so_many_crops(grid):
    n = math.prod(grid)
    made = layout(grid=grid, num_tokens=n, encoder_grid=grid, newline=False, max_crops=1)
    _, lines, columns = made._shape(cut((32, 32), made))  # of four crops
    assert n / 2 <= lines * columns <= n, (lines, columns)


@pytest.mark.parametrize("grid", [(2, 2), (6, 2), (2, 6), (6, 3)])
def test_a_picture_that_fills_its_crops_loses_nothing_whatever_the_shape_of_patches(grid):
    made = layout(grid=grid, num_tokens=math.prod(grid), encoder_grid=grid)
    for size in PINPOINTS:
        one = cut(size, made)
        assert made._shape(one) == ((0, 0), *(a * n for a, n in zip(made._crops(size), grid, strict=True)))
    (top, left), lines, columns = made._shape(cut((8, 32), made))  # half of 16 x 32, in the middle
    assert left == 0 and columns == 2 * grid[1] and top == grid[0] // 4 and lines == grid[0] - 2 * top


@pytest.mark.parametrize("kept_lines", [False, True])
@pytest.mark.parametrize("size", [(1, 90), (90, 1), (1, 1)])
def test_of_a_picture_thinner_than_a_patch_the_overview_stays(size, kept_lines):
    """Its crops show padding alone; with a pruner, too, and with kept positions."""
    for kept in (4, 3):
        whole = layout(pruned=False)
        made = layout(grid=None if kept < 4 else (2, 2), num_tokens=kept, kept_lines=kept_lines)
        one = cut(size, made)
        image = features(m=one.rows, grid=(2, 2))
        image = image.take_best(torch.arange(4)[:kept].expand(one.rows, -1)).placed(4) if kept < 4 else image
        image = replace(image, tokens=image.tokens[..., :6])
        out = made(made.project(image, lambda i: i.tokens, [one]), [one])
        assert len(out) == made.count(one) >= kept
        if kept < 4:
            places = made.places(image.places, image, [one], whole)
            assert len(places) == len(out) and 0 <= int(places.min()) <= int(places.max()) <= whole.count(one)


def test_crops_stand_where_they_were_in_the_image():
    """A loop over lines and columns of the joined grid, token by token."""
    made = layout()
    one = cut((20, 40), made)  # 16 x 32: two crops side by side
    tokens = torch.arange(one.rows * 4.0).view(one.rows, 4, 1).expand(-1, -1, 6)
    out = made(tokens, [one])[:, 0]
    expected = tokens[0, :, 0].tolist()
    for line in range(2):
        for column in range(4):
            crop, inside = 1 + column // 2, column % 2
            expected.append(tokens[crop, 2 * line + inside, 0].item())
        expected.append(made.newline[0].item())
    assert out.tolist() == pytest.approx(expected)


def test_lines_that_show_padding_only_are_cut_off():
    made = layout(grid=(4, 4), newline=False)
    made.tokens = 16
    thin = Cut(3, "crop", (4, 32))  # of 16 x 32, where it fills 4 lines of 16 pixels in the middle
    tokens = torch.arange(48.0).view(3, 16, 1).expand(-1, -1, 6)
    joined = made(tokens, [thin])[16:, 0]
    middle = [*range(20, 24), *range(36, 40), *range(24, 28), *range(40, 44)]
    # 8 columns wide; one of four lines shows the picture, and padding of half a line on each side is kept
    assert joined.tolist() == [float(n) for n in (middle if len(joined) == 16 else middle[:8])]


def test_images_stand_behind_each_other_and_one_row_ends_with_a_newline():
    made = layout()
    cuts = [Cut(1, "image", (16, 16)), cut((40, 16), made)]
    tokens = torch.randn(sum(c.rows for c in cuts), 4, 6)
    out = made(tokens, cuts)
    assert torch.equal(out[:4], tokens[0]) and torch.equal(out[4], made.newline)
    assert torch.equal(out[5:9], tokens[1])


def test_rows_that_a_projector_made_of_all_are_joined_as_they_are():
    made = layout(grid=None, pruned=False)
    one = Cut(3, "crop", (16, 32))
    tokens = torch.randn(3, 4, 6)
    assert torch.equal(made(tokens, [one])[:-1], tokens.flatten(0, 1))
    assert made.count(one) == 13


def test_gradients_reach_every_token_that_is_shown():
    made = layout()
    one = cut((32, 32), made)
    tokens = torch.randn(one.rows, 4, 6, requires_grad=True)
    made(tokens, [one]).sum().backward()
    assert (tokens.grad == 1).all() and (made.newline.grad == 4).all()


def test_mistakes_are_said():
    with pytest.raises(ZooError, match="pinpoints must be pairs"):
        layout(pinpoints=[[1, 2, 3]])
    for made in (layout(), layout(grid=None, encoder_grid=(4, 4))):
        with pytest.raises(ZooError, match="1 crops do not fill 2 x 2"):
            made(torch.randn(2, 4, 6), [Cut(2, "crop", (32, 32))])


# ---- behind a pruner ---------------------------------------------------------------------------------------------

# What the published checkpoints have: pinpoints, pixels and patches of a crop.
NEXT = ([[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]], 336, 24, {})
ONEVISION = ([[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)], 384, 27, {"max_crops": 9})


@pytest.mark.parametrize("kept_lines", [False, True])
@pytest.mark.parametrize(("pinpoints", "side", "patches", "more"), [NEXT, ONEVISION], ids=["next", "onevision"])
def test_a_pruned_image_takes_its_share_of_the_unpruned_one_and_never_more(pinpoints, side, patches, more, kept_lines):
    config = AnyResConfig(pinpoints=pinpoints, kept_lines=kept_lines, **more)
    n, generator = patches**2, np.random.default_rng(0)
    given = {"text_dim": None, "image_size": (side, side), "encoder_grid": (patches, patches)}
    whole = AnyRes(config, grid=(patches, patches), num_tokens=n, **given)
    sizes = [(480, 640), (1080, 1920), (100, 1000), (4000, 3000), *generator.integers(20, 3000, (150, 2)).tolist()]
    for ratio in (0.95, 0.75, 0.5, 0.25, 0.1, 1 / n):
        some = AnyRes(config, grid=None, num_tokens=round(n * ratio), **given)
        for size in sizes:
            one = Cut(1 + math.prod(some._crops(tuple(size))), "crop", tuple(size))
            got, full = some.count(one), whole.count(one)
            lines = whole._shape(one)[1] if kept_lines else 1
            assert got <= full and abs(got - lines - round(n * ratio) / n * (full - whole._shape(one)[1])) <= 1
        assert some.num_tokens(some.tokens) <= whole.num_tokens(n)


@pytest.mark.parametrize("frames", ["keep", "bilinear", "average", "max"])
def test_a_pruned_video_takes_its_share_of_the_unpruned_one(frames):
    given = {"text_dim": 24, "encoder_grid": (5, 4), "frames": frames}
    whole, film = layout(grid=(5, 4), num_tokens=20, **given), Cut(3, "frame", (16, 16))
    for kept in (1, 7, 15, 20):
        some = layout(grid=None, num_tokens=kept, **given)
        each = max(1, int(kept * {"keep": 20, "bilinear": 6}.get(frames, 4) / 20 + 0.5))
        assert some.count(film) == 3 * each + (frames == "bilinear") <= whole.count(film)
        image = features(m=3, grid=(5, 4)).take_best(torch.rand(3, 20).argsort(dim=1)[:, :kept])
        tokens = some.project(image, lambda i: i.tokens, [film])
        out = some(tokens, [film])
        best = torch.stack([image.tokens[i, sorted(image.rank[i].argsort()[:each].tolist())] for i in range(3)])
        assert torch.equal(out[: 3 * each], best.flatten(0, 1)) and len(out) == some.count(film)


def left_of(made, one, keep, rank):
    """Of the tokens kept of an image's crops, those that stay, in order: loops over crops, patches and lines."""
    (top, aside), lines, columns = made._shape(one)
    rows, across = made._crops(one.size)
    (h, w), k = made.whole, keep.shape[1]
    found = []
    for crop in range(1, len(keep)):
        for at, patch in enumerate(keep[crop].tolist()):
            line, column = (crop - 1) // across * h + patch // w, (crop - 1) % across * w + patch % w
            inside = top <= line < rows * h - top and aside <= column < across * w - aside
            found.append((not inside, int(rank[crop, at]), crop, line, column, crop * k + at))
    stay = sorted(found)[: int(k * lines * columns / (h * w) + 0.5)]
    order = list(range(k))
    if not made.config.kept_lines or made.newline is None:
        return order + [token[-1] for token in sorted(stay, key=lambda token: token[3:5])]
    high = rows * h - 2 * top
    for number in range(lines):
        here = [t for t in stay if min(max(t[3] - top, 0), high - 1) * lines // high == number]
        order += [*(t[-1] for t in sorted(here, key=lambda token: token[3:5])), -1]
    return order


@pytest.mark.parametrize("max_crops", [0, 1])
@pytest.mark.parametrize("newline", [False, True])
@pytest.mark.parametrize("kept_lines", [False, True])
def test_of_what_was_kept_the_best_on_the_picture_stay_in_the_order_of_the_joined_grid(newline, kept_lines, max_crops):
    options = {"newline": newline, "kept_lines": kept_lines, "max_crops": max_crops}
    made = layout(text_dim=24, grid=None, num_tokens=7, encoder_grid=(4, 4), **options)
    cuts = [cut((20, 40), made), Cut(1, "image", (16, 16)), cut((60, 21), made), cut((33, 30), made)]
    image = features(m=sum(c.rows for c in cuts), grid=(4, 4))
    kept = build("pruner", {"name": "fastervlm", "num_keep": 7})(image)
    assert torch.equal(kept.cls_attention.argsort(dim=1, descending=True).argsort(dim=1), kept.rank)
    out, at, row = made(made.project(kept, lambda i: i.tokens, cuts), cuts), 0, 0
    for one in cuts:
        own = kept.tokens[row : row + one.rows].flatten(0, 1)
        order = list(range(7))
        if one.kind == "crop":
            order = left_of(made, one, *(t[row : row + one.rows] for t in (kept.keep, kept.rank)))
        lines = one.kind == "crop" and newline and kept_lines
        want = torch.cat([own, made.newline[None]])[order] if newline else own[order]
        want = torch.cat([want, made.newline[None]]) if newline and not lines else want
        assert made.count(one) == len(want)
        assert torch.equal(out[at : at + len(want)], want)
        at, row = at + len(want), row + one.rows
    assert at == len(out) and made.num_tokens(7) >= max(map(made.count, cuts))


def test_merged_tokens_on_the_picture_go_before_those_on_padding():
    made = layout(text_dim=24, grid=None, num_tokens=6, encoder_grid=(4, 6), image_size=(16, 24))
    one = Cut(3, "crop", (4, 44))  # of 16 x 48: its middle lines alone show the picture
    merged = build("pruner", {"name": "aim"})(features(m=3, grid=(4, 6)))
    left = made(made.project(merged, lambda i: i.tokens, [one]), [one])[6:-1]
    assert len(left) == made.count(one) - 7 == round(6 / 24 * made._shape(one)[1] * made._shape(one)[2])
    (top, _), (rows, _) = made._shape(one)[0], made._crops(one.size)
    for token in left:
        crop, place = (merged.tokens == token).all(-1).nonzero()[0].tolist()
        patches = (merged.groups[crop] == place).nonzero()[:, 0] // 6
        assert ((patches >= top) & (patches < rows * 4 - top)).any()
    with pytest.raises(ZooError, match="kept_lines ends lines of patches"):
        layout(text_dim=24, grid=None, num_tokens=6, encoder_grid=(4, 6), kept_lines=True).project(
            merged, lambda i: i.tokens, [Cut(3, "crop", (16, 32))]
        )


def test_where_no_order_is_known_those_that_stay_are_spread():
    shown = torch.ones(3, 40, dtype=torch.bool)
    for count in (1, 7, 30, 60, 119):
        stays = fewer(shown, None, count)
        assert int(stays.sum()) == count and int(stays.sum(1).max() - stays.sum(1).min()) <= 1
        gaps = stays[0].nonzero()[:, 0].diff()
        assert not len(gaps) or gaps.max() <= 4 * max(1, 40 // int(stays[0].sum()))
