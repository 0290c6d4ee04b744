"""LLaVA-MoD: mimic and preference losses against slow twins, the invariants of both, and its stages in the loop."""

import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import sample, talk
from tests.teacher_builders import save_teacher, taught
from tests.test_preference_data import preferred
from tests.train_builders import losses as losses_of
from zoo import registry
from zoo.distill.logprobs import token_logprobs
from zoo.distill.preference import LOSSES, preference_loss
from zoo.engine import TrainStep
from zoo.model_types import LLMSequence, Seen
from zoo.registry import IGNORE_INDEX, ZooError
from zoo.stage import Stage

B, T, C, V = 3, 9, 6, 11


def build(**options):
    return registry.build("distiller", {"name": "llava_mod", **options})


class Table(torch.nn.Module):
    """What a distiller needs of a language model: a projection to a vocabulary."""

    def __init__(self, vocab=V, seed=0, bias=None):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(C, vocab, bias=bias is not None, dtype=torch.float64)
        if bias is not None:
            with torch.no_grad():
                self.linear.bias.copy_(bias)

    @property
    def vocab_size(self):
        return self.linear.out_features

    def head(self, x):
        return self.linear(x)

    def linear_head(self):
        return None  # the way of autograd, in float64


def seen(labels, pair_ids=None, llm=None, seed=1, length=T):
    torch.manual_seed(seed)
    hidden = torch.randn(B, length, C, dtype=torch.float64, requires_grad=True)
    sequence = LLMSequence(None, None, None, labels, pair_ids=pair_ids)
    out = SimpleNamespace(last_hidden_state=hidden, labels=labels, sequence=sequence, losses={}, image_tokens=None)
    return Seen(out, llm or Table())


def labelled():
    """Labels with two answers in the first row, one of them at its end, and padding."""
    torch.manual_seed(7)
    labels = torch.full((B, T), IGNORE_INDEX)
    labels[0, 2:4], labels[0, 6:9], labels[1, 1:3] = torch.randint(0, V, (2,)), torch.randint(0, V, (3,)), 4
    return labels


def paired():
    """Ids (B, T) and pairs: pair 0 packed in the first row, pair 1 in rows of its own."""
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    pairs = torch.full((B, T), -1)
    pairs[0, 2:4], pairs[0, 6:9], pairs[1, 4:6], pairs[2, 3:8] = 0, 1, 2, 3
    return ids, pairs


# ---- mimic -------------------------------------------------------------------------------------------------------


