"""Preference losses against slow twins and TRL, what they are blind to, and pairs of answers in every kind of row."""

import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from tests.conftest import sample, talk
from tests.distill_builders import LENGTH, LLM, ROWS, VOCAB, WIDTH, seen
from tests.test_preference_data import preferred
from zoo import registry
from zoo.composed.outputs import LLMSequence, Seen
from zoo.distill.losses.logprobs import token_logprobs
from zoo.distill.losses.preference import LOSSES, preference_loss
from zoo.registry import IGNORE_INDEX, ZooError
from zoo.settings.stage import Stage
from zoo.training.step import TrainStep


def build(**options):
    return registry.build("distiller", {"name": "llava_mod", "objective": "preference", **options})


def paired():
    """Ids (ROWS, LENGTH) and pairs: pair 0 packed in the first row, pair 1 in rows of its own."""
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    pairs = torch.full((ROWS, LENGTH), -1)
    pairs[0, 2:4], pairs[0, 6:9], pairs[1, 4:6], pairs[2, 3:8] = 0, 1, 2, 3
    return ids, pairs


def logps(who, ids, pairs):
    """Log-probability of each answer, a loop over tokens."""
    total = [0.0] * (int(pairs.max()) + 1)
    for b in range(ROWS):
        for t in range(1, LENGTH):
            if pairs[b, t] >= 0:
                scores = torch.log_softmax(who.llm.head(who.last_hidden_state[b, t - 1]), -1)
                total[pairs[b, t]] = total[pairs[b, t]] + scores[ids[b, t]]
    return total


def naive(kind, u, d, beta, through=False, smoothing=0.0):
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
        "dpo": lambda m: -(1 - smoothing) * torch.log(sigmoid(beta * m)) - smoothing * torch.log(sigmoid(-beta * m)),
        "hinge": lambda m: torch.clamp(1 - beta * m, min=0),
        "ipo": lambda m: (m - 1 / (2 * beta)) ** 2,
    }[kind]
    return sum(one(a - b) for a, b in zip(u, d, strict=True)) / len(u)


@pytest.mark.parametrize("logprobs", ["sum", "mean"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {}) for kind in LOSSES), ("kto_pair", {"through_means": True}), ("dpo", {"label_smoothing": 0.2})],
)
def test_preference_is_its_equation_in_values_and_gradients(kind, options, logprobs):
    through, smoothing = options.get("through_means", False), options.get("label_smoothing", 0.0)
    ids, pairs = paired()
    batch = {"input_ids": ids, "pair_ids": pairs}
    grads = []
    for way in ("ours", "naive"):
        student, teacher = seen(None, pairs), seen(None, pairs, seed=2, llm=LLM(WIDTH, seed=5, plain=False))
        if way == "ours":
            loss = build(loss=kind, beta=0.3, logprobs=logprobs, **options)(student, teacher, batch)
            loss = loss["preference"]
        else:
            mine, theirs = logps(student, ids, pairs), [x.detach() for x in logps(teacher, ids, pairs)]
            counts = [int((pairs == i).sum()) if logprobs == "mean" else 1 for i in range(len(mine))]
            ratios = [(a - b) / n for a, b, n in zip(mine, theirs, counts, strict=True)]
            loss = naive(kind, ratios[::2], ratios[1::2], 0.3, through, smoothing)
        loss.backward()
        grads.append([loss, student.last_hidden_state.grad, student.llm.weight.grad])
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
        student = seen(None, pairs[:1].expand(ROWS, LENGTH).clone())
        pairs_one = torch.full_like(pairs, -1)
        pairs_one[0] = pairs[0]
        student.out.sequence.pair_ids = pairs_one
        teacher = seen(None, pairs_one, seed=reference)
        batch = {"input_ids": ids, "pair_ids": pairs_one}
        build(loss="dpo")(student, teacher, batch)["preference"].backward()
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
    distiller = build(loss="dpo")
    loss = distiller(student, teacher, batch)["preference"]
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert student.llm.weight.grad.abs().max() < 1e-12
    with torch.no_grad():
        student.last_hidden_state[:, 8] += 5
        student.last_hidden_state[1:] *= 3
    assert torch.equal(distiller(student, teacher, batch)["preference"], loss)


