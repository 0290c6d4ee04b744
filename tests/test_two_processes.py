"""Two CPU processes that really are two: one run folder, the losses of one process, no hang without images.

The first test starts them by torchrun, as a person does; the others fork them from a server that has imported all.
"""

import json
import shutil
import subprocess

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader

import zoo
from tests import killed_runs, two_processes_fsdp
from tests.teacher_builders import KD, save_teacher
from tests.test_loader import Numbers
from tests.train_builders import config, losses, recipe, start
from zoo.evaluation.evaluate import evaluate
from zoo.runs.folder import RunFolder
from zoo.runs.order import Mix
from zoo.storage.atomic import remove
from zoo.storage.safetensors_file import value_of
from zoo.storage.sharded import listing_of_parts
from zoo.training.loop import Run

# The dense loss is a mean over forward passes, so it has weight 0 where figures are compared.
STAGES = {
    "a": "steps: 2, batch_size: 8, train: [vision, projector], lr: 0.01",
    "b": "steps: 4, batch_size: 8, accumulate: 2, optimizer: muon_adamw, distiller: dense, loss_weights: {dense: 0.0}",
    "c": f"steps: 2, accumulate: 2, {KD}",
}

MIXED = '''
from dataclasses import dataclass
import numpy as np
from zoo.registry import Dialog, Sample, register


@dataclass
class MixedConfig:
    size: int = 8


@register("dataset", "mixed")
class Mixed:
    """Every other sample is text alone."""

    def __init__(self, config: MixedConfig) -> None:
        self.config = config

    def __len__(self):
        return self.config.size

    def get(self, index, epoch=0):
        images = [np.full((32, 32, 3), index, dtype=np.uint8)] if index % 2 else []
        asked = [{"type": "image"}] * len(images) + [{"type": "text", "text": "what is it?"}]
        said = [{"type": "text", "text": "picture" if images else "text"}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        return Sample(str(index), images, [Dialog(turns)])
'''


@pytest.fixture(scope="module", autouse=True)
def server():
    with killed_runs.served():
        yield


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tokenizer):
    """The stages, the last with a teacher, and the words that give the student its tokenizer."""
    teacher = save_teacher(tmp_path_factory.mktemp("teacher") / "model", tokenizer)
    stages = {name: fields.replace("{teacher}", teacher) for name, fields in STAGES.items()}
    return stages, f"tokenizer.checkpoint='model:{teacher}'"


def forked(place, words):
    """Run `zoo train` with these words in two processes, from a folder of its own."""
    ended = killed_runs.train(place / "forked", words, processes=2)
    assert ended.code == 0, ended.said


def finished(process):
    """Wait for both processes; what they said is shown where it went wrong."""
    try:
        out, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, _ = process.communicate(timeout=30)
        raise AssertionError(f"the processes hang:\n{out}") from None
    assert process.returncode == 0, out
    return out


# The reference trains in this process, where other tests may have left another float32 kernel: hence relative bounds.
def test_two_processes_train_as_one(tmp_path, taught):
    stages, tokens = taught
    Run(config(recipe(tmp_path, stages), tokens, f"run.folder={tmp_path / 'one'}")).train()
    out = finished(start([*recipe(tmp_path, stages), tokens, "run.name=two", "limit=2"], processes=2))
    (folder,) = [p.parent for p in tmp_path.glob("*/*two*/config.yaml")]
    assert json.loads((folder / "zoo.lock").read_text())["processes"] == 2
    assert (tmp_path / "last").samefile(folder)
    assert out.count("Trained in") == 1, "one process speaks"
    assert losses(folder) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").open()]
    assert sorted({p["id"] for p in predictions}) == ["eval-0", "eval-1"], "they share the samples and hand them in"


