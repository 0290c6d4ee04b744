"""Kept features of images that keep their shapes: what a model computes is what it computes from pixels."""

import pytest
import torch

from tests.conftest import ANSWERS, QUESTIONS, talk
from tests.qwen_builders import picture, slots
from zoo.registry import Sample
from zoo.runs.kept_features import Recall, keep_features
from zoo.settings.schema import FeaturesConfig
from zoo.training.step import count_images

SIZES = [((40, 24), (8, 30)), ((33, 64),), ((40, 24),)]  # of the images of each sample; two of them have one grid
CASES = {
    "deep features": ("qwen3_vl", {}),
    "scores": ("qwen2_5_vl", {"fastervlm": {"name": "fastervlm", "keep_ratio": 0.5, "score": "column_mean"}}),
    "keys": ("qwen3_vl", {"visionzip": {"name": "visionzip", "keep_ratio": 0.5, "score": "column_mean"}}),
    "draws by image": ("qwen3_vl", {"random": {"name": "random", "keep_ratio": 0.5}}),
}


def sample(i: int) -> Sample:
    images = [picture(w, h, 10 * i + j) for j, (w, h) in enumerate(SIZES[i])]
    return Sample(f"s{i}", images, [talk(QUESTIONS[i], ANSWERS[i], len(images))])


def opened(model, processor, folder, keep):
    given = {"stage": "a", "precision": "fp32", "sharded": False, "folder": folder, "note": lambda line: None}
    return keep_features(FeaturesConfig(keep=keep), model, processor, **given)


def filled(kept, processor, numbers):
    recall = Recall(kept.store, processor)
    batch = processor.collate([processor.encode(sample(i), recall(sample(i))) for i in numbers])
    return batch, kept.fill(batch)


@pytest.mark.parametrize(("case", "keep"), [*((case, "fp32") for case in CASES), ("deep features", "int8")])
@torch.no_grad()
def test_losses_are_those_of_pixels(make_model, tmp_path, case, keep):
    """Of images that were encoded, found, and both in one batch; of one process, and of another from the folder."""
    family, pruner = CASES[case]
    model, processor = make_model(**slots(family, pruner=pruner))
    model.eval().requires_grad_(False)
    plain = processor.collate([processor.encode(sample(i)) for i in range(3)])
    wanted, rows = model(**plain), model.features_of(plain["pixel_values"], plain["cuts"])[0]
    kept = opened(model, processor, tmp_path, keep)
    filled(kept, processor, [1])
    shown, mixed = filled(kept, processor, [0, 1, 2])
    assert (kept.found, kept.encoded) == (1, 4) and count_images(shown) == 4
    kept.store.flush()
    later = opened(model, processor, tmp_path, keep)
    shown, found = filled(later, processor, [0, 1, 2])
    assert (later.found, later.encoded) == (4, 0) and "pixel_values" not in shown
    for own in (mixed, found):
        got = own["encoded"][0]
        assert (got.members, got.cuts) == (rows.members, rows.cuts)
        for group, other in zip(got.groups, rows.groups, strict=True):
            assert group.grid == other.grid and len(group.deep) == len(other.deep)
            for one, two in zip(group.maps, other.maps, strict=True):
                assert torch.allclose(one, two, atol=1e-5 if keep == "fp32" else 0.05)
        loss = model(**own).loss
        assert torch.allclose(loss, wanted.loss, atol=1e-6 if keep == "fp32" else 1e-2), float(loss - wanted.loss)


def test_an_image_is_kept_by_its_content_and_the_pixels_it_may_have(make_model, tmp_path):
    """More pixels are other grids: a store of their own."""
    stores = []
    for most in (4096, 1024):
        model, processor = make_model(**slots("qwen3_vl", vision={**slots("qwen3_vl")["vision"], "max_pixels": most}))
        model.eval().requires_grad_(False)
        kept = opened(model, processor, tmp_path, "bf16")
        filled(kept, processor, [1])
        stores.append(kept.store.folder)
        kept.store.flush()
        assert opened(model, processor, tmp_path, "bf16").store.find(Recall(kept.store, processor)(sample(1))[0].key)
    assert stores[0] != stores[1]
