"""The encoders of Qwen-VL compute what transformers' towers do, rows of unlike grids by themselves."""

import importlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.qwen_builders import NATIVE, encoder, patches, picture
from zoo.registry import UnlikeRows, ZooError
from zoo.vision.encoders import segments
from zoo.vision.encoders.qwen import QwenVision, QwenVisionConfig
from zoo.vision.images.decode import open_image
from zoo.vision.images.processors import Pictures, stack

GRIDS = [(2, 3), (5, 6), (2, 3), (9, 1), (1, 1)]  # divide by windows of 2 x 2 tokens or not
SCORES = frozenset({"key_attention", "keys"})


def theirs(vision, pixels, grids):
    return vision.tower(pixels, grid_thw=torch.tensor([(1, 2 * h, 2 * w) for h, w in grids]))


@pytest.mark.parametrize("family", NATIVE)
@torch.no_grad()
def test_tokens_and_deep_features_are_those_of_transformers(family):
    vision = encoder(family)
    pixels = patches(vision, GRIDS)
    wanted, got = theirs(vision, pixels, GRIDS), vision(pixels, grids=GRIDS)
    assert torch.equal(torch.cat(got.in_order(lambda g: g.tokens)), wanted.pooler_output)
    assert vision.deep == (3 if family.startswith("qwen3") else 0)
    for k in range(vision.deep):
        deep = got.in_order(lambda g, k=k: g.deep[k])
        assert torch.equal(torch.cat(deep), wanted.deepstack_features[k])
    assert got.members == ((0, 2), (1,), (3,), (4,)) and got.num_rows == 5
    assert [g.grid for g in got.groups] == [(2, 3), (5, 6), (9, 1), (1, 1)]
    assert all(
        g.tokens.shape == (len(m), g.grid[0] * g.grid[1], 64) for g, m in zip(got.groups, got.members, strict=True)
    )


@pytest.mark.parametrize("family", NATIVE)
@torch.no_grad()
def test_a_row_in_a_batch_is_the_row_alone_and_a_video_is_its_pairs_of_frames(family):
    vision = encoder(family)
    pixels, at = patches(vision, GRIDS), 0
    rows = vision(pixels, grids=GRIDS, need=SCORES)
    for i, (h, w) in enumerate(GRIDS):
        n = h * w * 4
        alone = vision(pixels[at : at + n], grids=[(h, w)], need=SCORES).groups[0]
        for of in (lambda g: g.tokens, lambda g: g.key_attention, lambda g: g.keys):
            torch.testing.assert_close(of(alone)[0], rows.in_order(of)[i], atol=1e-6, rtol=1e-5)
        at += n
    film = patches(vision, [(3, 2)] * 3)
    shape = (
        [[3, 6, 4]] if family.startswith("qwen") else [[1, 6, 4]] * 3
    )  # as transformers' whole model calls the tower
    video = vision.tower(film, grid_thw=torch.tensor(shape)).pooler_output
    assert torch.equal(vision(film, grids=[(3, 2)] * 3).groups[0].tokens.flatten(0, 1), video)


