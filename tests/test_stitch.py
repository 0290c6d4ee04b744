"""The order of kept tokens of several crops, against a walk over the stitched image and against transformers."""

from types import SimpleNamespace

import pytest
import torch

from zoo.fusion.layouts.crop_order import NEWLINE, stitched_order


def kept(crops, n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=g)[:k].sort().values for _ in range(crops)])


def walked(keep, grid, tiles, newline):
    """Every patch of the stitched image in raster order, looked up among the kept ones."""
    (h, w), columns, k = grid, tiles[1], keep.shape[1]
    where = {(c, int(j)): c * k + at for c, row in enumerate(keep) for at, j in enumerate(row)}
    order = [where[0, j] for j in range(h * w) if (0, j) in where]
    for y in range(tiles[0] * h):
        for x in range(columns * w):
            crop, inside = 1 + (y // h) * columns + x // w, (y % h) * w + x % w
            order += [where[crop, inside]] if (crop, inside) in where else []
        order += [NEWLINE] if newline else []
    return order


@pytest.mark.parametrize("tiles", [(2, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("newline", [False, True])
def test_order_is_the_raster_of_the_stitched_image(tiles, k, newline):
    grid = (4, 5)
    keep = kept(1 + tiles[0] * tiles[1], 20, k)
    order = stitched_order(keep, grid, tiles, newline=newline).tolist()
    assert order == walked(keep, grid, tiles, newline)
    assert len(order) == keep.numel() + (tiles[0] * 4 if newline else 0)  # known without the scores
    assert sorted(i for i in order if i != NEWLINE) == list(range(keep.numel()))


def test_dropping_moves_none_of_the_others():
    keep, grid, tiles = kept(5, 20, 9), (4, 5), (2, 2)
    whole = torch.arange(20).expand(5, -1)
    places = (torch.arange(5).unsqueeze(1) * 20 + keep).flatten()  # of the kept ones among all
    full = [i for i in stitched_order(whole, grid, tiles, newline=True).tolist() if i == NEWLINE or i in places]
    some = stitched_order(keep, grid, tiles, newline=True)
    assert [NEWLINE if i == NEWLINE else int(places[i]) for i in some.tolist()] == full


@pytest.mark.parametrize("size", [(64, 64), (32, 64), (96, 32), (32, 96)])
def test_all_kept_without_padding_is_the_packing_of_llava_next(size):
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, get_anyres_image_grid_shape

    pinpoints = [[64, 64], [32, 64], [64, 32], [96, 32], [32, 96]]
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=32, patch_size=8), image_grid_pinpoints=pinpoints)
    tiles = get_anyres_image_grid_shape(size, pinpoints, 32)
    crops = torch.randn(1 + tiles[0] * tiles[1], 16, 3)
    newline = torch.full((3,), 7.0)
    (want,), _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), [crops], torch.tensor([size]), "default", newline
    )
    order = stitched_order(torch.arange(16).expand(len(crops), -1), (4, 4), tiles, newline=True)
    got = torch.cat([crops.flatten(0, 1), newline.unsqueeze(0)])[order]  # the newline is the last row
    assert torch.equal(got, want)
