"""Encoders of timm with feature maps, against timm itself: a tiny model of each family, with its own metadata."""

import pytest
import torch
from torch import nn

from tests.vision_builders import MAPS, pixels, save_timm, settle, timm_map_model
from zoo.registry import ImageTransform, ZooError, build
from zoo.vision.encoders.base import Tower
from zoo.vision.encoders.map_runner import TimmMapRunner


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


def naive_scores(attention, x):
    """The mean over heads and queries of the attention matrix, written as the model's own forward."""
    if x.ndim == 4:
        x = x.flatten(2).transpose(1, 2)
    m, n, _ = x.shape
    if hasattr(attention, "attention_biases"):
        sizes = [attention.key_dim, attention.key_dim, attention.val_dim]
        q, k, _ = attention.qkv(x).view(m, n, attention.num_heads, -1).split(sizes, dim=3)
        bias = attention.attention_biases[:, attention.attention_bias_idxs]
    else:
        q, k, _ = attention.qkv(x).reshape(m, n, 3, attention.num_heads, -1).unbind(2)
        bias = 0
    scores = torch.einsum("mqhd,mkhd->mhqk", q, k) * attention.scale + bias
    return scores.softmax(-1).mean((1, 2)), k


def meta_former():
    """A tiny CAFormer, whose widths cannot be given by name."""
    from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv

    torch.manual_seed(0)
    mixers = [SepConv, SepConv, Attention, Attention]
    norms = [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64), "num_classes": 0}
    return settle(MetaFormer(token_mixers=mixers, norm_layers=norms, **sizes))


@pytest.mark.parametrize("name", ["fastvit_mci0", "levit_128s", "caformer"])
def test_scores_are_the_attention_of_the_block_that_computes_the_map(saved, name):
    if name == "caformer":
        transform = ImageTransform((64, 64), (0.5,) * 3, (0.5,) * 3)
        tower = Tower(TimmMapRunner(meta_former(), -1, False, (64, 64), name), transform)
    else:
        stage = -2 if name.startswith("levit") else -1  # its last map has one token
        tower = build("vision", {"name": "timm", "checkpoint": saved(name)[0], "stage": stage})
    tower = tower.eval().requires_grad_(False)
    assert {"key_attention", "keys"} <= tower.provides and tower.attention_blocks == 0
    seen, attention = [], tower.runner.last
    attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    got = tower(pixels(size=64), need=frozenset({"key_attention", "keys"}))
    with torch.no_grad():
        want, keys = naive_scores(attention, seen[0])
    torch.testing.assert_close(got.key_attention, want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.keys, keys)
    assert got.key_attention.shape == (2, tower.num_tokens) and got.key_attention.std() > 0


def test_earlier_stages_and_other_families_say_why_there_are_no_scores():
    with torch.device("meta"):
        extra = MAPS["fastvit_mci0"]
        early = build("vision", {"name": "timm", "model": "fastvit_mci0", "stage": -2, "extra": extra})
        other = build("vision", {"name": "timm", "model": "test_resnet"})
    for tower in (early, other):
        assert "key_attention" not in tower.provides and "feature map" in tower.lacks["key_attention"]
    with pytest.raises(ZooError, match="does not provide"):
        other(torch.zeros(1, 3, *other.transform.size), need=frozenset({"keys"}))


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