@pytest.mark.parametrize("family", NATIVE)
@torch.no_grad()
def test_scores_are_the_column_means_of_the_attention_that_runs(family):
    """Of the last block, which attends to whole rows: by the weights that transformers' eager kernel computes."""
    vision = encoder(family)
    pixels = patches(vision, GRIDS)
    got = vision(pixels, grids=GRIDS, need=SCORES)
    seen = []

    def spy(module, query, key, value, attention_mask, scaling, **kwargs):
        weights = (query @ key.transpose(2, 3) * scaling).softmax(-1, dtype=torch.float32)
        if module is vision.tower.blocks[-1].get_submodule(vision.family.attention[0]):
            seen.append((weights, key))
        return (weights @ value).transpose(1, 2).contiguous(), weights

    ALL_ATTENTION_FUNCTIONS.register("spy", spy)
    vision.tower.config._attn_implementation_internal = "spy"
    try:
        again = vision(pixels, grids=GRIDS)
    finally:
        vision.tower.config._attn_implementation_internal = "sdpa"
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("spy", None)
    torch.testing.assert_close(again.groups[0].tokens, got.groups[0].tokens, atol=1e-4, rtol=1e-4)
    assert len(seen) == len(GRIDS)
    scores, keys = got.in_order(lambda g: g.key_attention), got.in_order(lambda g: g.keys)
    for (weights, key), (h, w), score, mean in zip(seen, GRIDS, scores, keys, strict=True):
        order = raster(family, h, w)
        if family == "paddleocr_vl":  # patches come row by row
            patch = torch.arange(4 * h * w).view(h, 2, w, 2).transpose(1, 2).flatten()
            weights, key = weights[..., patch], key[:, :, patch]
        wanted = weights[0].mean((0, 1)).view(-1, 4).sum(1)
        torch.testing.assert_close(score[order], wanted, atol=1e-6, rtol=1e-4)
        assert abs(float(score.sum()) - 1) < 1e-5
        torch.testing.assert_close(mean[order], key[0].transpose(0, 1).unflatten(0, (-1, 4)).mean(1))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_segments_in_batches_are_segments_one_by_one_to_the_bit(family):
    """Values and gradients of transformers' loop over sdpa; windows that divide the grid, and others."""
    for grids in ([(4, 4)], GRIDS, [(2, 2)] * 3):
        found = []
        for loop in (False, True):
            vision = encoder(family)
            assert vision.tower.config._attn_implementation == "zoo_flash_segments"
            if loop:
                vision.tower.config._attn_implementation_internal = "sdpa"
            got = vision(patches(vision, grids), grids=grids)
            sum(x.square().mean() for g in got.groups for x in g.maps).backward()
            found.append((got.in_order(lambda g: g.tokens), [p.grad for p in vision.parameters()]))
        (tokens, grads), (wanted, others) = found
        assert all(torch.equal(a, b) for a, b in zip(tokens, wanted, strict=True))
        assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(grads, others, strict=True))
    vision.set_attention("eager")
    assert vision.tower.config._attn_implementation == "eager"
    vision.set_attention("sdpa")
    assert vision.tower.config._attn_implementation == "zoo_flash_segments"


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"device": "cpu"}, False),
        ({"head": 20}, False),
        ({"head": 512}, False),
        ({"dropout": 0.1}, False),
        ({"capability": (7, 5)}, False),
        ({"cuda": None}, False),
    ],
    ids=str,
)
def test_torchs_kernel_for_unlike_lengths_is_taken_where_it_works(monkeypatch, changed, taken):
    case = {"dtype": torch.bfloat16, "device": "cuda", "head": 80, "dropout": 0.0, "capability": (8, 0), "cuda": "13.0"}
    case |= changed
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case["capability"])
    monkeypatch.setattr(torch.version, "cuda", case["cuda"])
    query = SimpleNamespace(shape=(1, 2, 9, case["head"]), dtype=case["dtype"], device=torch.device(case["device"]))
    kernel = segments.unlike_lengths(query, case["dropout"])
    assert kernel is (importlib.import_module("torch.nn.attention.varlen").varlen_attn if taken else None)


@torch.no_grad()
def test_torchs_kernel_for_unlike_lengths_is_given_all_segments(monkeypatch):
    """In its place, a loop over segments by its arguments; the encoder's tokens are as without it."""
    called = []

    def kernel(q, k, v, ends, ends_k, most, most_k, *, scale):
        assert ends is ends_k and ends.dtype == torch.int32 and most == most_k == int(ends.diff().max())
        called.append(len(ends) - 1)
        lengths = ends.diff().tolist()
        parts = [x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)]  # (H, L, d)
        made = [torch.nn.functional.scaled_dot_product_attention(*x, scale=scale) for x in zip(*parts, strict=True)]
        return torch.cat(made, 1).transpose(0, 1)

    vision = encoder("qwen2_5_vl")
    wanted = vision(patches(vision, GRIDS), grids=GRIDS).in_order(lambda g: g.tokens)
    monkeypatch.setattr(segments, "unlike_lengths", lambda query, dropout: kernel)
    got = vision(patches(vision, GRIDS), grids=GRIDS).in_order(lambda g: g.tokens)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, wanted, strict=True))
    assert len(called) == vision.depth and called[0] > called[1] == len(GRIDS)


