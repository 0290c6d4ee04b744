"""Notes on what a run leaves out of the preset that it names."""

from pathlib import Path

import pytest

from zoo.checking.checker import check
from zoo.checking.plan import plan_from
from zoo.settings.config import compose

ROOT = Path(__file__).resolve().parents[1]
LITTLE = ("recipe=null", "data=[scenes_basics]", "+stages.only.steps=1")


def notes(*words, command="check"):
    return [note for note in check(plan_from(compose(command, list(words)))).notes if "model" in note]


@pytest.mark.parametrize(
    ("model", "start"),
    [
        ("fashion_tiny", f"dir:{ROOT}/model_cards/fashion_tiny"),
        ("smolvlm_256m", "hub:HuggingFaceTB/SmolVLM-256M-Instruct"),
    ],
)
def test_trained_weights_that_training_leaves_out_are_noted_with_the_words_that_start_from_them(model, start):
    trains = f"model={model} trains its parts anew; model={start} goes on from its trained weights."
    assert notes(f"model={model}", *LITTLE) == [trains]
    assert not notes(f"model={model}", "recipe=null"), "nothing is trained"
    if start.startswith("dir:"):
        assert not notes(f"model={start}", *LITTLE)


def test_no_note_where_the_recipe_makes_the_model_or_nothing_is_trained_yet():
    assert not notes()  # the default recipe makes the default model
    assert not notes("model=picturebook_64m", "recipe=null")


def left_out(*words):
    return [note for note in notes("model=scenes_tiny", *LITTLE, *words) if "left out" in note]


def test_options_of_a_preset_that_do_not_reach_a_part_are_noted():
    (note,) = left_out("vision.model=vit_tiny_patch16_224", "vision.image_size=32")
    words = "options of the vision of model scenes_tiny are left out: "
    assert note.startswith(f"vision.model=vit_tiny_patch16_224: {words}")
    assert "layer=-1" in note and "image_size" not in note
    (note,) = left_out("llm.model_type=gpt2")
    assert note.endswith("options of the llm of model scenes_tiny are left out: extra={hidden_act: relu}.")
    assert not left_out("vision=timm", "vision.model=vit_tiny_patch16_224")
    assert not left_out("llm.num_layers=2")


def test_a_part_named_by_its_weights_is_one_with_a_checkpoint():
    """Options that the preset states beside it reach another checkpoint, as beside one that is spelled out."""
    words = ["model=picturebook_135m", "recipe=null"]
    vision = compose("check", [*words, "vision.checkpoint=./mine"]).vision
    assert (vision.checkpoint, vision.image_size, vision.fit) == ("./mine", 256, "squash")
    vision = compose("check", [*words, "vision.model=resnet18"]).vision
    assert (vision.model, vision.checkpoint, vision.image_size) == ("resnet18", "", 256)
    assert (
        len(compose("check", ["model=picturebook_64m", "recipe=null", "llm.checkpoint=./mine"]).llm.keep_layers) == 10
    )
