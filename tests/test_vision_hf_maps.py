"""Encoders of transformers with feature maps, against its own backbones, in folders that transformers saves."""

import json

import numpy as np
import pytest
import torch

from tests.vision_builders import pixels, settle
from zoo.registry import ZooError, build
from zoo.vision.encoders.hf_maps import TYPES, in_units
from zoo.vision.images.transform import to_pixels

FOUR = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
HEADS = {"depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
SMALL = {
    "bit": {**FOUR, "embedding_size": 8, "num_groups": 4},
    "convnext": FOUR,
    "convnextv2": FOUR,
    "dinov3_convnext": FOUR,
    "focalnet": {
        "embed_dim": 8, "depths": [1, 1, 1, 1], "focal_levels": [2] * 4, "focal_windows": [3] * 4,
        "hidden_sizes": [8, 16, 32, 64],
    },
    "hgnet_v2": {
        "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 24, 32], "stage_mid_channels": [8] * 4,
        "stage_out_channels": [16, 24, 32, 40], "stage_num_blocks": [1] * 4, "stage_numb_of_layers": [1] * 4,
        "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "embedding_size": 8,
    },
    "hiera": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "image_size": [64, 64]},
    "pvt_v2": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
    "resnet": {**FOUR, "embedding_size": 8, "layer_type": "basic"},
    "swin": {"embed_dim": 8, "window_size": 4, **HEADS},
    "swinv2": {"embed_dim": 8, "window_size": 4, **HEADS},
    "textnet": {"stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 24, 32]},
}  # fmt: skip


def backbone(kind, stage, **more):
    from transformers import CONFIG_MAPPING, AutoBackbone

    torch.manual_seed(0)
    fields = {"image_size": 64} if "image_size" in CONFIG_MAPPING[kind].__dataclass_fields__ else {}
    config = CONFIG_MAPPING[kind](**{**fields, **SMALL[kind]})
    config.set_output_features_output_indices(out_features=[config.stage_names[stage]], out_indices=None)
    return AutoBackbone.from_config(config)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("stage", [-1, -2])
def test_tokens_are_transformers_map(kind, stage, tmp_path):
    model = settle(backbone(kind, stage))
    model.save_pretrained(tmp_path)
    if (kind, stage) == ("focalnet", -2):  # transformers states the width ahead of the downsampling, and its norm fails
        with pytest.raises(ZooError, match="states a width of 32, and its map has 64"):
            build("vision", {"name": "hf", "checkpoint": str(tmp_path), "image_size": 64, "stage": stage})
        return
    node = {"name": "hf", "checkpoint": str(tmp_path), "image_size": 64, "stage": stage}
    tower, x = build("vision", node).eval().requires_grad_(False), pixels(size=64)
    if kind == "hiera":
        in_units(model)  # see below
    plain = []  # what the norm of the stage gets: (M, D, h, w), or with channels last
    for norm in getattr(model, "hidden_states_norms", {}).values():
        norm.register_forward_pre_hook(lambda module, args: plain.append(args[0]))
    with torch.no_grad():
        out = model(x.contiguous(memory_format=torch.channels_last))
    feature = out.feature_maps[0]
    want = plain[0] if plain else feature
    want = want.flatten(2).transpose(1, 2) if want.shape == feature.shape else want.reshape(2, -1, feature.shape[1])
    got = tower(x)
    assert got.grid == tower.grid == tuple(feature.shape[-2:]) and tower.hidden_size == feature.shape[1]
    assert torch.equal(got.tokens, want)  # bit for bit
    torch.testing.assert_close(tower(x[1:]).tokens, got.tokens[1:], atol=2e-5, rtol=2e-5)
    if hasattr(model, "hidden_states_norms"):
        normed = build("vision", {**node, "norm": True}).eval().requires_grad_(False)
        assert torch.equal(normed(x).tokens, out.feature_maps[0].flatten(2).transpose(1, 2))
        assert not torch.equal(normed(x).tokens, got.tokens)
    else:
        with pytest.raises(ZooError, match="has no norm for the maps"):
            build("vision", {**node, "norm": True})


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("pools", [1, 3])
def test_hiera_pools_and_attends_in_the_units_of_its_model(stage, pools, tmp_path):
    """The backbone of transformers does not order the patches: its own maps are others."""
    from transformers import HieraConfig, HieraModel

    torch.manual_seed(0)
    config = HieraConfig(**{**SMALL["hiera"], "image_size": [128, 128], "num_query_pool": pools})
    model = settle(HieraModel(config))
    model.save_pretrained(tmp_path)
    node = {"name": "hf", "checkpoint": str(tmp_path), "image_size": 128, "stage": stage}
    tower, x = build("vision", node).eval().requires_grad_(False), pixels(size=128)
    with torch.no_grad():
        maps = model(x.contiguous(memory_format=torch.channels_last), output_hidden_states=True)
    want = maps.reshaped_hidden_states[stage - 5]  # (M, h, w, D)
    got = tower(x)
    assert got.grid == want.shape[1:3]
    torch.testing.assert_close(got.tokens, want.flatten(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_every_weight_trains_on_another_size(kind):
    sizes = {"model_type": kind, "extra": SMALL[kind], "stage": -1 if kind == "focalnet" else -2}
    size = 64 if kind == "hiera" else 80  # Hiera has a table of positions
    with torch.device("meta"):
        tower = build("vision", {"name": "hf", **sizes, "image_size": size}).train()
        tower.set_gradient_checkpointing(True)
        tower(torch.zeros(2, 3, size, size)).tokens.sum().backward()
    assert [n for n, p in tower.named_parameters() if p.grad is None] == []


def test_a_classifiers_checkpoint_and_its_processor(tmp_path):
    from transformers import ConvNextConfig, ConvNextForImageClassification, ConvNextImageProcessor

    torch.manual_seed(0)
    model = ConvNextForImageClassification(ConvNextConfig(**FOUR, num_labels=3)).eval()
    model.save_pretrained(tmp_path)
    ConvNextImageProcessor(size={"shortest_edge": 64}, image_mean=[0.1, 0.2, 0.3], resample=2).save_pretrained(tmp_path)
    tower = build("vision", {"name": "hf", "checkpoint": str(tmp_path)}).eval().requires_grad_(False)
    assert tower.transform.size == (64, 64) and tower.transform.mean == (0.1, 0.2, 0.3)
    assert tower.transform.resample == "bilinear" and tower.transform.fit == "crop"
    with torch.no_grad():
        x = pixels(size=64).contiguous(memory_format=torch.channels_last)
        want = model.convnext(x, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(tower(pixels(size=64)).tokens, want.flatten(2).transpose(1, 2))
    with pytest.raises(ZooError, match="lacks 2 weights of its encoder"):
        build("vision", {"name": "hf", "checkpoint": str(tmp_path), "norm": True})


VIT, CONVNEXT, BIT = ("ViTFeatureExtractor", "ConvNextImageProcessor", "BitImageProcessorFast")
STATISTICS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize(
    "stated",
    [
        {"feature_extractor_type": VIT, "size": 64, **STATISTICS, "resample": 3},  # published Swins
        {"feature_extractor_type": VIT, "size": [64, 64]},  # mean, std and filter of the class
        {"image_processor_type": CONVNEXT, "size": {"shortest_edge": 64}, "crop_pct": 1.0, **STATISTICS},
        {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 64, "crop_pct": 1.0, "resample": 2},
        {"image_processor_type": CONVNEXT, "size": {"shortest_edge": 384}, **STATISTICS},  # squashed from 384 on
        {"image_processor_type": CONVNEXT, "size": {"shortest_edge": 64}, "crop_pct": 1.0, "do_normalize": False},
        {"image_processor_type": BIT, "size": {"shortest_edge": 64}, "crop_size": 64, **STATISTICS},  # it crops
    ],
    ids=str,
)
def test_pixels_are_those_of_the_processor_in_the_folder(stated, tmp_path):
    from transformers import AutoImageProcessor, ConvNextConfig

    ConvNextConfig(**FOUR).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    with torch.device("meta"):
        transform = build("vision", {"name": "hf", "checkpoint": str(tmp_path)}).transform
    image = np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)
    want = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(to_pixels(image, transform), want, atol=1e-5, rtol=1e-5)


def test_statistics_of_a_processor_are_of_each_colour(tmp_path):
    from transformers import ConvNextConfig

    ConvNextConfig(**FOUR).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    with torch.device("meta"):
        file.write_text(json.dumps({"image_mean": 0.25, "image_std": [0.5]}))
        with pytest.raises(ZooError, match=r"image_std=\[0.5\]: three numbers are needed"):
            build("vision", {"name": "hf", "checkpoint": str(tmp_path)})
        file.write_text(json.dumps({"image_mean": 0.25, "size": "large"}))
        with pytest.raises(ZooError, match="size='large', which is not a size"):
            build("vision", {"name": "hf", "checkpoint": str(tmp_path)})
        file.write_text(json.dumps({"image_mean": 0.25}))
        assert build("vision", {"name": "hf", "checkpoint": str(tmp_path)}).transform.mean == (0.25,) * 3


def test_wrong_options_are_refused():
    for options, message in [
        ({"layer": -1}, "An encoder of type 'resnet' has feature maps: set stage"),
        ({"stage": 5}, "has 4 feature maps: stage must be 1 to 4, or -4 to -1, got 5"),
        ({"pooling_head": True}, "pooling_head is of ViTs"),
        ({"extra": {"dephts": [1]}}, "field of ResNetConfig named 'dephts'. Did you mean 'depths'"),
        ({"model_type": "clip", "stage": -2}, "'clip' gives the tokens of a block: set layer, not stage"),
    ]:
        with torch.device("meta"), pytest.raises(ZooError, match=message):
            build("vision", {"name": "hf", "model_type": "resnet", **options})