def raster(family, h, w):
    """The tokens in the order of the tower: window by window of 2 x 2 in Qwen2.5-VL."""
    cells = [(i, j) for i in range(h) for j in range(w)]
    if family == "qwen2_5_vl":
        cells = sorted(cells, key=lambda c: (c[0] // 2, c[1] // 2, c[0], c[1]))
    return [i * w + j for i, j in cells]


def test_a_windowed_block_is_never_scored():
    vision = encoder("qwen2_5_vl", extra={"window_size": 16, "fullatt_block_indexes": [1]})
    assert vision.scored == 1 and vision.provides == SCORES | {"grid"}
    assert QwenVision(QwenVisionConfig(model_type="qwen2_5_vl", width=32, heads=2, depth=5)).scored == 4


@pytest.mark.parametrize("family", NATIVE)
def test_gradients_reach_every_weight_and_checkpointing_changes_none(family):
    grads = []
    for recompute in (False, True):
        vision = encoder(family).train()
        vision.set_gradient_checkpointing(recompute)
        got = vision(patches(vision, GRIDS), grids=GRIDS, need=SCORES)
        sum(x.square().mean() for g in got.groups for x in g.maps).backward()
        grads.append({name: p.grad for name, p in vision.named_parameters()})
    assert all(g is not None and g.isfinite().all() for g in grads[0].values())
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-5, rtol=1e-3) for n in grads[0])
    vision.requires_grad_(False).train()
    assert not vision.tower.training
    assert not vision(patches(vision, GRIDS), grids=GRIDS).groups[0].tokens.requires_grad


def test_shapes_on_the_meta_device_are_those_of_real_rows():
    real, grids = encoder("qwen3_vl"), [*GRIDS[:2], (11, 1)]
    with torch.device("meta"):
        meta = encoder("qwen3_vl")
        shadow = meta(torch.empty(real.patch_shape[0] * 47, real.patch_shape[1]), grids=grids, need=SCORES)
    got = real(patches(real, grids), grids=grids, need=SCORES)
    assert isinstance(shadow, UnlikeRows)
    for a, b in zip(shadow.groups, got.groups, strict=True):
        for of in (lambda g: g.tokens, lambda g: g.key_attention, lambda g: g.keys, lambda g: g.deep[2]):
            assert of(a).shape == of(b).shape and of(a).is_meta


def test_what_does_not_fit_is_refused():
    vision = encoder("qwen2_vl")
    with pytest.raises(ZooError, match=r"Rows of \[\(2, 3\)\] tokens have pixels of 24 x 96, got 20 x 96"):
        vision(torch.zeros(20, 96), grids=[(2, 3)])
    with pytest.raises(ZooError, match="does not provide"):
        vision(patches(vision, [(1, 1)]), grids=[(1, 1)], need=frozenset({"cls_attention"}))
    for wrong, message in (
        ({"model_type": "qwen2vl"}, "Did you mean 'qwen2_vl'"),
        ({"width": 36, "heads": 6}, "width must be a multiple of 4"),
        ({"max_pixels": 100}, "max_pixels must be at least"),
        ({"max_pixels": 28 * 28, "extra": {"patch_size": 28}}, "max_pixels must be at least those of a token, 3136"),
        ({"mlp_ratio": 2.5}, "a whole number"),
        ({"extra": {"windw_size": 3}}, "windw_size"),
    ):
        with pytest.raises(ZooError, match=message):
            QwenVision(QwenVisionConfig(**wrong))


