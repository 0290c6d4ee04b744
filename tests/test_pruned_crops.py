"""Every pruner on images of several crops and on films: each row by itself, in order, as many as were counted."""

import math
from dataclasses import replace

import pytest
import torch

import zoo
from tests import published_builders as build
from tests.fusion_builders import features
from tests.test_published_families import ASK, film, said  # noqa: F401 (a fixture)
from zoo import registry
from zoo.registry import Cut

KEEP_ALL = {"aim": ["pruner.aim.merge_ratio=1.0", "pruner.aim.prune=false"], "pool": ["pruner.pool.stride=1"]}
KEEP_ALL |= {"vscan": ["pruner.vscan.keep_ratio=1.0", "pruner.vscan.llm_ratio=1.0"]}
SIZES = [(40, 90), (30, 30), (90, 40)]  # of three, two and three crops, with padding that is cut off


@pytest.fixture(scope="module")
def cropped(tmp_path_factory):
    """Folder of a LLaVA-NeXT: crops, padding cut off, a newline behind each line."""
    folder = tmp_path_factory.mktemp("published") / "llava_next"
    build.llava_next(folder)
    return folder


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """Folder of a LLaVA-OneVision, whose encoder has no [CLS]."""
    folder = tmp_path_factory.mktemp("published") / "llava_onevision"
    build.llava_onevision(folder)
    return folder


def load(folder, name, *words):
    words = (*words, "pruner.cdpruner.relevance=embeddings") if name == "cdpruner" else words
    words = (*words, "vision.next_block=true") if name == "prumerge" else words
    model, processor = zoo.load(f"dir:{folder}", *([f"pruner=[{name}]"] if name else []), *words)
    processor.tokenizer.padding_side = "left"
    return model.eval(), processor


def batch_of(processor, sizes=SIZES):
    texts = [processor.apply_chat_template(said(1, q), add_generation_prompt=True) for q in (ASK, "yes", "no blue")]
    images = [[build.photo(*size, seed=i)] for i, size in enumerate(sizes)]
    return texts, images


@pytest.mark.parametrize("name", registry.names("pruner"))
@torch.no_grad()
def test_keeping_all_is_no_pruner_to_the_bit_with_crops_newlines_and_cut_padding(cropped, name):
    keep_all = KEEP_ALL.get(name, [f"pruner.{name}.keep_ratio=1.0"])
    (model, processor), (plain, own) = load(cropped, name, *keep_all), load(cropped, "")
    texts, images = batch_of(own)
    got, wanted = processor(images=images, text=texts), own(images=images, text=texts)
    assert torch.equal(got["input_ids"], wanted["input_ids"])
    assert torch.equal(model(**got).logits, plain(**wanted).logits)


@pytest.mark.parametrize("name", registry.names("pruner"))
@torch.no_grad()
def test_images_of_unlike_crops_in_a_batch_are_each_alone(cropped, name):
    (model, processor), (full, plain) = load(cropped, name), load(cropped, "")
    image_token = model.image_token_id
    texts, images = batch_of(processor)
    together = model(**processor(images=images, text=texts)).logits[:, -1]
    for i in range(3):
        inputs = processor(images=images[i : i + 1], text=texts[i : i + 1])
        out = model(**inputs)
        torch.testing.assert_close(together[i], out.logits[0, -1], atol=1e-5, rtol=1e-5)
        if out.image_kept.grid is None:  # the pruner's share of what stands there without it, and one newline
            whole = int((plain(images=images[i : i + 1], text=texts[i : i + 1])["input_ids"] == image_token).sum())
            lines = full.layout._shape(out.image.cuts[0])[1] if out.image.cuts[0].rows > 1 else 1
            share = out.image_kept.tokens.shape[1] / out.image.tokens.shape[1]
            counted = int((inputs["input_ids"] == image_token).sum())
            assert counted <= whole and abs(counted - 1 - share * (whole - lines)) <= 1


