"""Pixels against the preprocessing of transformers, timm and open_clip."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.registry import ImageTransform, ZooError
from zoo.registry.versions import TORCHVISION_HAS_LANCZOS
from zoo.vision.encoders.base import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD
from zoo.vision.images.transform import fit, normalise, to_pixels

# Pillow, which timm and open_clip use, rounds differently from torchvision, which transformers uses.
SHAPES = [(64, 64), (64, 32), (48, 96), (97, 61), (61, 97), (30, 40), (640, 481), (7, 300), (32, 32), (33, 32)]


def picture(width, height, seed=0):
    """Smooth structure with edges, as photographs have; noise alone would make any resampling look different."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    image = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).copy()
    image[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 40)
    return Image.fromarray(image)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 300), (300, 1)], ids=str)
@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_equals_the_processors_of_transformers(shape, resample):
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    if resample == 1 and not TORCHVISION_HAS_LANCZOS:
        pytest.skip("transformers takes bicubic in its place")
    image, name = picture(*shape), ("nearest", "lanczos", "bilinear", "bicubic")[resample]
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    crop = ImageTransform((32, 32), CLIP_MEAN, CLIP_STD, name, resample_by="torchvision")
    squash = ImageTransform((32, 32), HALF, HALF, name, fit="squash", resample_by="torchvision")
    for theirs, ours in (
        (CLIPImageProcessor(resample=resample, **sides), crop),
        (SiglipImageProcessor(resample=resample, size={"height": 32, "width": 32}), squash),
    ):
        want = theirs(image, return_tensors="pt").pixel_values[0]
        got = to_pixels(image, ours)
        assert got.shape == want.shape == (3, 32, 32) and got.dtype == torch.float32
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)  # the same bytes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_libraries_differ_by_a_step_or_two(shape):
    image = picture(*shape)
    for transform in (
        ImageTransform((32, 32), CLIP_MEAN, CLIP_STD),
        ImageTransform((32, 32), HALF, HALF, fit="squash"),
    ):
        one, two = (to_pixels(image, replace(transform, resample_by=name)) for name in ("pillow", "torchvision"))
        # Up to 8 steps of a byte at the edges of what is stretched fivefold, a fifth of one on average.
        steps = (one - two).abs() * 255 * min(transform.std)
        assert steps.max() <= 8.01 and steps.mean() <= 0.25


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_equals_timms_transform(shape, mode, interpolation):
    from timm.data import create_transform

    image = picture(*shape)
    theirs = create_transform(
        (3, 32, 32), interpolation=interpolation, mean=IMAGENET_MEAN, std=IMAGENET_STD, crop_pct=1.0, crop_mode=mode
    )
    kind = {"center": "crop", "squash": "squash", "border": "pad"}[mode]
    transform = ImageTransform((32, 32), IMAGENET_MEAN, IMAGENET_STD, interpolation, kind)
    got, want = to_pixels(image, transform), theirs(image)
    if kind == "crop" and (max(shape) * 32 // min(shape)) % 2:
        return  # torchvision rounds half a pixel up, transformers down; we follow transformers
    if kind == "pad" and (32 * min(shape)) % max(shape):
        return  # timm rounds the shorter side to the nearest pixel, we down, as for the longer side of a crop
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # the same bytes from Pillow


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("theirs", "ours"), [("shortest", "crop"), ("squash", "squash")])
def test_equals_open_clips_transform(shape, theirs, ours):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    if ours == "crop" and (max(shape) * 32 // min(shape)) % 2:
        return  # as above
    image = picture(*shape)
    want = image_transform_v2(PreprocessCfg(size=32, resize_mode=theirs), is_train=False)(image)
    got = to_pixels(image, ImageTransform((32, 32), CLIP_MEAN, CLIP_STD, fit=ours))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_an_array_of_the_right_size_is_only_normalised(monkeypatch):
    transform = ImageTransform((5, 7), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    want = (array / 255 - np.array(transform.mean)) / np.array(transform.std)
    slow = to_pixels(Image.fromarray(array), transform)
    monkeypatch.setattr("zoo.vision.images.transform.open_image", None)  # may not be called
    fast = to_pixels(array, transform)
    assert fast.dtype == torch.float32 and fast.shape == (3, 5, 7)
    np.testing.assert_allclose(fast.numpy(), want.transpose(2, 0, 1), atol=1e-6)
    assert torch.equal(fast, slow)
    grey = to_pixels(array[:, :, 0], transform)
    assert torch.equal(grey, to_pixels(array[:, :, :1].repeat(3, 2), transform))
    many = normalise(torch.from_numpy(array[None].repeat(4, 0)), transform)
    assert many.shape == (4, 3, 5, 7) and torch.equal(many[2], fast)
    assert torch.equal(to_pixels(array[:, ::-1][:, ::-1], transform), fast)  # a view with negative strides


def test_targets_that_are_not_square():
    image = picture(80, 40)
    for kind in ("crop", "squash", "pad"):
        assert to_pixels(image, ImageTransform((20, 60), HALF, HALF, fit=kind)).shape == (3, 20, 60)
    assert fit(picture(60, 20), ImageTransform((20, 60), HALF, HALF)).size == (60, 20)
    # A picture of the target's proportions is neither cut nor padded.
    a, b, c = (
        to_pixels(picture(120, 40), ImageTransform((20, 60), HALF, HALF, fit=f)) for f in ("crop", "squash", "pad")
    )
    assert torch.equal(a, b) and torch.equal(a, c)


def test_padding_has_the_mean_colour():
    pixels = to_pixels(picture(64, 16), ImageTransform((32, 32), IMAGENET_MEAN, IMAGENET_STD, fit="pad"))
    assert pixels[:, :12].abs().max() < 0.02 and pixels[:, -12:].abs().max() < 0.02
    assert pixels[:, 12:20].abs().max() > 0.5


def test_thin_images_survive():
    for shape in ((2000, 1), (1, 2000)):
        for kind in ("crop", "squash", "pad"):
            assert to_pixels(Image.new("RGB", shape), ImageTransform((16, 16), HALF, HALF, fit=kind)).isfinite().all()


def test_wrong_words_are_refused():
    for wrong in ({"fit": "stretch"}, {"resample": "cubic"}):
        with pytest.raises(ZooError, match="allowed are crop, squash, pad and nearest, bilinear, bicubic, lanczos"):
            to_pixels(picture(9, 9), ImageTransform((8, 8), HALF, HALF, **wrong))
    with pytest.raises(ZooError, match=r"'pilow'\. Did you mean 'pillow'"):
        to_pixels(picture(9, 9), ImageTransform((8, 8), HALF, HALF, resample_by="pilow"))


def test_errors_name_the_image():
    with pytest.raises(ZooError, match="image 1 of sample 'a' is a int"):
        to_pixels(3, ImageTransform((8, 8), HALF, HALF), "image 1 of sample 'a'")
