"""A teacher in the training loop: never changed, matched by what positions are, whatever the batch looks like."""

from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ANSWERS, QUESTIONS, sample
from tests.teacher_builders import KD, save_teacher, taught
from tests.train_builders import losses, train_up_to
from zoo import registry
from zoo.composed.outputs import Seen
from zoo.registry import Cut, ZooError
from zoo.runs.folder import read_metrics
from zoo.settings.stage import Stage
from zoo.teaching.teacher import Teacher, TeacherRows
from zoo.text.batch import TEACHER_ROWS
from zoo.text.tokenizer import shared_tokens
from zoo.training.loop import Run
from zoo.training.step import Counts, TrainStep, count_images, count_labels
from zoo.vision.images.processors import Pictures, as_clip

STAGE = {"steps": 1, "distiller": "llava_kd", "teacher": "t"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "model", tokenizer)


def samples():
    """Several dialogs about one image, one about two, and text alone."""
    pairs = list(zip(QUESTIONS, ANSWERS, strict=False))
    return [sample(*pairs[:3]), sample(pairs[3], images=2, seed=4), sample(pairs[4], images=0)]


def rows(processor, own, which=None):
    twins = TeacherRows(processor, own)
    chosen = samples() if which is None else [samples()[i] for i in which]
    return [row for s in chosen for row in twins.add(s, [s], [own.encode(s)])]


def step_of(make_model, pruned=True, **options):
    """A training step of a student and a teacher of other sizes, and their processors."""
    pruner = {"pruner": {"random": {"keep_ratio": 0.5}}} if pruned else {}
    student, own = make_model(seed=1, **pruner)
    model, theirs = make_model(seed=2, llm={**LLM, "hidden_size": 48, "num_layers": 3})
    distiller = registry.build("distiller", {"name": "llava_kd", **options})
    stage = Stage(**STAGE)
    return TrainStep(student, distiller, Teacher(model, distiller.needs), stage), own, theirs


LLM = {"name": "hf", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 512}


def run_step(step, batch):
    return step(batch, Counts(count_labels(batch), count_images(batch)))


