"""LLaVA-MoD: mimic against a slow twin and its invariants, options, and the stages of the recipe in the loop."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.distill_builders import LENGTH, LLM, ROWS, VOCAB, WIDTH, seen
from tests.teacher_builders import save_teacher, taught
from tests.train_builders import losses as losses_of
from zoo import registry
from zoo.registry import IGNORE_INDEX, ZooError


def build(**options):
    return registry.build("distiller", {"name": "llava_mod", **options})


def labelled():
    """Labels with two answers in the first row, one of them at its end, and padding."""
    torch.manual_seed(7)
    labels = torch.full((ROWS, LENGTH), IGNORE_INDEX)
    labels[0, 2:4], labels[0, 6:9], labels[1, 1:3] = torch.randint(0, VOCAB, (2,)), torch.randint(0, VOCAB, (3,)), 4
    return labels


def mimic_twin(student, teacher, where):
    """Mean over positions of sum_v p_t (log p_t - log p_s), a loop."""
    total, count = 0.0, 0
    for b in range(ROWS):
        for t in range(LENGTH):
            if where(b, t):
                s = torch.log_softmax(student.llm.head(student.last_hidden_state[b, t]), -1)
                p = torch.log_softmax(teacher.llm.head(teacher.last_hidden_state[b, t]), -1).detach()
                total = total + (p.exp() * (p - s)).sum()
                count += 1
    return total / count


@pytest.mark.parametrize(
    ("options", "shift"),
    [({}, 1), ({"unshifted": True}, 0), ({"positions": "all"}, None)],
    ids=["ours", "release", "all"],
)
def test_mimic_is_its_equation_and_teaches_these_positions_only(options, shift):
    labels = labelled()

    def where(b, t):
        return shift is None or (t + shift < LENGTH and labels[b, t + shift] != IGNORE_INDEX)

    student, teacher = seen(labels), seen(labels, seed=2, llm=LLM(WIDTH, seed=5, plain=False))
    loss = build(**options)(student, teacher, {})["mimic"]
    loss.backward()
    again = seen(labels)
    wanted = mimic_twin(again, teacher, where)
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted.double(), rtol=1e-6, atol=1e-7)
    grad = student.last_hidden_state.grad
    torch.testing.assert_close(grad, again.last_hidden_state.grad, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(student.llm.weight.grad, again.llm.weight.grad, rtol=1e-6, atol=1e-7)
    support = torch.tensor([[where(b, t) for t in range(LENGTH)] for b in range(ROWS)])
    assert torch.equal(grad.abs().amax(-1) > 0, support)
    assert teacher.last_hidden_state.grad is None and teacher.llm.weight.grad is None


def test_the_released_form_is_this_plus_the_entropy_of_the_teacher_with_the_same_gradient():
    labels = labelled()
    where = labels[:, 1:] != IGNORE_INDEX
    student, teacher = seen(labels), seen(labels, seed=2, llm=LLM(WIDTH, seed=5, plain=False))
    loss = build()(student, teacher, {})["mimic"]
    (ours,) = torch.autograd.grad(loss, student.last_hidden_state)
    log_s = torch.log_softmax(student.llm.head(student.last_hidden_state[:, :-1][where]), -1)
    log_t = torch.log_softmax(teacher.llm.head(teacher.last_hidden_state[:, :-1][where]), -1).detach()
    crossed = -(log_t.exp() * log_s).sum(-1).mean()
    entropy = -(log_t.exp() * log_t).sum(-1).mean()
    torch.testing.assert_close((crossed - entropy).float(), loss.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(crossed, student.last_hidden_state)[0], ours, rtol=1e-6, atol=1e-7)
    plain = F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
    torch.testing.assert_close(plain.float(), loss.float(), rtol=1e-5, atol=1e-6)


def test_nothing_is_learnt_from_oneself():
    student = seen(labelled())
    loss = build()(student, seen(labelled()), {})["mimic"]
    loss.backward()
    assert loss.abs() < 1e-6 and student.last_hidden_state.grad.abs().max() < 1e-9


def test_columns_that_only_the_teacher_has_do_not_count():
    labels, wide = labelled(), LLM(WIDTH, VOCAB + 4, seed=5, plain=False)
    with torch.no_grad():
        narrow = LLM(WIDTH, seed=5, plain=False)
        narrow.weight.copy_(wide.weight[:VOCAB])
    wanted = build()(seen(labels), seen(labels, seed=2, llm=narrow), {})["mimic"]
    with torch.no_grad():
        wide.weight[VOCAB:] = 50.0
    assert torch.equal(build()(seen(labels), seen(labels, seed=2, llm=wide), {})["mimic"], wanted)


def test_padding_and_other_rows_change_nothing():
    labels = labelled()
    student, teacher = seen(labels), seen(labels, seed=2)
    wanted = build()(student, teacher, {})["mimic"]
    longer = F.pad(labels, (0, 5), value=IGNORE_INDEX)
    padded = []
    for one in (student, teacher):
        other = seen(longer, length=LENGTH + 5)
        other.out.last_hidden_state = torch.cat(
            [one.last_hidden_state, torch.randn(ROWS, 5, WIDTH, dtype=torch.float64)], 1
        )
        padded.append(other)
    torch.testing.assert_close(build()(*padded, {})["mimic"], wanted)


def test_the_balance_may_be_doubled_for_parity():
    student = seen(labelled())
    student.out.losses = {"answer": torch.tensor(3.0), "upcycle_balance": torch.tensor(0.25)}
    assert set(build()(student, seen(labelled()), {})) == {"mimic"}
    assert build(double_balance=True)(student, seen(labelled()), {})["balance_again"] == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "mimick"}, "'mimick'. Did you mean 'mimic'"),
        ({"loss": "kto"}, "'kto'. Did you mean 'kto_pair'"),
        ({"beta": 0.0}, "beta must be more than 0, got 0.0"),
        ({"anchor": -1.0, "objective": "preference"}, "The weight of anchor must be at least 0"),
        ({"positions": "all", "per": "answer"}, "positions=all does not distinguish answers"),
        ({"divergence": "jsd", "jsd_beta": 1.0}, "beta of jsd must be in"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        build(**options)


# ---- stages ------------------------------------------------------------------------------------------------------

STAGES = {
    "dense": "train: [llm], detach: [upcycle], steps: 3, batch_size: 4, lr: 0.01, distiller: llava_mod, "
    "teacher: '{teacher}', loss_weights: {answer: 0}, checkpoint_every: 2",
    "sparse": "train: [projector, adapter, 'llm.*.mlp.*'], steps: 3, batch_size: 4, lr: 0.01, distiller: llava_mod, "
    "teacher: '{teacher}', checkpoint_every: 2",
    "prefer": "train: [projector, adapter, 'llm.*.mlp.*'], steps: 2, batch_size: 4, lr: 0.001, teacher: '{teacher}', "
    "distiller: {name: llava_mod, objective: preference}, loss_weights: {answer: 0}, data: {scenes_pairs: 1}",
}


def mod_config(place, teacher, *more):
    return taught(
        place, teacher, STAGES, "adapter=upcycle", "data=[scenes,scenes_pairs]",
        "data.scenes_pairs.size=32", "data.scenes_pairs.scenes=40", "llm.num_layers=2", *more,
    )  # fmt: skip


def test_stages_run_and_resume_to_the_same_losses(tmp_path, tokenizer, monkeypatch):
    from zoo.training.loop import Run

    teacher = save_teacher(tmp_path / "teacher", tokenizer)
    run = Run(mod_config(tmp_path / "a", teacher))
    seen_states = {}
    start = type(run.model.adapter["upcycle"]).start

    def noted(self):
        start(self)
        seen_states["started"] = {k: v.clone() for k, v in run.model.state_dict().items()}

    monkeypatch.setattr(type(run.model.adapter["upcycle"]), "start", noted)
    run.train()
    state = seen_states["started"]
    dense = state["llm.lm.model.layers.0.mlp.c_fc.weight"]
    stacked = state["adapter.upcycle.layers.0.experts.c_fc.weight"]
    assert all(torch.equal(stacked[e], dense) for e in range(4))  # as the dense stage left it
    after = run.model.state_dict()
    assert torch.equal(after["llm.lm.model.layers.0.mlp.c_fc.weight"], dense)
    assert not torch.equal(after["adapter.upcycle.layers.0.experts.c_fc.weight"], stacked)
    frozen = "llm.lm.model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(after[frozen], state[frozen])
    wanted = losses_of(run.folder.path)
    assert len(wanted) == 8 and all(math.isfinite(v) for v in wanted.values())
    monkeypatch.undo()
    for stop in (4, 7):  # in the second stage ahead of its first checkpoint, and in the third
        other = Run(mod_config(tmp_path / f"b{stop}", teacher))
        taken = []

        def step(*args, other=other, taken=taken, own=other._step, stop=stop):
            if len(taken) == stop:
                raise KeyboardInterrupt
            taken.append(own(*args))

        monkeypatch.setattr(other, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            other.train()
        again = Run(mod_config(tmp_path / f"b{stop}", teacher, f"resume={other.folder.path}"))
        again.train()
        assert losses_of(again.folder.path) == wanted
        final = again.model.state_dict()
        assert all(torch.equal(final[k], after[k]) for k in after)


def test_a_stored_reference_gives_the_losses_of_a_live_one(tmp_path, tokenizer):
    from zoo.training.loop import Run
    from zoo.training.teach import main

    teacher = save_teacher(tmp_path / "teacher", tokenizer)
    stage = "train: [all], steps: 3, batch_size: 4, lr: 0.01, loss_weights: {answer: 0}, data: {scenes_pairs: 1}, "
    stage += "distiller: {name: llava_mod, objective: preference, loss: dpo}, teacher: "
    data = ["data=[scenes,scenes_pairs]", "data.scenes_pairs.size=32", "data.scenes_pairs.scenes=40"]
    live = stage + "'{teacher}'"
    kept = main(taught(tmp_path, teacher, {"prefer": live}, *data, f"teach.folder={tmp_path / 'kept'}"))
    curves = []
    for name, which in (("live", live), ("kept", f"{stage}{{store: '{kept}'}}"), ("apart", f"pack: none, {live}")):
        run = Run(taught(tmp_path, teacher, {"prefer": which}, *data, f"run.folder={tmp_path / name}"))
        run.train()
        curves.append(losses_of(run.folder.path))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5) and curves[2] == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ("detach: [upcycel]", "", "'upcycel'. Did you mean 'upcycle'"),
        ("", "detach: [upcycle]", "the previous stage attached: it cannot be detached again"),
        ("detach: [upcycle]", "detach: [upcycle]", "The last stage detaches 'upcycle'"),
    ],
)
def test_adapters_are_detached_from_the_start_only(tmp_path, first, last, message):
    from tests.train_builders import config, recipe

    stages = {name: f"train: [llm], steps: 1, {more}" for name, more in (("one", first), ("two", last))}
    with pytest.raises(ZooError, match=message):
        config(recipe(tmp_path, stages), "adapter=upcycle")
