"""The run folder: whole or not there, whatever stops the writer."""

import json
from datetime import datetime

import pytest
import torch

from tests.train_builders import saved
from zoo.registry import ZooError
from zoo.runs import checkpoint
from zoo.runs.folder import RunFolder, read_metrics, runs
from zoo.settings.config import compose
from zoo.storage.atomic import write_json, written_beside

NOON = datetime(2026, 11, 22, 12, 0, 0)


def test_create_never_shares_a_folder(tmp_path):
    one, two = (RunFolder.create(tmp_path, "a b/../c", now=NOON) for _ in range(2))
    assert one.path == tmp_path / "2026-11-22" / "12-00-00-a_b_.._c"
    assert two.path.name == "12-00-00-a_b_.._c-2"
    assert one.path.resolve().is_relative_to(tmp_path)


def test_an_exact_folder_is_not_overwritten(tmp_path):
    folder = RunFolder.create(tmp_path, "", exact=str(tmp_path / "x"))
    folder.config.write_text("seed: 0\n")
    with pytest.raises(ZooError, match=r"holds a run already.*resume="):
        RunFolder.create(tmp_path, "", exact=str(tmp_path / "x"))


def test_a_run_is_not_written_among_the_files_of_a_saved_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ZooError, match=r"holds a saved model\. Choose another folder"):
        RunFolder.create(tmp_path, "x", exact=str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_last_is_the_newest_and_moves(tmp_path):
    with pytest.raises(ZooError, match="There is no last run"):
        RunFolder.open("last", tmp_path)
    for name in ("a", "b"):
        folder = RunFolder.create(tmp_path, name, now=NOON)
        folder.config.write_text("seed: 0\n")
        folder.point_last(tmp_path)
        assert RunFolder.open("last", tmp_path).path.samefile(folder.path)
    assert len(runs(tmp_path)) == 2, "the link is no third run"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_last_of_a_root_that_is_not_there_yet(tmp_path):
    folder = RunFolder.create(tmp_path, "a", tmp_path / "elsewhere", now=NOON)
    folder.config.write_text("seed: 0\n")
    folder.point_last(tmp_path / "runs")
    assert RunFolder.open("last", tmp_path / "runs").path.samefile(folder.path)


def test_last_where_the_root_is_a_link_and_the_run_lies_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "large" / "disk").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "large" / "disk")
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create("runs", "a", "here", now=NOON)
    folder.config.write_text("seed: 0\n")
    folder.point_last("runs")
    assert RunFolder.open("last", "runs").path.samefile(folder.path)


def test_the_home_folder_is_found_behind_an_option(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    RunFolder.create(tmp_path, "a", tmp_path / "mine").config.write_text("seed: 0\n")
    assert RunFolder.open("~/mine").path == tmp_path / "mine"
    cfg = compose("train", ["run.dir=~/runs", "run.folder=~/mine", "features.folder='~/kept'"])
    assert [cfg.run.dir, cfg.run.folder] == [f"{tmp_path}/runs", f"{tmp_path}/mine"]
    assert cfg.features.folder == f"{tmp_path}/kept" and cfg.teach.folder == ""


def test_last_works_without_links(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path, "a", now=NOON)
    folder.config.write_text("seed: 0\n")
    monkeypatch.setattr("pathlib.Path.symlink_to", lambda *a, **k: (_ for _ in ()).throw(OSError("no links here")))
    folder.point_last(tmp_path)
    assert (tmp_path / "last").is_file()
    assert RunFolder.open("last", tmp_path).path.samefile(folder.path)


def test_opening_what_is_no_run_names_those_there_are(tmp_path):
    RunFolder.create(tmp_path, "a", now=NOON).config.write_text("seed: 0\n")
    with pytest.raises(ZooError, match=r"is not a run.*12-00-00-a"):
        RunFolder.open(str(tmp_path / "nothing"), tmp_path)


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    folder = RunFolder.create(tmp_path, "a", now=NOON)
    for step in (5, 100, 20):
        with folder.checkpoint(step, keep=2) as path:
            (path / "state").write_text(str(step))
            assert step not in [int(p.name[5:]) for p in folder.list_checkpoints()], "not there before it is whole"
    assert [p.name for p in folder.list_checkpoints()] == ["step-00000020", "step-00000100"]
    with pytest.raises(RuntimeError), folder.checkpoint(200, keep=2) as path:
        (path / "state").write_text("half")
        raise RuntimeError
    assert [int(p.name[5:]) for p in folder.list_checkpoints()] == [20, 100]
    (folder.checkpoints / ".step-00000300.writing").mkdir()  # a kill leaves it behind
    assert [int(p.name[5:]) for p in folder.list_checkpoints()] == [20, 100]
    with folder.checkpoint(300, keep=2) as path:
        assert not list(path.iterdir())


def test_written_beside_replaces_in_one_move(tmp_path):
    target = tmp_path / "scores.json"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError), written_beside(target) as beside:
        beside.write_text("{")
        raise RuntimeError
    assert json.loads(target.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]


def test_rewind_drops_later_steps_and_a_half_line(tmp_path):
    folder = RunFolder.create(tmp_path, "a", now=NOON)
    for step in range(1, 6):
        folder.log({"step": step, "loss": 1 / step})
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [r["step"] for r in read_metrics(folder.metrics)] == [1, 2, 3, 4, 5]
    assert folder.rewind(3) == 1
    folder.log({"step": 4, "loss": 0.25})
    assert read_metrics(folder.metrics) == [{"step": s, "loss": 1 / s} for s in (1, 2, 3, 4)]


