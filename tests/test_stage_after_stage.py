"""What a stage leaves behind for the next one, and what is logged of its steps."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import sample
from zoo.runs.optim import build_optimizers, parts_of
from zoo.runs.processes import start_accelerator
from zoo.runs.step_log import _line
from zoo.settings.stage import Stage
from zoo.teaching.teacher import Teacher
from zoo.training import stage_teachers
from zoo.training.stage_teachers import StageTeachers
from zoo.training.step import Engine

TINY = {"name": "timm", "image_size": 32, "patch_size": 8, "width": 32, "heads": 2, "depth": 1, "layer": -1}


def test_what_a_stage_asks_of_the_encoder_ends_with_it(make_model):
    """`dense` with labels of images reads [CLS]; the stage behind it does not."""
    from zoo.composed.assembly import build_distiller

    model, _ = make_model(vision={**TINY, "cls_token": True})
    before = model.requested
    node = {"name": "dense", "classes": [2], "cls_classes": [2]}
    stage = Stage(steps=1, train=["vision"], loss_weights={"answer": 0.0}, distiller=node)
    engine = Engine(start_accelerator("cpu"), model, stage, 1, distiller=build_distiller(model, node))
    assert model.requested == before | {"prefix_tokens"}
    engine.release()
    assert model.requested == before
    engine.release()
    assert model.requested == before


def test_what_has_no_weights_is_in_training_and_what_is_frozen_is_not(make_model):
    """A pruner that draws anew in training has to learn of it; an adapter beside one that trains is in evaluation."""
    random = {"random": {"name": "random", "keep_ratio": 0.5, "resample": True}}
    adapters = {"upcycle": {"name": "upcycle"}, "mole": {"name": "mole", "rank": 2}}
    model, processor = make_model(pruner=random, adapter=adapters)
    stage = Stage(steps=1, batch_size=1, train=["adapter.mole"])
    engine = Engine(start_accelerator("cpu"), model, stage, 1)
    found = {n: part.training for n, part in [*model.pruner.items(), *model.adapter.items(), *model.named_children()]}
    assert {n for n, on in found.items() if on} >= {"random", "mole"}
    assert not any(found[n] for n in ("upcycle", "vision", "projector", "llm"))
    batch = processor.collate([processor.encode(sample(("what", "red")))])
    draws = [model(**batch).image_kept.keep for _ in range(8)]
    assert any(not torch.equal(keep, draws[0]) for keep in draws)
    engine.release()


def test_a_pass_without_images_has_no_loss_of_images(make_model):
    """It ended the run, where the answer loss has weight 0, once all samples of a pass were texts."""
    from zoo.composed.assembly import build_distiller

    model, processor = make_model(vision=TINY)
    node = {"name": "dense", "classes": [2]}
    stage = Stage(steps=1, batch_size=2, accumulate=2, train=["vision"], loss_weights={"answer": 0.0}, distiller=node)
    distiller = build_distiller(model, node)
    engine = Engine(start_accelerator("cpu"), model, stage, 1, distiller=distiller, precision="fp32")
    shown, text = sample(("what", "red")), sample(("what", "red"), images=0)
    shown.targets = {"patch_labels": torch.zeros(1, model.vision.num_tokens, 1, dtype=torch.long).numpy()}
    with torch.no_grad():
        labels = {"targets": {"patch_labels": torch.from_numpy(shown.targets["patch_labels"])}}
        images = processor.collate([processor.encode_images(shown)])["pixel_values"]
        wanted = distiller(model(pixel_values=images, run_llm=False), None, labels)["dense"] / 2
    losses, _ = engine.run(0, 0, [processor.collate([processor.encode_images(s)]) for s in (shown, text)], False)
    assert losses.keys() == {"dense"} and losses["dense"].item() == pytest.approx(wanted.item())
    assert engine.run(0, 1, [processor.collate([processor.encode_images(text)])] * 2, False)[0] == {}


def test_a_teacher_is_held_for_its_stage_alone(make_model):
    """The next one may be loaded before the accelerator forgets the step that ran with it."""
    student, _ = make_model(seed=1)
    engine = Engine(start_accelerator("cpu"), student, Stage(steps=1), 1, teacher=Teacher(make_model(seed=2)[0]))
    held = weakref.ref(engine.unwrapped.teacher.model)
    engine.release()
    gc.collect()
    assert held() is None


@pytest.fixture
def teachers(monkeypatch):
    """Stages' teachers whose models are the calls that load them."""
    loaded: list[str] = []

    def load(node, device, precision):
        loaded.append(precision)
        model = SimpleNamespace(llm=SimpleNamespace(max_positions=None))
        return model, SimpleNamespace(tokenizer=None)

    monkeypatch.setattr(stage_teachers, "load_teacher", load)
    monkeypatch.setattr(stage_teachers, "shared_tokens", lambda *_: None)
    monkeypatch.setattr(stage_teachers, "Teacher", lambda model, *_: model)
    monkeypatch.setattr(stage_teachers, "TeacherRows", lambda *_: None)
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    run = SimpleNamespace(accelerator=accelerator, processor=SimpleNamespace(tokenizer=None))
    run.precision_of = lambda stage: stage.precision
    return StageTeachers(run), loaded


