"""The training loop: what trains, what is logged, what a run leaves behind."""

import json
import os
import signal

import pytest
import torch

from tests.train_builders import config, losses, recipe
from zoo.registry import ZooError
from zoo.runs.folder import read_metrics
from zoo.training.loop import Run, main


def weights(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters()}


def moved(before, run):
    return {n.partition(".")[0] for n, p in run.model.named_parameters() if not p.equal(before[n])}


@pytest.fixture
def made(tmp_path):
    """`made(stages, *overrides) -> Run`, not yet started."""

    def make(stages, *more):
        return Run(config(recipe(tmp_path, stages), *more))

    return make


def test_two_stages_from_start_to_end(tmp_path, capsys):
    stages = {
        "warm": "steps: 2, batch_size: 4, train: [vision], distiller: dense, loss_weights: {answer: 0.0}",
        "all": "steps: 3, batch_size: 4, distiller: dense, loss_weights: {dense: 0.5}, optimizer: muon_adamw",
    }
    folder = main(config(recipe(tmp_path, stages)))
    rows = read_metrics(folder.metrics)
    assert [(r["step"], r["stage"], r["stage_step"]) for r in rows] == [
        (1, "warm", 1), (2, "warm", 2), (3, "all", 1), (4, "all", 2), (5, "all", 3)
    ]  # fmt: skip
    assert set(rows[0]["losses"]) == {"dense"} and set(rows[4]["losses"]) == {"answer", "dense"}
    assert rows[4]["loss"] == pytest.approx(rows[4]["losses"]["answer"] + 0.5 * rows[4]["losses"]["dense"])
    assert all({"lr", "images_per_s", "samples_per_s", "wait"} <= set(r) for r in rows)
    names = {"config.yaml", "zoo.lock", "metrics.jsonl", "checkpoints", "model", "tokenizer", "scores.json"}
    assert names <= {p.name for p in folder.path.iterdir()}
    assert (tmp_path / "last").samefile(folder.path)
    assert [p.name for p in folder.list_checkpoints()] == ["step-00000002", "step-00000005"]
    out = capsys.readouterr().out
    assert "majority" in out and "blind" in out and "relation" in out
    assert out.count("\n    zoo ") + out.count("\n    python ") == 3
    lock = json.loads(folder.lock.read_text())
    assert list(lock["model"]) == ["model.safetensors"] and len(lock["model"]["model.safetensors"]) == 64

    import zoo

    model, processor = zoo.load(f"dir:{folder.path}")
    assert processor.num_image_tokens == model.num_image_tokens == 16


def test_what_trains_and_what_stays(made):
    run = made({"a": "steps: 1, batch_size: 4, train: [projector], lr: 0.1"})
    before = weights(run)
    run.train()
    assert moved(before, run) == {"projector"}
    assert not run.model.vision.training and run.model.projector.training, "frozen parts are in eval mode"


def test_accumulation_changes_nothing(made, tmp_path):
    found = []
    for accumulate in (1, 2, 4):
        run = made(
            {"a": f"steps: 3, batch_size: 8, accumulate: {accumulate}, lr: 0.01"}, f"run.folder={tmp_path}/{accumulate}"
        )
        run.train()
        found.append(weights(run))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), abs=1e-5)
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=2e-5) and torch.allclose(value, found[2][name], atol=2e-5), (
            name
        )


def test_packing_and_buckets_change_no_loss(made, tmp_path):
    settings = {"rows": "", "apart": ", pack: none", "packed": ", pack_length: 700"}
    for name, more in settings.items():
        made({"a": f"steps: 2, batch_size: 4, lr: 0.0{more}"}, f"run.folder={tmp_path}/{name}").train()
    wanted = losses(tmp_path / "rows")
    assert losses(tmp_path / "apart") == pytest.approx(wanted, abs=1e-5)
    assert losses(tmp_path / "packed") == pytest.approx(wanted, abs=1e-5)