def mimic_twin(student, teacher, where):
    """Mean over positions of sum_v p_t (log p_t - log p_s), a loop."""
    total, count = 0.0, 0
    for b in range(B):
        for t in range(T):
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
        return shift is None or (t + shift < T and labels[b, t + shift] != IGNORE_INDEX)

    student, teacher = seen(labels), seen(labels, seed=2, llm=Table(seed=5))
    loss = build(**options)(student, teacher, {})["mimic"]
    loss.backward()
    again = seen(labels)
    wanted = mimic_twin(again, teacher, where)
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted.double(), rtol=1e-6, atol=1e-7)
    grad = student.last_hidden_state.grad
    torch.testing.assert_close(grad, again.last_hidden_state.grad, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(student.llm.linear.weight.grad, again.llm.linear.weight.grad, rtol=1e-6, atol=1e-7)
    support = torch.tensor([[where(b, t) for t in range(T)] for b in range(B)])
    assert torch.equal(grad.abs().amax(-1) > 0, support)
    assert teacher.last_hidden_state.grad is None and teacher.llm.linear.weight.grad is None


def test_the_released_form_is_this_plus_the_entropy_of_the_teacher_with_the_same_gradient():
    labels = labelled()
    where = labels[:, 1:] != IGNORE_INDEX
    student, teacher = seen(labels), seen(labels, seed=2, llm=Table(seed=5))
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
    labels, wide = labelled(), Table(vocab=V + 4, seed=5)
    with torch.no_grad():
        narrow = Table(seed=5)
        narrow.linear.weight.copy_(wide.linear.weight[:V])
    wanted = build()(seen(labels), seen(labels, seed=2, llm=narrow), {})["mimic"]
    with torch.no_grad():
        wide.linear.weight[V:] = 50.0
    assert torch.equal(build()(seen(labels), seen(labels, seed=2, llm=wide), {})["mimic"], wanted)


def test_padding_and_other_rows_change_nothing():
    labels = labelled()
    student, teacher = seen(labels), seen(labels, seed=2)
    wanted = build()(student, teacher, {})["mimic"]
    longer = F.pad(labels, (0, 5), value=IGNORE_INDEX)
    padded = []
    for one in (student, teacher):
        other = seen(longer, length=T + 5)
        other.out.last_hidden_state = torch.cat([one.last_hidden_state, torch.randn(B, 5, C, dtype=torch.float64)], 1)
        padded.append(other)
    torch.testing.assert_close(build()(*padded, {})["mimic"], wanted)


def test_the_balance_may_be_doubled_for_parity():
    student = seen(labelled())
    student.out.losses = {"answer": torch.tensor(3.0), "upcycle_balance": torch.tensor(0.25)}
    assert set(build()(student, seen(labelled()), {})) == {"mimic"}
    assert build(double_balance=True)(student, seen(labelled()), {})["balance_again"] == 0.25


# ---- preference --------------------------------------------------------------------------------------------------


def logps(who, ids, pairs):
    """Log-probability of each answer, a loop over tokens."""
    total = [0.0] * (int(pairs.max()) + 1)
    for b in range(B):
        for t in range(1, T):
            if pairs[b, t] >= 0:
                scores = torch.log_softmax(who.llm.head(who.last_hidden_state[b, t - 1]), -1)
                total[pairs[b, t]] = total[pairs[b, t]] + scores[ids[b, t]]
    return total


def naive(kind, u, d, beta, through=False):
    """The loss of a list of pairs, one by one."""

    def sigmoid(x):
        return 1 / (1 + math.e ** (-x))

    if kind == "kto_pair":
        mean_u, mean_d = (max(sum(x) / len(x), 0 * sum(x)) for x in (u, d))
        if not through:
            mean_u, mean_d = (m.detach() for m in (mean_u, mean_d))
        terms = [1 - sigmoid(beta * (a - mean_d)) for a in u] + [1 - sigmoid(beta * (mean_u - b)) for b in d]
        return sum(terms) / len(terms)
    one = {
        "dpo": lambda m: -torch.log(sigmoid(beta * m)),
        "hinge": lambda m: torch.clamp(1 - beta * m, min=0),
        "ipo": lambda m: (m - 1 / (2 * beta)) ** 2,
    }[kind]
    return sum(one(a - b) for a, b in zip(u, d, strict=True)) / len(u)


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_preference_is_its_equation_in_values_and_gradients(kind, through):
    ids, pairs = paired()
    batch = {"input_ids": ids, "pair_ids": pairs}
    grads = []
    for way in ("ours", "naive"):
        student, teacher = seen(None, pairs), seen(None, pairs, seed=2, llm=Table(seed=5))
        if way == "ours":
            loss = build(objective="preference", loss=kind, beta=0.3, through_means=through)(student, teacher, batch)
            loss = loss["preference"]
        else:
            mine, theirs = logps(student, ids, pairs), [x.detach() for x in logps(teacher, ids, pairs)]
            ratios = [a - b for a, b in zip(mine, theirs, strict=True)]
            loss = naive(kind, ratios[::2], ratios[1::2], 0.3, through)
        loss.backward()
        grads.append([loss, student.last_hidden_state.grad, student.llm.linear.weight.grad])
        assert teacher.last_hidden_state.grad is None
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    touched = grads[0][1].abs().amax(-1) > 0
    assert torch.equal(touched[:, :-1], pairs[:, 1:] >= 0) and not touched[:, -1].any()


def ratios(seed=0, n=5):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))