@pytest.mark.parametrize(
    ("teacher", "precisions", "loads"),
    [
        ("mine", ["bf16", "bf16"], ["bf16"]),
        ("mine", ["bf16", "fp32"], ["bf16", "fp32"]),
        ({"model": "mine", "dtype": "bfloat16"}, ["bf16", "fp32"], ["bf16"]),
        ("mine", ["bf16", "", "bf16"], ["bf16", "bf16"]),
    ],
    ids=["shared", "another precision", "a dtype of its own", "a stage without it between"],
)
def test_a_teacher_has_the_numbers_that_its_stage_would_load(teachers, teacher, precisions, loads):
    """As a run has them that is resumed in that stage."""
    found, loaded = teachers
    for precision in precisions:
        given = {"teacher": teacher} if precision else {}
        model, _ = found.teacher(Stage(steps=1, precision=precision, **given), None)
        assert (model is None) is not bool(precision) and len(found.loaded) == bool(precision)
    assert loaded == loads


def test_the_rate_that_is_logged_is_that_of_parts_without_a_scale(make_model):
    model, processor = make_model()
    stage = Stage(steps=2, batch_size=1, lr=0.01, lr_scale={"vision": 3.0, "projector": 0.1}, warmup_ratio=1.0)
    engine = Engine(start_accelerator("cpu"), model, stage, 2)
    engine.run(0, 0, [processor.collate([processor.encode(sample(("what", "red")))])], False)
    assert engine.rate == pytest.approx(0.005)
    assert {round(g["lr"], 6) for g in engine.optimizers[0].param_groups} == {0.015, 0.0005, 0.005}


def test_losses_are_averaged_over_all_processes():
    """As gradients are: a process without images has divided nothing by the images of the step."""
    record = {"step": 1, "stage": "a", "stage_step": 1, "weights": {"visual": 2.0}, "images": 3, "samples": 4}
    record |= {"lr": 0.1, "wait": 0.0}
    # Three images in the first of two processes, whose losses sum to 6: the mean over images is 2.
    found = _line(0, [[(record, {"answer": 1.0, "visual": 6.0 / (3 / 2)})], [(record, {"answer": 3.0})]], 1.0)
    assert found["losses"] == {"answer": 2.0, "visual": 2.0} and found["loss"] == 6.0


def test_names_of_weights_are_those_of_checkpoints_where_an_adapter_wraps_layers(make_model):
    """In `train`, `freeze` and `lr_scale`; a pattern over whole names would else mean the layers without one."""
    lora = {"lora": {"name": "lora", "rank": 2, "targets": ["*.layers.0.*.q_proj"]}}
    model, _ = make_model(adapter=lora)
    pattern, width = "llm.lm.model.layers.*.q_proj.weight", model.llm.hidden_size
    assert model.set_trainable([pattern]) == {"llm": 2 * width * width}
    assert model.set_trainable(["llm"], [pattern])["llm"] == model.set_trainable(["llm"])["llm"] - 2 * width * width
    stage = Stage(steps=1, lr=0.01, lr_scale={pattern: 0.5})
    groups = build_optimizers({"": model}, stage, parts_of(model))[0].param_groups
    scaled = [p for group in groups for p in group["params"] if group["lr"] == 0.005]
    assert sum(p.numel() for p in scaled) == 2 * width * width