def test_a_run_learns_and_the_teacher_does_not(tmp_path, teacher):
    cfg = taught(tmp_path, teacher, {"dft": f"steps: 12, {KD}"}, f"run.folder={tmp_path / 'run'}")
    run = Run(cfg)
    before = {}

    def remember(stage, distiller, inner=run.teachers.teacher):
        found = inner(stage, distiller)
        before.update({n: p.clone() for n, p in found[0].model.named_parameters()})
        return found

    run.teachers.teacher = remember
    run.train()
    (taught_by, _), *_ = run.teachers.loaded.values()
    assert all(p.equal(before[n]) and p.grad is None for n, p in taught_by.named_parameters())
    assert not taught_by.training and not any(p.requires_grad for p in taught_by.parameters())
    found = [r["losses"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert found[0].keys() == {"answer", "response", "visual", "relation"}
    assert found[-1]["response"] < found[0]["response"] and found[-1]["visual"] < found[0]["visual"]
    line = next(r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r)
    parts = line["losses"]
    assert line["loss"] == pytest.approx(sum(parts.values()) - 0.5 * parts["relation"])


STAGES = {"pt": f"steps: 3, checkpoint_every: 2, {KD}".replace("[all]", "[projector]"), "ft": f"steps: 4, {KD}"}


def test_killed_in_any_stage_a_run_goes_on_bit_for_bit(tmp_path, teacher):
    warm = {"pt": STAGES["pt"], "ft": f"checkpoint_every: 2, {STAGES['ft']}".replace("llava_kd", WARM)}
    Run(taught(tmp_path, teacher, warm, f"run.folder={tmp_path / 'whole'}")).train()
    whole = losses(tmp_path / "whole")
    for at in (2, 5):
        folder = tmp_path / f"cut{at}"
        train_up_to(Run(taught(tmp_path, teacher, warm, f"run.folder={folder}")), at)
        Run(taught(tmp_path, teacher, warm, f"resume={folder}")).train()
        assert losses(folder) == whole


def test_a_stage_does_not_go_on_with_a_teacher_that_was_trained_on(tmp_path, tokenizer):
    name, stage = save_teacher(tmp_path / "model", tokenizer), f"steps: 2, checkpoint_every: 1, {KD}"
    train_up_to(Run(taught(tmp_path, name, {"a": stage}, f"run.folder={tmp_path / 'run'}")))
    save_teacher(tmp_path / "model", tokenizer, seed=6)
    with pytest.raises(ZooError, match=r"Stage 'a' began with its teacher 'dir:.*' in another state"):
        Run(taught(tmp_path, name, {"a": stage}, f"resume={tmp_path / 'run'}")).train()
    save_teacher(tmp_path / "model", tokenizer)
    Run(taught(tmp_path, name, {"a": stage}, f"resume={tmp_path / 'run'}")).train()


WARM = "{name: llava_kd, visual_warmup: 0.5}"


@pytest.fixture(scope="module")
def plain(tmp_path_factory, teacher):
    """The losses of three plain steps."""
    place = tmp_path_factory.mktemp("plain")
    Run(taught(place, teacher, {"a": f"steps: 3, {KD}"}, f"run.folder={place / 'run'}")).train()
    return losses(place / "run")


@pytest.mark.parametrize(
    "change",
    ["accumulate: 4, gradient_checkpointing: true", "pack_length: 120, accumulate: 2"],
    ids=["recomputed", "packed"],
)
def test_what_changes_speed_only_changes_no_loss(tmp_path, teacher, plain, change):
    Run(taught(tmp_path, teacher, {"a": f"steps: 3, {change}, {KD}"}, f"run.folder={tmp_path / 'b'}")).train()
    assert losses(tmp_path / "b") == pytest.approx(plain, rel=1e-4)


def test_bf16_stays_near_float32(tmp_path, teacher, plain):
    Run(taught(tmp_path, teacher, {"a": f"steps: 1, precision: bf16, {KD}"}, f"run.folder={tmp_path / 'run'}")).train()
    assert losses(tmp_path / "run")[1] == pytest.approx(plain[1], rel=0.05)


def test_rows_of_every_kind_give_the_losses_of_samples_alone(make_model):
    step, own, theirs = step_of(make_model)
    whole = own.collate(rows(theirs, own))
    together = run_step(step, whole)
    packed = run_step(step, own.collate(own.pack(rows(theirs, own), 200)))
    sums: dict[str, torch.Tensor] = {}
    for i in range(3):
        batch = own.collate(rows(theirs, own, [i]))
        for name, value in step(batch, Counts(count_labels(whole), count_images(whole))).items():
            sums[name] = sums.get(name, 0) + value
    for name in ("response", "visual", "relation"):
        torch.testing.assert_close(packed[name], together[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(sums[name], together[name], rtol=1e-4, atol=1e-6)


def test_text_alone_has_finite_gradients(make_model):
    step, own, theirs = step_of(make_model)
    found = run_step(step, own.collate(rows(theirs, own, [2])))
    assert found.keys() == {"answer", "response"}
    step.total(found).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in step.model.parameters())


def test_a_pruned_student_is_compared_on_the_cells_it_kept(make_model):
    """The same model as its own teacher, before pruning: at the survivors, in the place the teacher has them."""
    step, own, theirs = step_of(make_model, pruned=True, response_weight=0.0, relation_weight=0.0)
    batch = own.collate(rows(theirs, own, [0, 1]))
    out = step.model(**{k: v for k, v in batch.items() if k != TEACHER_ROWS})
    seen = step.teacher.outputs_for(batch, out)
    keep = out.image_kept.keep
    assert keep.shape == (3, 8) and seen.image_tokens.shape[1] == 16
    from zoo.distill.matching.positions import match_images

    matched = match_images(Seen(out, step.model.llm), seen, batch)
    ours, hidden = (x.image_index.flatten() for x in (Seen(out, None), seen)), seen.last_hidden_state.flatten(0, 1)
    where = next(ours)
    expected = []
    for index in where[where >= 0].tolist():
        image, place = divmod(index, 8)
        wanted = image * 16 + int(keep[image, place])
        expected.append(hidden[seen.image_index.flatten() == wanted][0])
    torch.testing.assert_close(matched.target.rows, torch.stack(expected), rtol=0, atol=0)


def test_the_teacher_keeps_no_activations_and_makes_no_logits(make_model):
    step, own, theirs = step_of(make_model)
    batch = own.collate(rows(theirs, own))
    out = step.model(**{k: v for k, v in batch.items() if k != TEACHER_ROWS})
    seen = step.teacher.outputs_for(batch, out)
    assert seen.logits is None and seen.losses is None
    assert not seen.last_hidden_state.requires_grad and seen.last_hidden_state.grad_fn is None
    step.train()
    assert not step.teacher.model.training


def test_the_teacher_has_its_own_number_format(make_model):
    _, own = make_model(seed=1)
    model, theirs = make_model(seed=2)
    batch = own.collate(rows(theirs, own))
    exact = Teacher(model).outputs_for(batch, None).last_hidden_state
    low = Teacher(model.to(torch.bfloat16)).outputs_for(batch, None).last_hidden_state
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).norm() < 0.05 * exact.norm()


def test_pixels_that_both_read_alike_are_held_once(make_model):
    _, own = make_model(seed=1)
    _, theirs = make_model(seed=2)
    batch = own.collate(rows(theirs, own))
    assert "pixel_values" not in batch[TEACHER_ROWS] and "pixel_values" in batch
    _, larger = make_model(vision={**VISION, "image_size": 64, "patch_size": 16})
    assert own.collate(rows(larger, own))[TEACHER_ROWS]["pixel_values"].shape[-1] == 64


def test_pixels_by_another_image_processor_are_made_anew(make_model):
    """Encoder and layout may be the same, and a published image processor cut or scale images otherwise."""
    _, own = make_model(seed=1)
    _, theirs = make_model(seed=2)
    values = as_clip(theirs.transform)
    for changed, same in (({}, True), ({"do_center_crop": False, "size": {"height": 32, "width": 32}}, False)):
        theirs.pictures = Pictures({**values, **changed})
        assert TeacherRows(theirs, own).same_pixels is TeacherRows(own, theirs).same_pixels is same
    own.pictures = Pictures(values)
    assert not TeacherRows(theirs, own).same_pixels
    row = rows(theirs, own, [0])[0]
    assert torch.equal(row.twin.pixel_values[0], theirs.encode(samples()[0]).pixel_values[0])


def test_hidden_image_tokens_are_not_compared(make_model):
    """With keep_range the student has the tokens that it is shown, as behind a pruner."""
    student, own = make_model(seed=1)
    model, theirs = make_model(seed=2)
    distiller = registry.build("distiller", {"name": "llava_kd"})
    step = TrainStep(student, distiller, Teacher(model, distiller.needs), Stage(**STAGE, keep_range=[0.25, 0.25]))
    batch = own.collate(rows(theirs, own, [0, 1]))
    mask = batch["attention_mask"]
    seen = {}

    def look(student, teacher, given):
        seen["shown"] = (student.image_index >= 0).sum(1).tolist()
        seen["same"] = bool(((student.image_index >= 0) <= (given["attention_mask"] > 0)).all())
        return distiller(student, teacher, given)

    step.distiller = look
    found = run_step(step, batch)
    assert seen == {"shown": [4, 8], "same": True} and batch["attention_mask"] is mask
    assert all(value.isfinite() for value in found.values())


VISION = {"name": "timm", "image_size": 32, "patch_size": 8, "width": 32, "heads": 2, "depth": 2, "layer": -1}


ANYRES = {"layout": {"name": "anyres", "pinpoints": [[32, 64], [64, 32]]}}


@pytest.mark.parametrize(
    ("slots", "taught_slots"),
    [({}, {"pruner": {"random": {"keep_ratio": 0.5}}}), (ANYRES, ANYRES)],
    ids=["pruned", "cut"],
)
def test_an_encoder_that_both_have_runs_once(make_model, slots, taught_slots):
    student, own = make_model(seed=1, **taught_slots)
    model, theirs = make_model(seed=2, **slots)
    model.vision.load_state_dict(student.vision.state_dict())
    batch = own.collate(rows(theirs, own, [0, 1, 2]))
    teacher, ran = Teacher(model), []
    model.vision.register_forward_hook(lambda *_: ran.append(1))
    out = student(**{k: v for k, v in batch.items() if k != TEACHER_ROWS})
    apart = teacher.outputs_for(batch, out).last_hidden_state
    teacher.share_vision(student)
    assert not teacher.same_vision, "the student's encoder still trains"
    student.vision.requires_grad_(False)
    teacher.share_vision(student)
    assert teacher.same_vision and len(ran) == 1
    torch.testing.assert_close(teacher.outputs_for(batch, out).last_hidden_state, apart, rtol=0, atol=0)
    assert len(ran) == 1
    _, uncut = make_model(seed=2)
    if slots:  # pixels of another cut are encoded again
        other = own.collate(rows(theirs, uncut, [0]))
        assert "pixel_values" in other[TEACHER_ROWS]
        teacher.outputs_for(
            other, student(**{k: v for k, v in own.collate(rows(theirs, own, [0])).items() if k != TEACHER_ROWS})
        )
        assert len(ran) == 2
    next(student.vision.parameters()).data += 1
    teacher.share_vision(student)
    assert not teacher.same_vision


def test_other_tokens_are_refused(tokenizer):
    from zoo.text.tokenizer import train_tokenizer

    other = train_tokenizer(["quite different words for this one"] * 9, 300, "plain")
    with pytest.raises(ZooError, match="different tokenizers: token"):
        shared_tokens(tokenizer, other)
    longer = train_tokenizer([f"{q} {a}" for q in QUESTIONS for a in ANSWERS] * 3, 360, "plain")
    longer.add_tokens(["<extra>"])
    assert shared_tokens(tokenizer, longer) == len(tokenizer)
    longer.chat_template = "{{ messages }}"
    with pytest.raises(ZooError, match="different chat templates"):
        shared_tokens(tokenizer, longer)


def test_a_student_that_drops_inside_the_llm_is_compared_on_what_is_left(make_model):
    """Its own model before dropping teaches it: at the first layer, where nothing is dropped yet, both are the same."""
    fastv = {"pruner": {"fastv": {"layer": 1, "keep_ratio": 0.5}}}
    student, own = make_model(seed=1, llm={**LLM, "num_layers": 3}, **fastv)
    model, theirs = make_model(seed=2, llm={**LLM, "num_layers": 3})
    batch = own.collate(rows(theirs, own, [1, 2]))
    out = student(**{k: v for k, v in batch.items() if k != TEACHER_ROWS})
    seen = Teacher(model).outputs_for(batch, out)
    from zoo.distill.matching.positions import match_images, match_responses

    index = Seen(out, student.llm).image_index
    assert index.shape == out.last_hidden_state.shape[:2]
    left = index[index >= 0]
    assert 0 < len(left) < 32 and len(set(left.tolist())) == len(left)
    matched = match_images(Seen(out, student.llm), seen, batch)
    where = [(seen.image_index.flatten() == i).nonzero().item() for i in left.tolist()]
    torch.testing.assert_close(matched.target.rows, seen.last_hidden_state.flatten(0, 1)[where], rtol=0, atol=0)
    assert len(match_responses(Seen(out, student.llm), seen, batch).rows) == count_labels(batch)


def test_tiles_are_compared_as_images_of_their_own(make_model):
    """Two tiles of an image that stand behind each other are, to every loss, two images that do."""
    found = []
    for cut in (False, True):
        layout = {"layout": {"name": "tiles"}} if cut else {}
        student, own = make_model(seed=1, pruner={"random": {"keep_ratio": 0.5, "draw": "fixed"}}, **layout)
        model, theirs = make_model(seed=2, llm={**LLM, "hidden_size": 48}, **layout)
        distiller = registry.build("distiller", {"name": "llava_kd"})
        step = TrainStep(student, distiller, Teacher(model, distiller.needs), Stage(**STAGE))
        batch = own.collate(rows(theirs, own, [0, 1]))
        if cut:
            batch["cuts"] = batch[TEACHER_ROWS]["cuts"] = [Cut(), Cut(2, "crop", grid=(1, 2))]
        found.append(run_step(step, batch))
    assert found[0].keys() == found[1].keys() == {"answer", "response", "visual", "relation"}
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    batch[TEACHER_ROWS]["cuts"] = [Cut(), Cut(2, "crop", grid=(2, 1))]
    with pytest.raises(ZooError, match="cut images into different tiles"):
        run_step(step, batch)


def test_distilled_pretraining_changes_the_projector_alone(tmp_path, teacher):
    run = Run(taught(tmp_path, teacher, {"pt": f"steps: 2, {KD}".replace("[all]", "[projector]")}))
    before = {n: p.clone() for n, p in run.model.named_parameters()}
    run.train()
    changed = {run.model.part_of(n) for n, p in run.model.named_parameters() if not p.equal(before[n])}
    assert changed == {"projector"}


def test_another_stage_of_an_encoder_that_is_not_cut_is_another_encoder():
    extra = {"embed_dim": 8, "depths": [1] * 4, "hidden_sizes": [16, 32, 64, 64]}
    extra |= {"focal_levels": [1] * 4, "focal_windows": [3] * 4}
    teacher = Teacher.__new__(Teacher)
    for stage, shared in ((4, True), (3, False)):  # maps of one shape, by the same weights
        made = []
        for own in (4, stage):
            torch.manual_seed(0)
            node = {"name": "hf", "model_type": "focalnet", "image_size": 64, "stage": own, "extra": extra}
            made.append(
                SimpleNamespace(vision=registry.build("vision", node).requires_grad_(False), requested=frozenset())
            )
        teacher.model, teacher.same_vision = made[0], None
        teacher.share_vision(made[1])
        assert teacher.same_vision is shared