@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
def test_a_checkpoint_of_the_whole_model_gives_its_encoder(tmp_path, prefix):
    import json

    from safetensors.torch import save_file

    made = encoder("qwen2_5_vl")
    save_file({prefix + n: t for n, t in made.tower.state_dict().items()}, tmp_path / "model.safetensors")
    content = {"model_type": "qwen2_5_vl", "vision_config": made.tower.config.to_dict() | {"model_type": "qwen2_5_vl"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    read = QwenVision(QwenVisionConfig(checkpoint=str(tmp_path))).eval()
    pixels = patches(made, GRIDS)
    assert torch.equal(read(pixels, grids=GRIDS).groups[1].tokens, made(pixels, grids=GRIDS).groups[1].tokens)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ZooError, match="holds a model of type 'llava'"):
        QwenVision(QwenVisionConfig(checkpoint=str(tmp_path)))


# ---- pixels --------------------------------------------------------------------------------------------------------


def files():
    """Pictures of all shapes and kinds, each with its name."""
    sizes = [(28, 28), (27, 27), (56, 56), (1, 1), (1, 200), (200, 1), (1, 150), (640, 480), (480, 640), (37, 113)]
    sizes += [(300, 31), (31, 300), (64, 64), (65, 64), (20, 21), (8, 400), (400, 8), (100, 99), (14, 14), (13, 2)]
    made = {f"{w}x{h}": picture(w, h, w * h) for w, h in sizes}
    both = [(40, 30), (9, 77)]
    made |= {f"{m} {w}x{h}": picture(w, h, 3, m) for m in ("L", "P", "1", "RGBA", "CMYK") for w, h in both}
    for turned in (3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = turned
        file = io.BytesIO()
        picture(50, 33, turned).save(file, "JPEG", exif=exif)
        made[f"exif {turned}"] = file.getvalue()
    deep = np.random.default_rng(0).integers(0, 65536, (33, 50)).astype(np.uint16)
    made["16 bits"] = Image.fromarray(deep)
    made["opaque"] = picture(70, 20, 5, "RGBA")
    made["array"] = np.asarray(picture(60, 45))
    made["grey array"] = np.asarray(picture(60, 45, 2, "L"))
    return made


@pytest.mark.parametrize("family", NATIVE)
def test_pixels_are_bit_for_bit_those_of_transformers(family, tmp_path):
    # PaddleOCR-VL's own least, 384 x 384, is so near that an enlarged image could pass the most.
    bounds = {"max_pixels": 200_000, "min_pixels": 3136 if family == "paddleocr_vl" else 0}
    vision = QwenVision(QwenVisionConfig(model_type=family, width=32, heads=2, depth=1, **bounds))
    values = dict(vision.pictures)
    pictures = Pictures(values)
    kind = getattr(transformers, values["image_processor_type"])
    plain = kind(**{k: v for k, v in values.items() if k != "image_processor_type"})
    plain.save_pretrained(tmp_path)
    own = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(own) is type(pictures.processor)
    table = files()
    assert len(table) >= 37
    for name, source in table.items():
        made = pictures(source)
        image = open_image(source)
        wanted = own(images=[image], return_tensors="pt")
        assert torch.equal(made.pixels, wanted["pixel_values"].flatten(1)), name
        (t, h, w) = wanted["image_grid_thw"][0].tolist()
        assert (made.cut.rows, made.cut.patches, made.cut.size) == (t, (h // 2, w // 2), (image.height, image.width))
        assert h * w <= 200_000 // vision.pictures["patch_size"] ** 2
        assert made.pixels.shape == (h * w, vision.patch_shape[1])
    batch = stack([pictures(table[n]) for n in ("640x480", "1x1", "array")])
    wanted = own(images=[open_image(table[n]) for n in ("640x480", "1x1", "array")], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], wanted["pixel_values"].flatten(1))
    assert [c.patches for c in batch["cuts"]] == [(h // 2, w // 2) for _, h, w in wanted["image_grid_thw"].tolist()]


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 201)])
def test_an_image_two_hundred_times_as_long_as_wide_is_refused(size):
    vision = QwenVision(QwenVisionConfig(width=32, heads=2, depth=1))
    with pytest.raises(ZooError, match=f"Image 'x' of {size[1]} x {size[0]} pixels: absolute aspect ratio"):
        Pictures(vision.pictures)(picture(*size), where="'x'")


def test_the_grid_is_that_of_an_image_of_the_most_pixels():
    for most in (28 * 28, 1024 * 1024, 12_845_056, 1283 * 784):
        vision = encoder("qwen2_vl", patch_size=14, max_pixels=most, min_pixels=0)
        h, w = vision.grid
        assert h <= w <= 2 * h and vision.num_tokens == h * w >= most // 784 and h * w - most // 784 < 40
        assert vision.transform.size == (28 * h, 28 * w)