def test_what_is_logged_is_margin_and_accuracy_and_counts_nothing():
    ids, pairs = paired()
    student, teacher = seen(None, pairs), seen(None, pairs, seed=2)
    distiller = build(anchor=0.5, weight=2.0)
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
    llm = LLM(WIDTH, plain=False)
    rows, wanted = torch.randn(10, WIDTH, dtype=torch.float64), torch.randint(0, VOCAB, (10,))
    grads = []
    for chunk in (None, 3):
        x = rows.clone().requires_grad_()
        llm.weight.grad = None
        values = token_logprobs(llm, x, wanted, chunk)
        (values * torch.arange(10)).sum().backward()
        grads.append([values, x.grad, llm.weight.grad.clone()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(llm, rows, wanted, 3), grads[0][0])


def test_a_stored_reference_is_averaged_over_the_tokens_that_it_was_summed_over():
    ids, pairs = paired()
    batch = {"input_ids": ids, "pair_ids": pairs}
    student, teacher = seen(None, pairs), seen(None, pairs, seed=2)
    kept = torch.stack(logps(teacher, ids, pairs)).detach().unsqueeze(-1)  # (2 P, 1), as `zoo teach` writes it
    distiller = build(loss="ipo", logprobs="mean")
    stored = distiller(student, None, {**batch, "targets": {"teacher.pairs.log_probs": kept}})
    torch.testing.assert_close(stored, distiller(student, teacher, batch))


def test_label_smoothing_is_dpo_of_pairs_that_may_be_swapped():
    u, d = ratios()
    for share in (0.0, 0.1, 0.4):
        mixed = (1 - share) * preference_loss("dpo", u, d, 0.7) + share * preference_loss("dpo", d, u, 0.7)
        torch.testing.assert_close(preference_loss("dpo", u, d, 0.7, label_smoothing=share), mixed)
    for options, message in [
        ({"loss": "dpo", "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is for objective=preference with loss=dpo"),
        ({"logprobs": "men"}, "Did you mean 'mean'"),
    ]:
        with pytest.raises(ZooError, match=message):
            build(**options)


@pytest.mark.parametrize(
    ("kind", "logprobs", "theirs"),
    [("dpo", "sum", "sigmoid"), ("hinge", "sum", "hinge"), ("ipo", "mean", "ipo"), ("dpo", "mean", "sigmoid_norm")],
)
def test_agrees_with_trl(kind, logprobs, theirs):
    """Its trainer's own loss of answers of one to six tokens: IPO and `sigmoid_norm` take means, the others sums."""
    trl = pytest.importorskip("trl", reason="trl is not installed: its own preference losses are not compared")
    lengths = torch.tensor([1, 2, 6, 3, 4, 6, 1, 5, 2, 6])  # five chosen ones, then five rejected
    answer = (torch.arange(6) < lengths.unsqueeze(1)).long()  # (10, 6)
    policy, reference = (torch.randn(10, 6, generator=torch.Generator().manual_seed(s)) * answer for s in (0, 1))
    policy.requires_grad_()
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device=torch.device("cpu"))
    settings = {"loss_types": [theirs], "loss_weights": [1.0], "beta": 0.3, "f_divergence_type": "reverse_kl"}
    off = {"ld_alpha": None, "aux_loss_enabled": False, "use_weighting": False, "precompute_ref_logps": True}
    trainer = MagicMock(**settings, **off, accelerator=same)
    nothing = torch.zeros(10, 6)
    said = SimpleNamespace(log_probs=policy, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    mask = torch.nn.functional.pad(answer, (1, 0))  # the prompt is one token
    batch = {"input_ids": torch.zeros_like(mask), "completion_mask": mask, "attention_mask": torch.ones_like(mask)}
    chosen, rejected = reference.sum(1).chunk(2)
    batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    wanted = trl.DPOTrainer._compute_loss(trainer, lambda **inputs: said, batch, False)
    counts = {"sum": torch.ones_like(lengths), "mean": lengths}
    found = {}
    for way, count in counts.items():
        u, d = ((policy - reference).sum(1) / count).chunk(2)
        found[way] = preference_loss(kind, u, d, 0.3).mean()
    torch.testing.assert_close(found[logprobs], wanted)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, policy, retain_graph=True)[0] for x in (found[logprobs], wanted))
    )
    assert all((value - wanted).abs() > 0.01 for way, value in found.items() if way != logprobs)


# ---- with models -------------------------------------------------------------------------------------------------

PAIRS = ("is there a red circle?", "yes", "no"), ("what color is the square?", "blue", "red")


class Frozen:
    """A teacher on the student's own batch."""

    vocab_size = None

    def __init__(self, model):
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def outputs_for(self, batch, student):
        return Seen(self.model(**batch, run_head=False), self.model.llm)


def step_of(model, teacher, batch, answer=0.0, **options):
    stage = Stage(steps=1, loss_weights={"answer": answer})
    step = TrainStep(model, build(**options), Frozen(teacher), stage)
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
    wanted = model(**{**batch, "labels": labels}, num_items_in_batch=count).losses["answer"]
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
