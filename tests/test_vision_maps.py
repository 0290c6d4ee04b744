"""Encoders of timm with feature maps, against timm itself: a tiny model of each family, with its own metadata."""

import pytest
import torch
from torch import nn

from tests.vision_builders import MAPS, pixels, save_timm, timm_map_model
from zoo.registry import ZooError, build


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = timm_map_model(name)
            save_timm(model, folder)
            made[name] = str(folder), model
        return made[name]

    return get


def own_map(model, index, x):
    """What timm's own interface gives of the whole model, in the memory format that the encoder runs in."""
    with torch.no_grad():
        x = x.contiguous(memory_format=torch.channels_last)
        (out,) = model.forward_intermediates(x, indices=[index], output_fmt="NCHW", intermediates_only=True)
    return out


@pytest.mark.parametrize("name", MAPS)
def test_tokens_are_timms_map_in_row_major_order(saved, name):
    folder, model = saved(name)
    tower = build("vision", {"name": "timm", "checkpoint": folder}).requires_grad_(False).eval()
    last, x = model.feature_info[-1], pixels(size=64)
    want = own_map(model, len(model.feature_info) - 1, x)
    out = tower(x)
    assert out.grid == tower.grid == tuple(want.shape[-2:]) == (64 // last["reduction"],) * 2
    assert tower.hidden_size == last["num_chs"] and tower.num_tokens == out.tokens.shape[1]
    h, w = out.grid
    assert torch.equal(out.tokens.view(2, h, w, -1).permute(0, 3, 1, 2), want)  # bit for bit
    torch.testing.assert_close(tower(x[1:]).tokens, out.tokens[1:], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(tower.requires_grad_().forward(x).tokens, out.tokens, atol=2e-4, rtol=2e-4)
    if name in {"test_resnet", "test_convnext", "swin_tiny_patch4_window7_224"}:
        stage = build("vision", {"name": "timm", "checkpoint": folder, "stage": -2}).eval().requires_grad_(False)
        want = own_map(model, len(model.feature_info) - 2, x)
        assert torch.equal(stage(x).tokens, want.flatten(2).transpose(1, 2))
        assert sum(p.numel() for p in stage.parameters()) < sum(p.numel() for p in tower.parameters())


# Sizes that the reduction does not divide: some pad (3 x 3 of 80 pixels), some drop the rest, some cannot.
ODD = {"test_resnet": 3, "test_efficientnet": 3, "test_convnext": 2, "swin_tiny_patch4_window7_224": 3}


@pytest.mark.parametrize("name", ODD)
def test_a_size_that_does_not_divide_has_the_grid_that_the_model_makes(name):
    torch.manual_seed(0)
    tower = build("vision", {"name": "timm", "model": name, "image_size": 80, "extra": MAPS[name]}).eval()
    with torch.device("meta"):
        checked = build("vision", {"name": "timm", "model": name, "image_size": 80, "extra": MAPS[name]})
    assert checked.grid == tower.grid == (ODD[name], ODD[name]) and tower.transform.size == (80, 80)
    assert tower(pixels(size=80)).tokens.shape == (2, ODD[name] ** 2, tower.hidden_size)


def test_a_size_that_the_model_cannot_take_is_refused():
    with torch.device("meta"), pytest.raises(ZooError, match="takes no images of 80 x 80 pixels"):
        build("vision", {"name": "timm", "model": "hiera_tiny_224", "image_size": 80, "extra": MAPS["hiera_tiny_224"]})


@pytest.mark.parametrize("name", [*MAPS, "coat_tiny"])
def test_every_weight_trains(name):
    # CoaT has weights behind the map, which timm does not remove.
    coat = {"embed_dims": [8, 16, 16, 16], "serial_depths": [1, 1, 1, 1], "parallel_depth": 1}
    sizes = {"image_size": 64, "extra": MAPS.get(name, coat)}
    with torch.device("meta"):
        tower = build("vision", {"name": "timm", "model": name, **sizes}).train()
        tower(torch.zeros(2, 3, 64, 64)).tokens.sum().backward()
    assert [n for n, p in tower.named_parameters() if p.grad is None] == []


def test_batch_norms_keep_their_statistics_in_training():
    torch.manual_seed(0)
    tower = build("vision", {"name": "timm", "model": "test_efficientnet", "image_size": 64}).train()
    before = {n: b.clone() for n, b in tower.named_buffers()}
    assert any("running_var" in n for n in before)
    x = pixels(3, 64)
    together = tower(x).tokens
    together.sum().backward()
    assert all(torch.equal(b, before[n]) for n, b in tower.named_buffers())
    torch.testing.assert_close(tower(x[:1]).tokens, together[:1])  # no row depends on the others
    norms = [m for m in tower.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.weight.grad is not None and not m.training for m in norms) and tower.tower.training


def test_smaller_images_by_resize():
    torch.manual_seed(0)
    tower = build("vision", {"name": "timm", "model": "test_resnet", "image_size": 96}).eval()
    assert tower.grid == (3, 3)
    tower.resize((2, 2))
    assert tower.transform.size == (64, 64) and tower(pixels(size=64)).tokens.shape[1] == tower.num_tokens == 4
    swin = {"model": "swin_tiny_patch4_window7_224", "extra": MAPS["swin_tiny_patch4_window7_224"], "image_size": 64}
    with torch.device("meta"):
        fixed = build("vision", {"name": "timm", **swin})
    with pytest.raises(ZooError, match="takes no images of 32 x 32"):
        fixed.resize((1, 1))


def test_the_final_norm_where_timm_applies_one(saved):
    folder, model = saved("swin_tiny_patch4_window7_224")
    tower = build("vision", {"name": "timm", "checkpoint": folder, "norm": True}).eval().requires_grad_(False)
    with torch.no_grad():
        want = model.forward_features(pixels(size=64).contiguous(memory_format=torch.channels_last))  # (M, h, w, D)
    assert torch.equal(tower(pixels(size=64)).tokens, want.flatten(1, 2))
    with torch.device("meta"), pytest.raises(ZooError, match="no final norm to this map of 'test_resnet'"):
        build("vision", {"name": "timm", "model": "test_resnet", "norm": True})


def test_wrong_options_are_refused():
    for options, message in [
        ({"model": "test_resnet", "stage": 6}, "has 5 feature maps: stage must be 1 to 5, or -5 to -1, got 6"),
        ({"model": "test_resnet", "stage": 0}, "got 0"),
        ({"model": "test_resnet", "layer": -1}, "'test_resnet' is a ResNet, not a plain ViT: set stage"),
        ({"model": "test_resnet", "next_block": True}, "next_block is of ViTs"),
        ({"model": "test_vit", "stage": -2}, "'test_vit' is a ViT, whose tokens are of a block: set layer, not stage"),
        ({"model": "test_resnet", "extra": {"stem_widht": 8}}, "argument of timm's ResNet named 'stem_widht'. Did you"),
        ({"model": "test_resnet", "extra": {"checkpoint_path": "x"}}, "named 'checkpoint_path'"),
        ({"extra": {"depths": [1]}}, "extra is for random weights of a named `model`"),
    ]:
        with torch.device("meta"), pytest.raises(ZooError, match=message):
            build("vision", {"name": "timm", **options})


def test_the_transform_is_that_of_the_weights():
    with torch.device("meta"):
        tower = build("vision", {"name": "timm", "model": "mobilenetv4_conv_small.e2400_r224_in1k", "checkpoint": ""})
    known = tower.tower.pretrained_cfg
    assert tower.transform.mean == tuple(known["mean"]) and tower.transform.std == tuple(known["std"])
    assert tower.transform.resample == known["interpolation"] and tower.transform.size == known["input_size"][1:]