def test_dpo_starts_at_log_two_and_pulls_both_answers_equally():
    zero = torch.zeros(4, dtype=torch.float64)
    for beta in (0.05, 0.1, 2.0):
        assert torch.allclose(preference_loss("dpo", zero, zero, beta), torch.full_like(zero, math.log(2)))
    u, d = ratios()
    loss = preference_loss("dpo", u, d)
    assert torch.equal(loss > math.log(2), u < d)
    loss.sum().backward()
    torch.testing.assert_close(u.grad, -d.grad)
    assert (u.grad < 0).all()
    torch.testing.assert_close(preference_loss("dpo", u + 3, d + 3), loss)  # the reference moves both alike
    margin = -torch.log(torch.expm1(loss))  # beta (u - d)
    torch.testing.assert_close(-torch.log(torch.expm1(preference_loss("dpo", d, u))), -margin)


def test_other_losses_where_policy_and_reference_agree():
    zero = torch.zeros(3, dtype=torch.float64)
    for kind, value in (("kto_pair", 0.5), ("hinge", 1.0), ("ipo", 1 / (4 * 0.2**2))):
        assert torch.allclose(preference_loss(kind, zero, zero, 0.2), torch.full_like(zero, value))


def test_the_reference_sets_how_hard_dpo_pulls_and_never_where():
    ids, pairs = paired()
    directions = []
    for reference in (2, 3):
        student = seen(None, pairs[:1].expand(B, T).clone())
        pairs_one = torch.full_like(pairs, -1)
        pairs_one[0] = pairs[0]
        student.out.sequence.pair_ids = pairs_one
        teacher = seen(None, pairs_one, seed=reference)
        batch = {"input_ids": ids, "pair_ids": pairs_one}
        build(objective="preference", loss="dpo")(student, teacher, batch)["preference"].backward()
        grad = student.last_hidden_state.grad.flatten()
        directions.append(grad / grad.norm())
    torch.testing.assert_close(*directions)


def test_without_a_gradient_the_means_of_kto_are_constants():
    u, d = ratios()
    with torch.no_grad():
        u += 2  # so that its mean counts
    preference_loss("kto_pair", u, d, 0.5).sum().backward()
    alone = (-0.5 * torch.sigmoid(x := 0.5 * (u - d.mean().clamp(min=0))) * torch.sigmoid(-x) / 2).detach()
    torch.testing.assert_close(u.grad, alone)
    v, e = ratios()
    with torch.no_grad():
        v += 2
    preference_loss("kto_pair", v, e, 0.5, through_means=True).sum().backward()
    assert (v.grad - u.grad).abs().max() > 1e-3


def test_equal_answers_teach_nothing_and_noise_elsewhere_changes_nothing():
    ids, pairs = paired()
    ids[0, 1:4] = ids[0, 5:8]
    pairs = torch.full_like(pairs, -1)
    pairs[0, 2:4], pairs[0, 6:8] = 0, 1
    student, teacher = seen(None, pairs), seen(None, pairs, seed=2)
    with torch.no_grad():
        for one in (student, teacher):
            one.last_hidden_state[0, 1:3] = one.last_hidden_state[0, 5:7]
    batch = {"input_ids": ids, "pair_ids": pairs}
    distiller = build(objective="preference", loss="dpo")
    loss = distiller(student, teacher, batch)["preference"]
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert student.llm.linear.weight.grad.abs().max() < 1e-12
    with torch.no_grad():
        student.last_hidden_state[:, 8] += 5
        student.last_hidden_state[1:] *= 3
    assert torch.equal(distiller(student, teacher, batch)["preference"], loss)


