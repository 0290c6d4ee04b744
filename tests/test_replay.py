"""`zoo train lock=RUN`: the same losses to the bit, or which of versions, hashes, data and config differ."""

import json
import shutil
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.train_builders import config, losses, recipe
from zoo.cli.entry import main as command
from zoo.registry import ZooError, build
from zoo.runs.folder import RunFolder
from zoo.runs.replay import data_facts, replayed, verdict
from zoo.training.loop import Run, main


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    place = tmp_path_factory.mktemp("replay")
    return recipe(place, {"a": "steps: 3, batch_size: 4, lr: 0.01"})


@pytest.fixture(scope="module")
def before(words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        return main(config(words, "seed=5"))


@pytest.fixture
def copied(before, tmp_path):
    """A copy of the run, to be changed."""
    shutil.copytree(before.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def given(run, tmp_path, *more):
    from zoo.settings.config import compose

    return compose("train", [f"lock={run.path}", f"run.dir={tmp_path}/again", *more])


def test_the_same_losses_to_the_bit(before, tmp_path, capsys):
    again = main(given(before, tmp_path, "run.name=mine"))
    assert again.path != before.path and again.path.name.endswith("mine") and losses(again.path) == losses(before.path)
    out = capsys.readouterr().out
    assert f"Replaying {before.path.resolve()}.\n" in out and "different here" not in out
    assert "The losses of all 3 steps are those of" in out and "weights are equal to the bit" in out
    lock = json.loads(again.lock.read_text())
    assert lock["data"]["scenes"]["records"] == 40 and len(lock["data"]["scenes"]["content"]) == 64


def test_losses_that_differ_are_shown_from_their_first_step(before, copied):
    rows = [json.loads(line) for line in before.metrics.read_text().splitlines()]
    changed = [{**row, "loss": row["loss"] + 1e-9} if row.get("step") == 2 and "loss" in row else row for row in rows]
    copied.metrics.write_text("".join(json.dumps(row) + "\n" for row in changed))
    (line, weights) = verdict(before.path, copied)
    assert "Losses differ from" in line and "from step 2 on" in line and "equal to the bit" in weights


def test_versions_and_the_machine_are_noted(copied, tmp_path):
    lock = json.loads(copied.lock.read_text())
    lock["versions"]["torch"], lock["threads"], lock["processes"] = "1.0", 96, 8
    del lock["data"]
    copied.lock.write_text(json.dumps(lock))
    cfg, notes = replayed(given(copied, tmp_path))
    assert cfg.seed == 5 and cfg.stages.a.lr == 0.01
    assert any(note.startswith("torch ") and note.endswith("was 1.0") for note in notes)
    assert any("was 96" in note for note in notes) and "processes 1, was 8" in notes
    assert any("no hash of the data" in note for note in notes)


def test_records_of_equal_number_have_a_hash_of_what_they_say_and_show(tmp_path):
    def content(answer, color):
        Image.new("RGB", (8, 8), color).save(tmp_path / "a.png")
        row = {"image": "a.png", "question": "Which color?", "answer": answer}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        data = SimpleNamespace(all={"mine": build("dataset", {"name": "chat_json", "file": f"{tmp_path}/rows.jsonl"})})
        return data_facts(data)["mine"]["content"]

    first = content("red", "red")
    assert first == content("red", "red") and len({first, content("blue", "red"), content("red", "blue")}) == 3


def _data(lock, run):
    lock["data"]["scenes"]["content"] = "0" * 64


def _records(lock, run):
    lock["data"]["scenes"]["records"] = 41


def _config(lock, run):
    run.config.write_text(run.config.read_text().replace("lr: 0.01", "lr: 0.02"))


@pytest.mark.parametrize(
    "change, why",
    [
        (_data, "data scenes: other records"),
        (_records, "data scenes: 40 records, was 41"),
        (_config, "config: config.yaml"),
    ],
)
def test_another_run_is_refused_before_it_begins(copied, tmp_path, change, why):
    lock = json.loads(copied.lock.read_text())
    change(lock, copied)
    copied.lock.write_text(json.dumps(lock))
    with pytest.raises(ZooError, match=f"another run.*\n.*{why}"):
        main(given(copied, tmp_path))
    assert not (tmp_path / "again").exists()


def test_weights_that_were_changed_are_found(copied, tmp_path):
    lock = json.loads(copied.lock.read_text())
    lock["started_from"] = {"model": "x", "fingerprint": "0" * 64}
    copied.lock.write_text(json.dumps(lock))
    text = (
        copied.config.read_text()
        .replace("source: preset", "source: dir")
        .replace("  name: scenes_tiny\n", f"  name: {copied.model}\n", 1)
    )
    copied.config.write_text(text)
    lock["config"] = None
    copied.lock.write_text(json.dumps(lock))
    with pytest.raises(ZooError, match=r"weights that it began on in .*fingerprint .*, was 000000000000"):
        replayed(given(copied, tmp_path))


def test_options_beside_it_are_refused(before, capsys):
    assert command(["train", f"lock={before.path}", "seed=3"]) == 2
    assert (
        "trains once more with the options that the run was started with; it cannot take seed=3"
        in capsys.readouterr().err
    )
    assert command(["train", "lock=nowhere"]) == 2
    assert "is not a run" in capsys.readouterr().err


def test_a_replay_that_was_killed_goes_on_and_compares(before, tmp_path, capsys):
    cfg, _ = replayed(given(before, tmp_path))
    with Run(cfg) as run:
        run.train()
    from tests.train_builders import losses as found

    assert len(found(run.folder.path)) == 3
    from zoo.settings.config import compose

    main(compose("train", [f"resume={run.folder.path}"]))
    assert "The losses of all 3 steps are those of" in capsys.readouterr().out
