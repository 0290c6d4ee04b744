"""Messages of libraries that a person cannot act on are not shown; each is shown without what quietens it."""

import sys
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import zoo
from zoo.registry import quiet

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def logged():
    """Show transformers' log and bars as a command does, and whatever they write."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    yield
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.WARNING, True), "put back"
    logging.set_verbosity(level)
    if not bars:
        logging.disable_progress_bar()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=True, **SIZES)).save_pretrained(folder)
    return folder


def test_loading_a_checkpoint_and_adding_rows_and_lora(checkpoint, logged, capfd, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    logging.warning_once.cache_clear()  # an earlier test of this process may have met the notice
    lm = AutoModelForCausalLM.from_pretrained(checkpoint)
    lm.resize_token_embeddings(60)
    said = capfd.readouterr().err + caplog.text
    assert "Loading weights" in said and "resizing" in said, "transformers writes less today: remove what quietens it"
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        words = [
            "vision=timm",
            "vision.image_size=32",
            "vision.width=16",
            "vision.depth=2",
            "vision.heads=2",
            "projector=mlp",
        ]
        model, _ = zoo.compose(
            *words, "llm=hf", f"llm.checkpoint={checkpoint}", "adapter=[lora]", "tokenizer.checkpoint=model:scenes_tiny"
        )
    assert model.llm.vocab_size > 40
    assert capfd.readouterr().err == "" and caplog.text == ""
    assert all(str(w.message).startswith("vision 'timm' starts from random weights") for w in caught), caught


def test_a_bar_and_a_log_are_quiet_inside_alone(logged, capfd):
    with quiet.no_progress_bar(), quiet.errors_alone():
        assert not logging.is_progress_bar_enabled() and logging.get_verbosity() == logging.ERROR
    with pytest.raises(RuntimeError), quiet.no_progress_bar(), quiet.errors_alone():
        raise RuntimeError


def test_a_known_warning_is_left_out_and_others_are_not():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet.no_warning_of("known", "(?s).*tied"):
            warnings.warn("known thing", stacklevel=1)
            warnings.warn("weights\nare tied", stacklevel=1)
            warnings.warn("another", stacklevel=1)
        warnings.warn("known thing", stacklevel=1)
    assert [str(w.message) for w in caught] == ["another", "known thing"]


def test_a_command_shows_warnings_as_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys, "warnoptions", [])
    before = warnings.showwarning
    with quiet.for_people():
        warnings.warn("pruner 'x' keeps\nall", stacklevel=1)
        for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.warn("use another function of this library", kind, stacklevel=1)
    assert capsys.readouterr().err == "zoo: pruner 'x' keeps all\n" and warnings.showwarning is before
    monkeypatch.setattr(sys, "warnoptions", ["always"])
    with quiet.for_people():
        assert warnings.showwarning is before