def test_an_encoder_with_batch_norms_trains_as_on_one_process(tmp_path):
    """Their statistics are fixed, so that no rank has its own."""
    stages = {"a": "steps: 3, batch_size: 4, accumulate: 2, lr: 0.01"}
    vision = ["vision.model=test_efficientnet", "vision.image_size=64", "vision.layer=-2", "vision.stage=-2"]
    words = [*recipe(tmp_path, stages), *vision]
    forked(tmp_path, [*words, f"run.folder={tmp_path / 'two'}"])
    Run(config([*words, f"run.folder={tmp_path / 'one'}"])).train()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_a_rank_without_images_does_not_hang(tmp_path):
    (tmp_path / "mixed.py").write_text(MIXED)
    order = Mix({"mixed": Numbers(8)}, {}, 0).places(0, 12)
    kinds = [{index % 2 for _, _, index in order[i : i + 2]} for i in range(0, 12, 2)]
    assert {0, 1} in kinds, "some step has one rank with and one without images"
    stages = {"a": "steps: 6, batch_size: 2, lr: 0.01"}
    words = [*recipe(tmp_path, stages), f"plugins=[{tmp_path / 'mixed.py'}]", "data=[mixed]"]
    one, two = ([*words, f"run.folder={tmp_path / n}"] for n in ("one", "two"))
    forked(tmp_path, two)
    Run(config(one)).train()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_an_adapter_that_reads_images_does_not_hang_on_a_rank_without(tmp_path):
    (tmp_path / "mixed.py").write_text(MIXED)
    sizes = ("rank=2", "skip=1", "width=8", "depth=1", "num_heads=2")
    stages = {"a": "steps: 4, batch_size: 2, lr: 0.01, train: [adapter, llm]"}
    words = [*recipe(tmp_path, stages), f"plugins=[{tmp_path / 'mixed.py'}]", "data=[mixed]", "projector=null"]
    words += ["adapter=[vlora]", *(f"adapter.vlora.{size}" for size in sizes)]
    forked(tmp_path, [*words, f"run.folder={tmp_path / 'two'}"])
    assert len(losses(tmp_path / "two")) == 4


def test_sharded_parameters_train_as_whole_ones(tmp_path, taught):
    stages, tokens = taught
    (tmp_path / "stages.json").write_text(json.dumps(taught))
    alone = Run(config(recipe(tmp_path, stages), tokens, f"run.folder={tmp_path / 'one'}"))
    alone.train()
    ended = killed_runs.call_in_two(tmp_path, two_processes_fsdp.main, tmp_path)
    assert ended.code == 0, ended.said
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    sharded = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, p in alone.model.named_parameters():
        # Muon iterates in bfloat16, where the last bit of a gradient may turn one in 256 of a step of 0.02.
        assert torch.allclose(sharded[f"model.{name}"], p, atol=1e-3), name
    saved, processor = zoo.load(f"dir:{tmp_path / 'run'}", device="cpu")
    again = evaluate(saved, processor, alone.data.evaluation, limit=3)
    assert json.loads((tmp_path / "answers.json").read_text()) == [again.predictions, again.summary()]
    assert all(p.equal(sharded[f"model.{name}"]) for name, p in saved.named_parameters())


def test_checkpoints_go_on_in_another_number_of_processes(tmp_path):
    """From one to four, and from two groups of two (HSDP) to one, with the states of both optimisers."""
    stages = {"a": "steps: 3, batch_size: 8, checkpoint_every: 1, lr: 0.001, optimizer: muon_adamw"}
    words = [*recipe(tmp_path, stages), two_processes_fsdp.SHARDED]
    Run(config([*words, f"run.folder={tmp_path / 'one'}"])).train()
    shutil.copytree(cut(tmp_path, "one"), tmp_path / "one_cut2")
    ended = killed_runs.call_in_two(tmp_path, two_processes_fsdp.go_on, tmp_path, words, processes=4)
    assert ended.code == 0, ended.said
    parts = [f"{kind}-{i:05d}-of-00002.safetensors" for kind in ("optimizers", "weights") for i in (1, 2)]
    newest = RunFolder(tmp_path / "groups").list_checkpoints()[-2]
    assert {p.name for p in newest.iterdir()} == {"SHA256SUMS", *parts, "state.json"}
    cut(tmp_path, "groups")
    Run(config(["--config-dir", words[1], f"resume={tmp_path / 'groups_cut'}"])).train()
    whole = weights_of(tmp_path / "one")
    for name in ("one_cut", "one_cut2", "groups", "groups_cut"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-6), name
        for key, weight in weights_of(tmp_path / name).items():
            assert torch.allclose(weight, whole[key], atol=2e-4), f"{key} of {name}"  # of steps of 0.02 in bfloat16
    # The files are those that torch's own reader takes.
    found = {n: torch.zeros(t.shape) for n, t in whole.items()}
    torch.distributed.checkpoint.load(found, storage_reader=HuggingFaceStorageReader(str(newest)), no_dist=True)
    mine = weights_of(tmp_path / "groups", -2)
    assert all(found[n].equal(t) for n, t in mine.items())


def cut(place, name):
    """Copy a run as if it had been killed ahead of its last checkpoint; returns the folder of the copy."""
    folder = RunFolder(shutil.copytree(place / name, place / f"{name}_cut"))
    remove(folder.list_checkpoints()[-1])
    return folder.path


def weights_of(folder, which=-1):
    parts = RunFolder(folder).list_checkpoints()[which].glob("weights*")
    return {n: value_of(t) for n, t in listing_of_parts(sorted(parts)).items()}