def test_what_is_logged_is_margin_and_accuracy_and_counts_nothing():
    ids, pairs = paired()
    student, teacher = seen(None, pairs), seen(None, pairs, seed=2)
    distiller = build(objective="preference", anchor=0.5, weight=2.0)
    found = distiller(student, teacher, {"input_ids": ids, "pair_ids": pairs})
    mine, theirs = logps(student, ids, pairs), logps(teacher, ids, pairs)
    u, d = ([a - b for a, b in zip(mine[i::2], theirs[i::2], strict=True)] for i in (0, 1))
    assert found["margin"].item() == pytest.approx(0.1 * sum(a - b for a, b in zip(u, d, strict=True)).item() / 2)
    assert found["accuracy"].item() == sum(a > b for a, b in zip(u, d, strict=True)).item() / 2
    assert found["chosen"].item() == pytest.approx(0.1 * sum(u).item() / 2)
    assert found["anchor"].item() == pytest.approx(-(mine[0] + mine[2]).item() / 4)
    logged = {"margin": 0.0, "accuracy": 0.0, "chosen": 0.0}
    assert distiller.weights == {"preference": 2.0, "anchor": 0.5, **logged}


def test_chunks_change_nothing():
    llm = Table()
    rows, wanted = torch.randn(10, C, dtype=torch.float64), torch.randint(0, V, (10,))
    grads = []
    for chunk in (None, 3):
        x = rows.clone().requires_grad_()
        llm.zero_grad()
        values = token_logprobs(llm, x, wanted, chunk)
        (values * torch.arange(10)).sum().backward()
        grads.append([values, x.grad, llm.linear.weight.grad.clone()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(llm, rows, wanted, 3), grads[0][0])


@pytest.mark.parametrize(("kind", "theirs"), [("dpo", "sigmoid"), ("hinge", "hinge"), ("ipo", "ipo")])
def test_agrees_with_trl(kind, theirs):
    """Its trainer's loss of sequences whose answers are one token: TRL averages IPO over tokens."""
    trl = pytest.importorskip("trl", reason="trl is not installed: its own preference losses are not compared")
    policy, reference = (torch.randn(10, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    policy.requires_grad_()
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device=torch.device("cpu"))
    settings = {"loss_types": [theirs], "loss_weights": [1.0], "beta": 0.3, "f_divergence_type": "reverse_kl"}
    off = {"ld_alpha": None, "aux_loss_enabled": False, "use_weighting": False, "precompute_ref_logps": True}
    trainer = MagicMock(**settings, **off, accelerator=same)
    nothing = torch.zeros(10, 1)
    said = SimpleNamespace(log_probs=policy.unsqueeze(-1), entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    batch = {"input_ids": nothing.long().expand(10, 2), "completion_mask": torch.tensor([[0, 1]]).expand(10, 2)}
    batch["attention_mask"] = torch.ones(10, 2)
    batch |= {"ref_chosen_logps": reference[:5], "ref_rejected_logps": reference[5:]}
    wanted = trl.DPOTrainer._compute_loss(trainer, lambda **inputs: said, batch, False)
    u, d = (policy - reference).chunk(2)
    got = preference_loss(kind, u, d, 0.3).mean()
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, policy)[0] for x in (got, wanted)))