@torch.no_grad()
def test_a_pruned_picture_of_onevision_is_shorter_than_an_unpruned_one(filmed):
    """Its joined grid is scaled down to `max_crops` crops, which kept tokens of all crops once outnumbered."""
    for size in ((96, 96), (64, 96), (40, 90)):
        counts = {}
        for ratio in (1.0, 0.5, 0.25):
            model, processor = load(
                filmed, *(["divprune", f"pruner.divprune.keep_ratio={ratio}"] if ratio < 1 else [""])
            )
            inputs = processor(images=[build.photo(*size)], text="<image> hi")
            assert model(**inputs).logits.isfinite().all()
            counts[ratio] = int((inputs["input_ids"] == model.image_token_id).sum())
        assert all(abs(counts[ratio] / counts[1.0] - ratio) < 0.06 for ratio in (0.5, 0.25)), counts


@torch.no_grad()
def test_a_newline_behind_each_line_of_kept_tokens_is_counted_beforehand(cropped):
    counts = []
    for words in ([], ["layout.kept_lines=true"]):
        model, processor = load(cropped, "fastervlm", *words)
        texts, images = batch_of(processor)
        inputs = processor(images=images, text=texts)
        assert model(**inputs).logits.isfinite().all()
        counts.append((inputs["input_ids"] == model.image_token_id).sum(1))
    cuts = [Cut(1 + math.prod(model.layout._crops(size)), "crop", size) for size in SIZES]
    assert (counts[1] - counts[0]).tolist() == [model.layout._shape(cut)[1] - 1 for cut in cuts]


@pytest.mark.parametrize("name", ["aim", "divprune", "fastv", "random"])
@torch.no_grad()
def test_frames_of_a_film_are_pruned_each_alone_and_kept_all_to_the_bit(filmed, film, name):  # noqa: F811
    video, _ = film
    talk = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": ASK}]}]
    runs = []
    for words in ([""], [name, *KEEP_ALL.get(name, [f"pruner.{name}.keep_ratio=1.0"])], [name]):
        model, processor = load(filmed, *words)
        text = processor.apply_chat_template(talk, add_generation_prompt=True)
        inputs = processor(videos=[video], text=[text])
        runs.append(model(**inputs))
    plain, whole, some = runs
    assert torch.equal(plain.logits, whole.logits)
    assert some.image_kept.tokens.shape[0] == 5 and not torch.equal(some.logits[:, -1], plain.logits[:, -1])
    for i in range(5 if name != "random" else 0):  # which draws by the number of a frame
        alone = model.vision(inputs["pixel_values"][i : i + 1], need=model.requested)
        for pruner in model.pruner.values():
            alone = pruner(alone)
        alone = alone if model.unpruned is None else model.unpruned.placed(alone)
        torch.testing.assert_close(some.image_kept.tokens[i : i + 1], alone.tokens, atol=1e-6, rtol=1e-5)


def test_aim_leaves_1568_of_the_6272_tokens_of_a_film():
    """LLaVA-OneVision's 32 frames of 27 x 27 patches, pooled to 14 x 14 and merged, as in the paper's tables."""
    image = features(m=32, grid=(27, 27), dim=8, rows=(32,), row_kind="frame")
    pool = registry.build("pruner", {"name": "pool"}, grid=(27, 27))
    aim = registry.build("pruner", {"name": "aim"})
    pooled = pool(image)
    assert pooled.tokens.shape[:2].numel() == 6272
    merged = aim(pooled)
    assert merged.tokens.shape[:2].numel() == 1568 and merged.rows == (32,) and merged.row_kind == "frame"
    assert aim.tokens_per_layer(1568, 28)[-1] == 0
    other = image.tokens.clone()
    other[7] = 0  # what happens in a frame changes that frame alone
    changed = aim(pool(replace(image, tokens=other))).tokens
    assert (changed != merged.tokens).flatten(1).any(1).nonzero().flatten().tolist() == [7]