def test_the_loss_falls(made, tmp_path):
    run = made(
        {"a": "steps: 60, batch_size: 8, lr: 0.01, matrix_lr: 0.03, optimizer: muon_adamw"}, f"run.folder={tmp_path}/x"
    )
    run.train()
    values = list(losses(tmp_path / "x").values())
    assert sum(values[-5:]) / 5 < 0.5 * values[0]


def test_a_run_is_a_function_of_its_seed(made, tmp_path):
    stages = {"a": "steps: 3, batch_size: 4"}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made(stages, f"run.folder={tmp_path}/{name}", f"seed={seed}").train()
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_epochs_are_steps(made, tmp_path):
    made({"a": "epochs: 0.5, batch_size: 8"}, f"run.folder={tmp_path}/x").train()
    assert len(losses(tmp_path / "x")) == 3, "half of 40 samples, 8 at a time"


def test_a_distiller_goes_on_or_starts_afresh(made):
    stages = {n: f"steps: 1, batch_size: 4, distiller: {d}" for n, d in (("a", "dense"), ("b", "dense"), ("c", "null"))}
    run = made(stages)
    seen = []
    inner = run.teachers.distiller
    run.teachers.distiller = lambda stage: seen.append(inner(stage)) or seen[-1]
    run.train()
    assert seen[0] is seen[1] is not None and seen[2] is None


def test_checkpointing_and_bfloat16_run(made, tmp_path):
    stages = {
        "a": "steps: 2, batch_size: 4, lr: 0.0, gradient_checkpointing: true",
        "b": "steps: 2, batch_size: 4, lr: 0.0",
    }
    made(stages, f"run.folder={tmp_path}/x").train()
    made({"a": "steps: 2, batch_size: 4, lr: 0.0, precision: bf16"}, f"run.folder={tmp_path}/y").train()
    x, y = losses(tmp_path / "x"), losses(tmp_path / "y")
    x = {step: x[step] for step in y}
    assert y == pytest.approx(x, rel=0.02) and y != x


def test_evaluation_in_between_is_logged_and_changes_nothing(made, tmp_path):
    stage = "steps: 4, batch_size: 4, lr: 0.01"
    made({"a": stage}, f"run.folder={tmp_path}/x").train()
    made({"a": stage + ", eval_every: 2"}, f"run.folder={tmp_path}/y").train()
    assert losses(tmp_path / "x") == losses(tmp_path / "y")
    (scores,) = (r for r in read_metrics(tmp_path / "y" / "metrics.jsonl") if "scores" in r)
    assert scores["step"] == 2 and "scenes/exist/accuracy" in scores["scores"]


def test_sigterm_saves_and_leaves(made, tmp_path):
    run = made({"a": "steps: 50, batch_size: 4"}, f"run.folder={tmp_path}/x")
    inner = run._step

    def step(name, number, *rest):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        inner(name, number, *rest)

    run._step = step
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        run.train()
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert [p.name for p in run.folder.list_checkpoints()] == ["step-00000004"]
    assert len(losses(tmp_path / "x")) == 4


@pytest.mark.parametrize(
    ("stages", "more", "message"),
    [
        ({"a": "steps: 1, train: [visoin]"}, [], r"'visoin'. Did you mean 'vision'"),
        ({"a": "steps: 1, data: {scene: 1.0}"}, [], r"'scene'. Did you mean 'scenes'"),
        ({"a": "steps: 1, loss_weights: {answer: 0.0}"}, [], "answer is 0 and there is no distiller"),
        ({"a": "steps: 1, distiller: dense, loss_weights: {dens: 0.1}"}, [], r"'dens'. Did you mean 'dense'"),
        ({"a": "steps: 1"}, ["data.scenes.split=eval"], "no data to train on"),
        ({"a": "steps: 1"}, ["resume=nowhere"], "is not a run"),
    ],
)
def test_mistakes_are_named(made, stages, more, message):
    with pytest.raises(ZooError, match=message):
        made(stages, *more).train()


def test_what_others_left_in_accelerate_does_not_change_the_number_format():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from zoo.runs.processes import start_accelerator

    AcceleratorState._reset_state(reset_partial_state=False)
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    assert start_accelerator("cpu").mixed_precision == "no"
