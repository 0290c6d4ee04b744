"""A run that trains an encoder with batch norms: cut and resumed, it is the same run."""

import pytest
import torch
from safetensors.torch import load_file

from tests.train_builders import config, losses, recipe, train_up_to
from zoo.training.loop import Run

STAGES = {"a": "steps: 4, batch_size: 4, accumulate: 2, checkpoint_every: 2, lr: 0.01"}
# A tiny EfficientNet with batch norms: 64 pixels, the map of 4 x 4 ahead of the last.
VISION = ["vision.model=test_efficientnet", "vision.image_size=64", "vision.layer=-2", "vision.stage=-2"]


def weights(folder):
    return load_file(folder / "checkpoints" / "step-00000004" / "weights.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    Run(config(recipe(place, STAGES), *VISION, f"run.folder={place / 'run'}")).train()
    return place / "run"


def test_cut_and_resumed_it_has_the_same_weights(tmp_path, whole):
    train_up_to(Run(config(recipe(tmp_path, STAGES), *VISION, f"run.folder={tmp_path / 'run'}")))
    Run(config(recipe(tmp_path, STAGES), "resume=last")).train()
    assert losses(tmp_path / "run") == losses(whole)
    again, want = weights(tmp_path / "run"), weights(whole)
    assert again.keys() == want.keys() and all(torch.equal(t, want[n]) for n, t in again.items())
    norms = {n for n in want if "running_var" in n}
    assert norms and all((want[n] == 1).all() for n in norms), "running statistics are those of the start"
    assert any(n.endswith("bn1.weight") and (t != 1).any() for n, t in want.items()), "scales learn"
