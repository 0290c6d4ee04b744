"""Starting: what the environment of a launcher may say, and what it may not change."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch

from tests.train_builders import config, recipe
from zoo.registry import ZooError
from zoo.runs import processes
from zoo.runs.processes import IGNORED, UNSUPPORTED, by_first, launcher_alone, start_accelerator
from zoo.training.loop import Run

SOURCES = [p.read_text() for p in Path(accelerate.__file__).parent.rglob("*.py")]
VARIABLES = sorted({name for text in SOURCES for name in re.findall(r"ACCELERATE_[A-Z0-9_]*[A-Z0-9]\b", text)})
TAKEN = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_FP8_BACKEND": "TE",
    "ACCELERATE_TORCH_DEVICE": "cpu",
}  # words that accelerate knows, where it is not yes or a number


@pytest.fixture
def as_it_was(monkeypatch):
    """Give accelerate back the state it had; the process may have several users of it."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    saved = [(state, dict(state._shared_state)) for state in (PartialState, AcceleratorState, GradientState)]
    flags = torch.backends.cuda.matmul.allow_tf32
    environment = dict(os.environ)
    yield
    for state, content in saved:
        state._shared_state.clear()
        state._shared_state.update(content)
    torch.backends.cuda.matmul.allow_tf32 = flags
    for name in set(os.environ) - set(environment):
        del os.environ[name]


def test_there_are_variables_to_try():
    assert {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION", *UNSUPPORTED} <= set(VARIABLES)


@pytest.mark.parametrize("value", ["true", "4"])
@pytest.mark.parametrize("name", VARIABLES)
def test_no_variable_wraps_what_is_trained(name, value, monkeypatch, as_it_was):
    """Each that the installed accelerate reads: a module is given back as it is, or the variable is refused by name."""
    from accelerate.state import PartialState

    monkeypatch.setenv(name, TAKEN.get(name, value))
    PartialState._reset_state()
    try:
        accelerator = start_accelerator("cpu")
    except ZooError as error:
        assert f"{name}={value}" in str(error)
        assert name in UNSUPPORTED or not name.startswith(IGNORED)
        return
    module = torch.nn.Linear(2, 2)
    with launcher_alone():
        prepared = accelerator.prepare_model(module)
    assert prepared is module and "forward" not in vars(module) and not hasattr(module, "_original_forward")
    assert accelerator.mixed_precision == "no" and accelerator.scaler is None
    assert not torch.backends.cuda.matmul.allow_tf32


def test_accumulation_of_the_environment_changes_no_weight(tmp_path, monkeypatch):
    found = []
    for name, steps in (("plain", None), ("set", "4")):
        if steps:
            monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        stages = {"a": "steps: 2, batch_size: 4, accumulate: 2, optimizer: adamw, clip: 0"}
        with Run(config(recipe(tmp_path, stages), f"run.folder={tmp_path / name}")) as run:
            run.train()
        found.append({n: p.detach().clone() for n, p in run.model.named_parameters()})
    assert all(found[0][name].equal(found[1][name]) for name in found[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ZooError, match="device=cuda was asked for, but this process would run on cpu"):
        start_accelerator("cuda")


class Two:
    """The second of two processes, or the first, as far as `by_first` looks."""

    num_processes = 2

    def __init__(self, first):
        self.is_main_process = first


def test_an_error_of_the_first_process_ends_the_others_in_silence(monkeypatch):
    sent = []
    monkeypatch.setattr("zoo.runs.processes.broadcast", lambda _, value: sent.append(value) or sent[0])

    def fail():
        raise ZooError("why")

    with pytest.raises(ZooError, match="why"):
        by_first(Two(True), fail)
    with pytest.raises(SystemExit) as left:
        by_first(Two(False), lambda: pytest.fail("the first one alone does it"))
    assert left.value.code == 2
    sent[:] = [(True, 7)]
    assert by_first(Two(False), lambda: 0) == 7


class Alone:
    """A process on a machine with two GPUs, as far as `_use_device` looks."""

    def __init__(self, processes=1):
        self.state = SimpleNamespace(device=torch.device("cuda"))
        self.num_processes = processes

    @property
    def device(self):
        return self.state.device


def test_a_device_that_is_named_by_its_number_is_used_or_refused(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    alone = Alone()
    processes._use_device(alone, torch.device("cuda"))
    assert alone.device == torch.device("cuda") and not chosen
    processes._use_device(alone, torch.device("cuda:1"))
    assert alone.device == torch.device("cuda:1") and chosen == [alone.device]
    with pytest.raises(ZooError, match="device=cuda:2 was asked for, and there are 2, counted from cuda:0"):
        processes._use_device(alone, torch.device("cuda:2"))
    with pytest.raises(ZooError, match="device=cuda:0 is one device, and the launcher started 2 processes"):
        processes._use_device(Alone(2), torch.device("cuda:0"))
    assert chosen == [torch.device("cuda:1")]


def test_accelerate_runs_where_its_state_says(as_it_was):
    accelerator = start_accelerator("cpu")
    accelerator.state.device = torch.device("meta")
    assert accelerator.device == torch.device("meta") and start_accelerator("cpu:0").device.type == "cpu"