BROKEN = [
    b'{"step": 6, "lo',
    b"\0\0\0\0",
    b"\xff\xfe{}",
    b"[1, 2]",
    b"7",
    b'{"loss": 1.0}',
    b'{"step": null}',
    b'{"step": 1e999}',
]


@pytest.mark.parametrize("line", BROKEN)
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_line_that_is_none_costs_itself_alone(tmp_path, line, at):
    folder = RunFolder.create(tmp_path, "a", now=NOON)
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 6)]
    lines = [json.dumps(row).encode() for row in rows]
    folder.metrics.write_bytes(b"\n".join([*lines[:at], line, *lines[at:]]))  # and no end of line behind the last
    assert read_metrics(folder.metrics) == rows
    folder.log({"step": 6, "loss": 0.1}, {"step": 7, "loss": 0.1})
    assert [r["step"] for r in read_metrics(folder.metrics)] == [1, 2, 3, 4, 5, 6, 7], "nor does the next one"
    assert folder.rewind(6) == 1
    assert folder.metrics.read_text().splitlines() == [json.dumps(r) for r in [*rows, {"step": 6, "loss": 0.1}]]


def test_rewind_keeps_a_row_once(tmp_path):
    folder = RunFolder.create(tmp_path, "a", now=NOON)
    rows = [{"step": 1, "loss": 1.0}, {"step": 1, "scores": {"x": 0.5}}, {"step": 2, "loss": 0.5}]
    folder.log(*rows, rows[2], rows[0])
    assert folder.rewind(2) == 0
    assert read_metrics(folder.metrics) == rows


def test_what_a_kill_left_is_cleaned(tmp_path):
    folder = RunFolder.create(tmp_path, "a", now=NOON)
    with folder.checkpoint(1, keep=2) as path:
        (path / "state").write_text("1")
    for name in ("checkpoints/.step-00000002.writing", ".model.writing", "checkpoints/.step-00000000.removing"):
        (folder.path / name).mkdir()
        (folder.path / name / "half").write_text("")
    (folder.path / ".scores.json.writing").write_text("{")
    (folder.path / ".git").mkdir()
    folder.clean()
    assert sorted(p.name for p in folder.path.iterdir()) == [".git", "checkpoints"]
    assert [p.name for p in folder.checkpoints.iterdir()] == ["step-00000001"]


def test_where_nothing_can_be_written_the_error_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    for asked in (
        {"root": tmp_path / "file", "name": "a"},
        {"root": tmp_path, "name": "", "exact": f"{tmp_path}/file/x"},
    ):
        with pytest.raises(ZooError, match=r"Cannot write a run folder.*Not a directory.*Choose another"):
            RunFolder.create(**asked)
    folder = RunFolder.create(tmp_path, "a", now=NOON)
    folder.metrics.mkdir()
    with pytest.raises(ZooError, match=rf"Cannot write metrics to .*Is a directory.*zoo train resume={folder.path}"):
        folder.log({"step": 1})


def test_what_is_no_trouble_of_the_disk_stays_what_it_is(tmp_path):
    folder = RunFolder.create(tmp_path, "a", now=NOON)
    with pytest.raises(TypeError), folder.writing("a thing"):
        raise TypeError
    with pytest.raises(ZooError, match=r"^as it was$"), folder.writing("a thing"):
        raise ZooError("as it was")


def test_the_lock_says_what_it_ran_on(tmp_path):
    folder = RunFolder.create(tmp_path, "a", now=NOON)
    folder.write_lock(plugins=["my_pruner"])
    lock = json.loads(folder.lock.read_text())
    assert lock["versions"]["torch"] == torch.__version__.partition("+")[0] or lock["versions"]["torch"]
    assert lock["plugins"] == ["my_pruner"]
    assert {"python", "cpu", "threads", "commit"} <= set(lock)


def test_a_checkpoint_brings_everything_back(tmp_path):
    def made():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        return net, torch.optim.AdamW(net.parameters(), fused=True)

    def step(net, optimizer, seed):
        net(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def named(net):
        return checkpoint.tensors_of(net)

    net, optimizer = made()
    step(net, optimizer, 1)
    newest = saved(tmp_path / "run", named(net), [optimizer], {"step": 1, "streams": {"s": [0, 3]}})
    step(net, optimizer, 2)

    other, its = made()
    checkpoint.load_weights(newest, named(other))
    checkpoint.load_optimizers(newest, [its], named(other))
    step(other, its, 2)
    state = checkpoint.verify(newest)
    assert state.items() >= {"format": 3, "step": 1, "streams": {"s": [0, 3]}}.items()
    assert its.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"], "a tuple again"
    for (name, a), b in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert a.equal(b), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_state_knows_what_is_not_finite(value):
    weights = {name: torch.full((4,), 3e38) for name in ("large", "bad", "other")}  # whose sum is not finite
    weights["bad"][2] = weights["other"][1] = value
    assert checkpoint.not_finite({n: weights[n] for n in ("large", "bad")}) == ["bad"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    newest = saved(tmp_path, {"model.a": torch.ones(3)})
    with pytest.raises(ZooError, match=r"'model\.a', which the model does not have"):
        checkpoint.load_weights(newest, {"b": torch.ones(3)})
    with pytest.raises(ZooError, match=r"\(3,\), the model has \(4,\)"):
        checkpoint.load_weights(newest, {"model.a": torch.ones(4)})
    checkpoint.load_weights(newest, {"b": torch.ones(3)}, "distiller.")
