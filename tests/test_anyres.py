"""The anyres layout: counts are what comes out, lines end with the newline, padding is cut off."""

import math

import numpy as np
import pytest
import torch

from tests.fusion_builders import features
from tests.test_stitch import walked
from zoo.registry import Cut, ZooError, build

PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]


def layout(text_dim=6, grid=(2, 2), num_tokens=4, **options):
    node = {"name": "anyres", "pinpoints": PINPOINTS, **options}
    given = {"image_size": (16, 16), "encoder_grid": (2, 4)}
    return build("layout", node, text_dim=text_dim, grid=grid, num_tokens=num_tokens, **given)


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


def test_without_a_grid_rows_are_joined_as_they_are():
    made = layout(grid=None)
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
    with pytest.raises(ZooError, match="crops do not fill"):
        layout()(torch.randn(2, 4, 6), [Cut(2, "crop", (32, 32))])


@pytest.mark.parametrize("newline", [False, True])
@pytest.mark.parametrize("kept_lines", [False, True])
def test_kept_tokens_stand_in_the_order_of_the_joined_grid(newline, kept_lines):
    made = layout(text_dim=24, grid=None, num_tokens=3, newline=newline, kept_lines=kept_lines)
    cuts = [cut((20, 40), made), Cut(1, "image", (16, 16)), cut((60, 62), made)]
    image = features(m=sum(c.rows for c in cuts), grid=(2, 4))
    kept = build("pruner", {"name": "fastervlm", "num_keep": 3})(image)
    tokens = made.project(kept, lambda i: i.tokens, cuts)
    out, at, row = made(tokens, cuts), 0, 0
    for one in cuts:
        keep = kept.keep[row : row + one.rows]
        rows, columns = made._crops(one.size) if one.kind == "crop" else (0, 0)
        lines = newline and kept_lines and one.kind == "crop"
        order = walked(keep, (2, 4), (rows, columns), (0, rows * 2, 0, columns * 4), lines)
        own = kept.tokens[row : row + one.rows].flatten(0, 1)
        want = torch.cat([own, made.newline[None]])[order] if lines else own[order]
        want = torch.cat([want, made.newline[None]]) if newline and not lines else want
        assert made.count(one) == len(want) == 3 * one.rows + (2 * rows if lines else int(newline))
        assert torch.equal(out[at : at + len(want)], want)
        at, row = at + len(want), row + one.rows
    assert at == len(out) and made.num_tokens(3) >= max(map(made.count, cuts))


def test_lines_of_merged_tokens_are_refused():
    made = layout(text_dim=24, grid=None, num_tokens=6, kept_lines=True)
    cuts = [cut((20, 40), made)]
    merged = build("pruner", {"name": "aim"})(features(m=3, grid=(4, 6)))
    with pytest.raises(ZooError, match="kept_lines ends lines of patches"):
        made.project(merged, lambda i: i.tokens, cuts)
