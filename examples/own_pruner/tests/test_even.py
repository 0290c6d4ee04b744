"""The equation, written naively; all else a pruner has to do is tried by `zoo test even`."""

from itertools import pairwise

import torch
import zoo_even  # noqa: F401  # not needed once the package is installed

from zoo.registry import ImageFeatures, build


def test_kept_tokens_are_at_equal_distances():
    image = ImageFeatures(torch.arange(24.0).view(1, 24, 1), (4, 6))
    for share in (0.25, 0.5, 0.3):
        pruner = build("pruner", {"name": "even", "keep_ratio": share})
        kept = pruner(image).tokens.flatten().tolist()
        steps = {b - a for a, b in pairwise(kept)}
        assert len(kept) == pruner.num_tokens(24) and max(steps) - min(steps) <= 1
        assert kept[0] == 0