# ---- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "mimick"}, "'mimick'. Did you mean 'mimic'"),
        ({"loss": "kto"}, "'kto'. Did you mean 'kto_pair'"),
        ({"beta": 0.0}, "beta must be more than 0, got 0.0"),
        ({"anchor": -1.0, "objective": "preference"}, "The weight of anchor must be at least 0"),
        ({"positions": "all", "per": "answer"}, "positions=all knows no answers"),
        ({"divergence": "jsd", "jsd_beta": 1.0}, "beta of jsd must be in"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        build(**options)


# ---- with models -------------------------------------------------------------------------------------------------

PAIRS = ("is there a red circle?", "yes", "no"), ("what color is the square?", "blue", "red")


class Frozen:
    """A teacher on the student's own batch."""

    vocab_size = None

    def __init__(self, model):
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def see(self, batch, student):
        return Seen(self.model(**batch, run_head=False), self.model.llm)


def step_of(model, teacher, batch, answer=0.0, **options):
    stage = Stage(steps=1, loss_weights={"answer": answer})
    step = TrainStep(model, build(objective="preference", **options), Frozen(teacher), stage)
    return step, step(batch, SimpleNamespace(labels=float((batch["labels"] >= 0).sum()), images=1.0))


def test_rows_that_share_images_give_the_losses_of_rows_of_their_own(make_model):
    model, processor = make_model()
    teacher, _ = make_model(seed=3)
    whole = preferred(*PAIRS)
    packed = processor.collate([processor.encode(whole)])
    apart = processor.collate([processor.encode(registry.Sample("s", whole.images, [d])) for d in whole.dialogs])
    found = []
    for batch in (packed, apart):
        model.zero_grad()
        step, losses = step_of(model, teacher, batch, loss="dpo", beta=0.5, anchor=1.0)
        assert "answer" not in losses  # weight 0: it is not even computed
        step.total(losses).backward()
        found.append([losses["preference"], losses["anchor"], *(p.grad for p in model.llm.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_anchor_is_the_answer_loss_of_chosen_answers(make_model):
    model, processor = make_model()
    batch = processor.collate([processor.encode(preferred(*PAIRS)), processor.encode(sample(("how many?", "two")))])
    labels = batch["labels"] * 1
    _, losses = step_of(model, make_model(seed=3)[0], batch, anchor=1.0, answer=1.0)
    labels[1] = IGNORE_INDEX  # the plain answer is none of a pair
    count = int((batch["labels"][:, 1:] >= 0).sum())
    wanted = model(**{**batch, "labels": labels}, num_labels=count).losses["answer"]
    torch.testing.assert_close(losses["anchor"], wanted)
    assert losses["answer"] > losses["anchor"]


def test_a_student_that_drops_image_tokens_inside_the_llm_has_the_same_pairs(make_model):
    model, processor = make_model()
    batch = processor.collate(
        [processor.encode(registry.Sample("s", w.images, [d])) for w in [preferred(*PAIRS)] for d in w.dialogs]
    )
    sequence = LLMSequence(batch["input_ids"] == model.image_token_id, None, None, None, pair_ids=batch["pair_ids"])
    stay = (~sequence.image_mask | (torch.arange(len(sequence.image_mask[0])) % 2 == 0)).nonzero()
    rows = [stay[stay[:, 0] == b, 1] for b in range(len(batch["input_ids"]))]
    sequence.columns = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    left = sequence.pairs()
    assert left.shape[1] < batch["pair_ids"].shape[1]
    assert [row[row >= 0].tolist() for row in left] == [row[row >= 0].tolist() for row in batch["pair_ids"]]


def test_data_without_pairs_is_refused(make_model):
    model, processor = make_model()
    batch = processor.collate([processor.encode(sample(PAIRS[0][:2]))])
    with pytest.raises(ZooError, match="needs pairs of answers, and the batch has none: train on data=preference"):
        step_of(model, model, batch)


def test_a_batch_may_hold_other_dialogs_beside_pairs(make_model):
    model, processor = make_model()
    whole = preferred(PAIRS[0])
    alone = processor.collate([processor.encode(whole)])
    wanted = step_of(model, make_model(seed=3)[0], alone)[1]["preference"]
    whole.dialogs.insert(0, talk("how many shapes are there?", "two"))
    mixed = processor.collate([processor.encode(whole), processor.encode(sample(("how many?", "two"), images=0))])
    torch.testing.assert_close(step_of(model, make_model(seed=3)[0], mixed)[1]["preference"], wanted)


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
    from zoo.train import Run

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
    from zoo.teach import main
    from zoo.train import Run

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
        ("", "detach: [upcycle]", "the stage before has: an adapter that acts stays"),
        ("detach: [upcycle]", "detach: [upcycle]", "The last stage detaches 'upcycle'"),
    ],
)
def test_adapters_are_detached_from_the_start_only(tmp_path, first, last, message):
    from tests.train_builders import config, recipe

    stages = {name: f"train: [llm], steps: 1, {more}" for name, more in (("one", first), ("two", last))}
    with pytest.raises(ZooError, match=message):
        config(recipe(tmp_path, stages), "adapter=upcycle")
