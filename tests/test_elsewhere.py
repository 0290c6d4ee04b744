"""Options that are somewhere else, stages that are not there, and dicts on the command line."""

import pytest

from tests.train_builders import config, recipe
from zoo.registry import ZooError
from zoo.settings.config import compose
from zoo.settings.text_options import TextOptions

STAGES = {"a": "steps: 1, distiller: {name: dense, target: masks}", "b": "steps: 1"}


@pytest.mark.parametrize(
    ("word", "homes"),
    [
        ("checkpoint_every=2", ["stages.<stage>.checkpoint_every"]),
        ("run.checkpoint_every=2", ["stages.<stage>.checkpoint_every"]),
        ("keep_ratio=0.5", ["pruner.random.keep_ratio"]),
        ("hidden_size=32", ["llm.hidden_size"]),
        ("chat_template=chatml", ["tokenizer.chat_template"]),
    ],
)
def test_an_option_of_something_else(word, homes):
    with pytest.raises(ZooError, match="No option named") as error:
        compose("train", ["pruner=random", word])
    assert all(home in str(error.value) for home in homes)


def test_an_option_of_nothing():
    with pytest.raises(ZooError, match=r"No option named 'precison'\. Did you mean 'precision'"):
        compose("train", ["precison=fp32"])


@pytest.mark.parametrize(
    "option", ["steps=2", "teacher=x", "distiller.target=y", "lr_scale.llm=2", "teacher={store: a}"]
)
def test_a_stage_that_is_not_there(tmp_path, option):
    with pytest.raises(
        ZooError, match=r"No stage named 'aa'\. Did you mean 'a'\?.*write \+stages\.aa\.<option>=<value>"
    ):
        config(recipe(tmp_path, STAGES), f"stages.aa.{option}")


@pytest.mark.parametrize("added", [["+stages.c.steps=2", "+stages.c.lr=0.5"], ["++stages.c={steps: 2, lr: 0.5}"]])
def test_a_stage_that_is_added(tmp_path, added):
    stages = config(recipe(tmp_path, STAGES), *added).stages
    assert list(stages) == ["a", "b", "c"]
    assert (stages.c.steps, stages.c.lr, stages.c.batch_size) == (2, 0.5, 16)
    assert list(compose("train", ["recipe=null", *added]).stages) == ["c"]
    with pytest.raises(ZooError, match=r"No option of stage 'c' named 'stepps'\. Did you mean 'steps'"):
        config(recipe(tmp_path, STAGES), "+stages.c.stepps=2")
    with pytest.raises(ZooError, match=r"stage 'c'.*either steps or epochs"):
        config(recipe(tmp_path, STAGES), "+stages.c.lr=0.5")


@pytest.mark.parametrize("text", ["1e5", "012", "on", "null", "12:30", "true"])
def test_texts_in_a_dict(tmp_path, text):
    cfg = config(recipe(tmp_path, STAGES), f"stages.b.teacher={{model: x, attention: {text}, bits: 8}}")
    assert dict(cfg.stages.b.teacher) == {"model": "x", "attention": None if text == "null" else text, "bits": 8}
    cfg = config(recipe(tmp_path, STAGES), f"stages.b.teacher={{model: x, options: [a, {text}]}}")
    assert cfg.stages.b.teacher.options == ["a", text]


def test_numbers_in_a_dict_stay_numbers():
    line = "stages.a.lr_scale={llm: 1e5}"
    assert TextOptions({}).typed(line) == line


def test_another_distiller_takes_the_place_of_the_recipes(tmp_path):
    words = recipe(tmp_path, STAGES)
    cfg = config(words, "stages.a.distiller={name: llava_kd}")
    assert dict(cfg.stages.a.distiller) == {"name": "llava_kd"}
    cfg = config(words, "stages.a.distiller={name: dense}")  # the same one keeps what the recipe says of it
    assert cfg.stages.a.distiller.target == "masks"
    cfg = config(words, "stages.a.distiller={classes: [2, 3]}")
    assert cfg.stages.a.distiller == {"name": "dense", "target": "masks", "classes": [2, 3]}
    assert config(words, "stages.a.distiller.classes=[2]").stages.a.distiller.classes == [2]
    with pytest.raises(
        ZooError, match=r"stage 'a': No option of distiller 'dense' named 'clases'\. Did you mean 'classes'"
    ):
        config(words, "stages.a.distiller={clases: [2]}")


def test_another_teacher_takes_the_place_of_the_recipes(tmp_path):
    words = recipe(tmp_path, {"a": "steps: 1, teacher: {model: x, bits: 8}"})
    assert dict(config(words, "stages.a.teacher={store: there}").stages.a.teacher) == {"store": "there"}
    assert dict(config(words, "stages.a.teacher={dtype: float16}").stages.a.teacher)["model"] == "x"
