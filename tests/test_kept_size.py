"""`zoo check` says what kept features take of a disk, where a frozen encoder would find them again."""

import pytest

from zoo.cli.check_command import main
from zoo.settings.config import compose

FROZEN = ["recipe=null", "model=scenes_tiny", "data=[scenes]", "data.scenes.scenes=50"]
TRAIN = "+stages.learn.train=[projector]"
EACH = 64 * 128 * 2  # bytes of an image of scenes_tiny in bf16


def notes(*words):
    return [n for n in main(compose("train", [*FROZEN, *words])).notes if "features" in n]


def test_it_is_proposed_where_images_come_again():
    (note,) = notes(TRAIN, "+stages.learn.steps=20", "+stages.learn.batch_size=10")
    assert "encodes each image 4 times: features.keep=bf16" in note and f"{EACH / 1e3:.1f} KB an image" in note
    assert f"{50 * EACH / 1e3:.0f} KB for 50 samples" in note


@pytest.mark.parametrize(
    "words",
    [
        (TRAIN, "+stages.learn.steps=2", "+stages.learn.batch_size=10"),
        ("+stages.learn.train=[all]", "+stages.learn.steps=20", "+stages.learn.batch_size=10"),
    ],
)
def test_images_that_come_once_or_train_the_encoder_are_not_mentioned(words):
    assert not notes(*words)


@pytest.mark.parametrize(
    "lengths, said",
    [
        ({"first": ("scenes", "epochs=1"), "second": ("scenes_basics", "epochs=1")}, ""),  # each image comes once
        ({"first": ("scenes", "epochs=1"), "second": ("scenes_basics", "epochs=2")}, "of data 'scenes_basics' 2 times"),
        (
            {"a": ("scenes", "steps=10"), "b": ("scenes", "steps=20"), "c": ("scenes_basics", "steps=1")},
            "each image of data 'scenes' 3 times",
        ),
    ],
)
def test_images_are_counted_by_their_data(lengths, said):
    words = ["data=[scenes,scenes_basics]", "data.scenes_basics.scenes=30"]
    for stage, (data, length) in lengths.items():
        words += [f"+stages.{stage}.train=[projector]", f"+stages.{stage}.{length}", f"+stages.{stage}.batch_size=5"]
        words += [f"+stages.{stage}.data={{{data}: 1.0}}"]
    found = notes(*words)
    assert (said in found[0] and len(found) == 1) if said else not found


def test_what_is_kept_is_stated_and_whether_it_has_room():
    words = (TRAIN, "+stages.learn.steps=2", "features.keep=int8")
    (note,) = notes(*words)
    assert (
        note.startswith(f"features.keep=int8 takes about {EACH * 8.5 / 16 / 1e3:.1f} KB an image")
        and "max_gb" not in note
    )
    (note,) = notes(*words, "features.max_gb=0.0001")
    assert "features.max_gb=0.0001: the rest is encoded in each pass" in note
