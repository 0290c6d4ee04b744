"""Training with image tokens hidden at random: what is hidden does not exist for the answer, and runs resume."""

import pytest
import torch
from torch.nn.functional import log_softmax

from tests.conftest import ANSWERS, QUESTIONS, sample
from tests.test_positions import made
from tests.train_builders import config, losses, recipe, train_up_to
from zoo.checking.checker import check
from zoo.checking.plan import plan_from
from zoo.registry import ZooError
from zoo.settings.stage import Stage
from zoo.training.hidden_tokens import hide_image_tokens
from zoo.training.loop import Run

STAGE = "train: [all], steps: 4, batch_size: 4, keep_range: [0.1, 0.9], checkpoint_every: 2"
OPEN = "llm.zero_init_residual=false"  # else the first step attends to nothing


def test_each_row_draws_a_share_of_its_image_tokens():
    torch.manual_seed(0)
    slots = torch.zeros(4000, 40, dtype=torch.bool)
    slots[:, 3:23] = slots[:2000, 25:35] = True
    mask = torch.ones(4000, 40, dtype=torch.long)
    mask[:, 38:] = 0
    left = hide_image_tokens(mask, slots, [0.1, 0.6])
    assert torch.equal(left[~slots], mask[~slots]) and left.dtype == mask.dtype
    shares = (left.bool() & slots).sum(1) / slots.sum(1)
    assert 0.09 < shares.min() < 0.14 and 0.57 < shares.max() < 0.61 and abs(shares.mean() - 0.35) < 0.01
    places = (left.bool() & slots)[2000:, 3:23].float().mean(0)
    assert (places - places.mean()).abs().max() < 0.05  # none is preferred
    assert torch.equal(hide_image_tokens(mask, slots, [1.0, 1.0]), mask)
    assert ((hide_image_tokens(mask, slots, [0.001, 0.001]).bool() & slots).sum(1) == 1).all()
    text = torch.zeros_like(slots)
    assert torch.equal(hide_image_tokens(mask, text, [0.1, 0.5]), mask)
    torch.manual_seed(0)
    assert torch.equal(hide_image_tokens(mask, slots, [0.1, 0.6]), left)


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_tokens_are_pruned_ones_that_keep_their_positions(make_model, side):
    """The answer is that of a pruner that keeps what was not hidden."""
    random = {"random": {"name": "random", "keep_ratio": 0.4}}
    pruned, processor = made(make_model, random)
    whole, unpruned = made(make_model, None)
    whole.load_state_dict(pruned.state_dict())
    rows = [sample((QUESTIONS[i], ANSWERS[i]), images=n, seed=3 * i) for i, n in enumerate((2, 1, 1))]
    short, long = (p.collate([p.encode(row) for row in rows], padding_side=side) for p in (processor, unpruned))
    with torch.no_grad():
        out = pruned(**short)
        slots = whole._placeholders(long["input_ids"])
        keep = torch.zeros(4, 16, dtype=torch.bool).scatter(1, out.image_kept.places, True)
        mask = long["attention_mask"].masked_scatter(slots, keep.flatten().long())
        hidden = whole(**{**long, "attention_mask": mask})
    for row in range(3):
        a, b = (x["labels"][row] != -100 for x in (short, long))
        found, wanted = hidden.logits[row, b], out.logits[row, a]
        torch.testing.assert_close(log_softmax(found, -1), log_softmax(wanted, -1), atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(hidden.loss, out.loss, atol=1e-4, rtol=1e-4)


def test_what_is_hidden_depends_on_the_step_alone(tmp_path):
    """A run that goes on from a checkpoint hides what the unbroken one hides; one without the option differs."""
    whole, plain = ({}, {})
    for found, stage in ((whole, STAGE), (plain, STAGE.replace("keep_range: [0.1, 0.9], ", ""))):
        place = tmp_path / str(len(whole))
        place.mkdir()
        Run(config(recipe(place, {"all": stage}), OPEN, f"run.folder={place / 'run'}")).train()
        found.update(losses(place / "run"))
    assert whole[1] != plain[1]
    train_up_to(Run(config(recipe(tmp_path, {"all": STAGE}), OPEN, f"run.folder={tmp_path / 'run'}")))
    Run(config(recipe(tmp_path, {"all": STAGE}), f"resume={tmp_path / 'run'}")).train()
    assert losses(tmp_path / "run") == whole


@pytest.mark.parametrize("shares", [[0.5], [0.0, 0.5], [0.6, 0.5], [0.5, 1.1], [0.1, 0.5, 1.0]])
def test_shares_are_two_and_in_order(shares):
    with pytest.raises(ZooError, match="keep_range must be two shares in"):
        Stage(steps=1, keep_range=shares)


def test_is_refused_where_a_pruner_would_choose_among_hidden_tokens(tmp_path):
    words = recipe(tmp_path, {"all": STAGE})
    with pytest.raises(ZooError, match="'fastv' would choose among them"):
        check(plan_from(config(words, "pruner=fastv", "llm.num_layers=4")))
    with pytest.raises(ZooError, match="pruner 'evs' leaves a number of its own of each image"):
        check(plan_from(config(words, "pruner=evs")))
    with pytest.raises(ZooError, match="this model has none"):
        check(plan_from(config(words, "projector=null", "adapter=vlora", "adapter.vlora.skip=1")))
