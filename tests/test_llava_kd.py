"""LLaVA-KD's three losses against loops in float64, and what each position and each token may and may not change."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.distill_builders import LLM, VOCAB
from zoo import registry
from zoo.distill.losses.relation import by_image, gram_of, relation_loss, relations
from zoo.distill.matching.positions import match_images
from zoo.registry import IGNORE_INDEX, ImageFeatures, ZooError

N = 4  # image tokens of an image


def seen(rows, width, seed=0, tokens=N, keep=None, llm=None, trains=True):
    """A model that read these rows: each a list of `i` (an image), `t` (text), `a` (a label) or `.` (padding)."""
    texts = [[piece for c in row for piece in ([c] * (tokens if c == "i" else 1))] for row in rows]
    length = max(map(len, texts))
    texts = [t + ["."] * (length - len(t)) for t in texts]
    index, count, kinds = torch.full((len(rows), length), -1), 0, {}
    labels = torch.full((len(rows), length), IGNORE_INDEX)
    answer = 0
    for b, text in enumerate(texts):
        for t, kind in enumerate(text):
            kinds[b, t] = kind
            if kind == "i":
                index[b, t], count = count, count + 1
            if kind == "a":
                labels[b, t], answer = answer % VOCAB, answer + 1
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(rows), length, width, generator=generator, dtype=torch.float64).requires_grad_(trains)
    images = count // tokens if tokens else 0
    return SimpleNamespace(
        llm=llm or LLM(width, seed=seed + 50, trains=trains),
        last_hidden_state=hidden,
        labels=labels,
        image_index=index,
        image_tokens=torch.zeros(images, tokens, 1),
        image_kept=ImageFeatures(torch.zeros(images, tokens, 1), grid=None, keep=keep),
        kinds=kinds,
    )


def pair(rows=("tiiatt", "ta"), **student):
    """A student of width 6 and a teacher of width 5 that read the same rows."""
    rows = ["titaa", "itta", "ttaaa"] if rows == ("tiiatt", "ta") else rows
    return seen(rows, 6, seed=1, **student), seen(rows, 5, seed=2, trains=False)


def build(**options):
    return registry.build("distiller", {"name": "llava_kd", **options})


def image_rows(model):
    """Hidden states of each image's tokens, in order: (images, N, C)."""
    index, flat = model.image_index.flatten(), model.last_hidden_state.flatten(0, 1)
    count = model.image_tokens.shape[1]
    return [flat[(index >= m * count) & (index < (m + 1) * count)] for m in range(len(model.image_tokens))]


def kl(student_logits, teacher_logits):
    s, t = student_logits.softmax(-1), teacher_logits.softmax(-1)
    return (t * (t.log() - s.log())).sum(-1)


def twin(student, teacher):
    """The three losses, position by position."""
    response = []
    for b in range(len(student.labels)):
        for t in range(1, student.labels.shape[1]):
            if student.labels[b, t] != IGNORE_INDEX:
                pair = (m.llm.head(m.last_hidden_state[b, t - 1]) for m in (student, teacher))
                response.append(kl(*pair))
    logits = [
        (student.llm.head(x), teacher.llm.head(y)) for x, y in zip(*map(image_rows, (student, teacher)), strict=True)
    ]
    visual = [kl(a, b) for pair in logits for a, b in zip(*pair, strict=True)]
    relation = [1 - F.cosine_similarity((a @ a.T).flatten(), (b @ b.T).flatten(), dim=0) for a, b in logits]
    return {k: sum(v) / len(v) for k, v in (("response", response), ("visual", visual), ("relation", relation))}


def test_equals_loops_over_positions_values_and_gradients():
    student, teacher = pair()
    got, wanted = build()(student, teacher, {}), twin(student, teacher)
    assert got.keys() == {"response", "visual", "relation"}
    for name, loss in got.items():
        torch.testing.assert_close(loss.double(), wanted[name].double(), rtol=1e-6, atol=1e-8)
        inputs = (student.last_hidden_state, student.llm.weight)
        for mine, theirs in zip(
            *(torch.autograd.grad(x, inputs, retain_graph=True) for x in (loss, wanted[name])), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


def test_the_papers_weights_are_the_defaults():
    assert build().weights == {"response": 1.0, "visual": 1.0, "relation": 0.5}
    assert build().needs == {"teacher.response", "teacher.visual", "teacher.relation"}
    assert build(visual_weight=0.0, relation_weight=0.0).needs == {"teacher.response"}


def test_each_loss_reaches_its_own_positions_only():
    student, teacher = pair()
    for name, loss in build()(student, teacher, {}).items():
        grad = torch.autograd.grad(loss, student.last_hidden_state, retain_graph=True)[0].abs().sum(-1)
        for (b, t), kind in student.kinds.items():
            following = student.labels[b, t + 1] != IGNORE_INDEX if t + 1 < student.labels.shape[1] else False
            reached = bool(following) if name == "response" else kind == "i"
            assert (grad[b, t] > 0) == reached, (name, b, t)


def test_the_first_token_of_an_answer_counts():
    student, teacher = pair(["ia"])  # as in captions: the image's last token predicts the answer
    response = build()(student, teacher, {})["response"]
    grad = torch.autograd.grad(response, student.last_hidden_state)[0].abs().sum(-1)
    assert grad[0, N - 1] > 0 and grad[0, : N - 1].sum() == 0


def test_what_the_teacher_says_elsewhere_changes_nothing():
    student, teacher = pair()
    wanted = build()(student, teacher, {})
    for (b, t), kind in teacher.kinds.items():
        following = t + 1 < teacher.labels.shape[1] and teacher.labels[b, t + 1] != IGNORE_INDEX
        if kind != "i" and not following:
            teacher.last_hidden_state[b, t] += 9.0
    assert {k: v.item() for k, v in build()(student, teacher, {}).items()} == {k: v.item() for k, v in wanted.items()}


def test_a_student_that_is_its_teacher_loses_nothing():
    student = seen(["tita", "ia"], 6, seed=1)
    for name, loss in build()(student, student, {}).items():
        assert loss.abs() < 1e-9, name
        assert torch.autograd.grad(loss, student.last_hidden_state, retain_graph=True)[0].abs().max() < 1e-6, name


def test_padding_and_order_of_rows_do_not_count():
    rows = ["titaa", "itta", "ttaaa"]

    def losses(order, pad):
        student, teacher = (seen([rows[i] for i in order] + ["." * 30] * pad, w, seed=w) for w in (6, 5))
        for model in (student, teacher):  # the same hidden states, wherever a row stands
            source = seen([*rows, "." * 30], model.last_hidden_state.shape[-1], seed=3)
            with torch.no_grad():
                for b, i in enumerate(order):
                    length = min(model.labels.shape[1], source.labels.shape[1])
                    model.last_hidden_state[b, :length] = source.last_hidden_state[i, :length]
            model.labels = model.labels.clone()
        return build()(student, teacher, {})

    first, second = losses([0, 1, 2], 0), losses([2, 0, 1], 1)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-9, atol=1e-12)


def test_sums_are_divided_by_what_the_step_counts():
    student, teacher = pair()
    alone, halves = build()(student, teacher, {}), build()(student, teacher, {"num_labels": 12, "num_images": 4})
    assert student.labels.ne(IGNORE_INDEX).sum() == 6 and len(student.image_tokens) == 2
    for name in alone:
        torch.testing.assert_close(halves[name], alone[name] / 2)


def test_text_alone_has_a_response_only():
    student, teacher = pair(["ttaa"])
    losses = build()(student, teacher, {})
    assert losses.keys() == {"response"} and losses["response"] > 0


def test_several_images_in_a_row_each_count_alone():
    together, apart = pair(["iita"]), pair(["iita"])
    student, teacher = together
    wanted = twin(*apart)
    got = build()(student, teacher, {})
    for name in got:
        torch.testing.assert_close(got[name].double(), wanted[name].double(), rtol=1e-6, atol=1e-8)


def test_a_student_with_fewer_image_tokens_learns_from_the_same_cells():
    keep = torch.tensor([[0, 3], [1, 2]])
    rows = ["tita", "ia"]
    student, teacher = seen(rows, 6, seed=1, tokens=2, keep=keep), seen(rows, 5, seed=2, trains=False)
    got = build()(student, teacher, {})
    theirs = [x[keep[m]] for m, x in enumerate(image_rows(teacher))]
    ours = image_rows(student)
    visual = torch.cat([kl(student.llm.head(x), teacher.llm.head(y)) for x, y in zip(ours, theirs, strict=True)]).mean()
    torch.testing.assert_close(got["visual"], visual)
    inputs = (student.last_hidden_state,)
    grad = torch.autograd.grad(got["visual"], inputs)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(visual, inputs)[0])
    response = twin_response(student, teacher)
    torch.testing.assert_close(got["response"], response)


def twin_response(student, teacher):
    """KL over labels, which are as many in both, wherever they stand."""
    pairs = []
    for model in (student, teacher):
        where = (model.labels[:, 1:] != IGNORE_INDEX).nonzero().tolist()
        pairs.append(torch.stack([model.last_hidden_state[b, t] for b, t in where]))
    return kl(student.llm.head(pairs[0]), teacher.llm.head(pairs[1])).mean()


def test_a_teacher_that_dropped_what_the_student_has_is_an_error():
    rows = ["ita"]
    student = seen(rows, 6, seed=1)
    teacher = seen(rows, 5, seed=2, tokens=2, keep=torch.tensor([[0, 1]]), trains=False)
    with pytest.raises(ZooError, match="tokens that the teacher dropped"):
        build()(student, teacher, {})


def test_a_teacher_with_more_rows_in_its_table_changes_nothing():
    student, teacher = pair()
    wanted = build()(student, teacher, {})
    more = torch.cat([teacher.llm.weight, 5 * torch.randn(7, 5, dtype=torch.float64)])
    teacher.llm.weight, teacher.llm.vocab_size = more, VOCAB + 7
    for name, loss in build()(student, teacher, {}).items():
        torch.testing.assert_close(loss, wanted[name])


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"scale": 0.5, "bias": True}, {"cap": 3.0}])
@pytest.mark.parametrize("normalise", ["none", "unit", "centred_unit"])
def test_relations_are_those_of_the_logits(options, normalise):
    llm, rows = LLM(6, **options), torch.randn(2, N, 6, dtype=torch.float64, requires_grad=True)
    logits = llm.head(rows)[..., : VOCAB - 2]
    if normalise == "centred_unit":
        logits = logits - logits.mean(-1, keepdim=True)
    if normalise != "none":
        logits = logits / logits.norm(dim=-1, keepdim=True)
    wanted, got = logits @ logits.transpose(-1, -2), relations(llm, rows, VOCAB - 2, normalise)
    torch.testing.assert_close(got, wanted)
    probe = torch.randn_like(wanted)
    both = (torch.autograd.grad((x * probe).sum(), (rows, llm.weight)) for x in (got, wanted))
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_relations_hold_no_array_over_the_vocabulary(monkeypatch):
    """Above a piece of the vocabulary, nothing but the table itself and its gradient has that many rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from zoo.distill.losses import relation

    monkeypatch.setattr(relation, "PIECE", 4)
    shapes = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.extend(
                tuple(x.shape) for x in (out if isinstance(out, (list, tuple)) else [out]) if hasattr(x, "shape")
            )
            return out

    for cap in (None, 3.0):
        llm, rows = LLM(6, cap=cap), torch.randn(1, N, 6, dtype=torch.float64, requires_grad=True)
        with Shapes():
            relations(llm, rows, VOCAB).sum().backward()
    assert {s for s in shapes if VOCAB in s} <= {(VOCAB, 6)}


def test_what_the_relation_loss_is_blind_to():
    torch.manual_seed(0)
    llm, rows = LLM(8), torch.randn(3, N, 8, dtype=torch.float64)
    other = LLM(8, seed=1)
    for how in ("none", "unit", "centred_unit"):
        base = relations(other, torch.randn(3, N, 8, dtype=torch.float64), VOCAB, how)
        mine = relations(llm, rows, VOCAB, how)
        loss = relation_loss(mine, base)
        assert (loss >= 0).all() and (loss <= 1).all()
        torch.testing.assert_close(relation_loss(relations(llm, 3 * rows, VOCAB, how), base), loss)
        per_token = rows * torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64).view(1, N, 1)
        changed = relation_loss(relations(llm, per_token, VOCAB, how), base)
        assert torch.allclose(changed, loss) == (how != "none")
        shifted = LLM(8)
        shifted.bias = torch.full((VOCAB,), 1.0, dtype=torch.float64)  # a constant on every token's logits
        moved = relation_loss(relations(shifted, rows, VOCAB, how), base)
        assert torch.allclose(moved, loss) == (how == "centred_unit")


def test_padding_of_images_with_fewer_tokens_has_no_relations():
    rows, group = torch.randn(5, 6, dtype=torch.float64), torch.tensor([1, 0, 1, 1, 0])
    padded = by_image(rows, group, 2)
    assert padded.shape == (2, 3, 6)
    torch.testing.assert_close(padded[0, :2], rows[[1, 4]])
    torch.testing.assert_close(padded[1], rows[[0, 2, 3]])
    llm, other = LLM(6, bias=True), LLM(6, bias=True, seed=3)
    for how in ("none", "unit", "centred_unit"):
        whole = relation_loss(relations(llm, padded, VOCAB, how), relations(other, padded, VOCAB, how))[0]
        alone = relation_loss(*(relations(x, padded[:1, :2], VOCAB, how) for x in (llm, other)))[0]
        torch.testing.assert_close(whole, alone)


def test_an_image_that_lost_all_of_its_tokens_has_no_loss():
    student, teacher = pair(["tiia"])
    student.image_index = student.image_index.masked_fill(student.image_index >= N, -1)  # of the second image
    a, b = (m.llm.head(image_rows(m)[0]) for m in (student, teacher))
    wanted = 1 - F.cosine_similarity((a @ a.T).flatten(), (b @ b.T).flatten(), dim=0)
    torch.testing.assert_close(build()(student, teacher, {"num_images": 2})["relation"], wanted / 2)


def test_a_head_that_is_more_than_a_product_is_refused():
    with pytest.raises(ZooError, match="relation_weight=0"):
        gram_of(LLM(6, plain=False), VOCAB)


def test_weights_warm_up_each_for_itself():
    kd = build(visual_warmup=0.5, relation_warmup=1.0)
    found = []
    for step in (0, 4, 9):
        kd.begin_step(step, 10)
        found.append(dict(kd.weights))
    assert [f["response"] for f in found] == [1.0, 1.0, 1.0]
    assert [f["visual"] for f in found] == pytest.approx([0.2, 1.0, 1.0])
    assert [f["relation"] for f in found] == pytest.approx([0.05, 0.25, 0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "foward"}, "'foward'. Did you mean 'forward'"),
        ({"relation_normalise": "units"}, "Did you mean 'unit'"),
        ({"temperature": 0.0}, "temperature must be more than 0"),
        ({"visual_weight": -1.0}, "weight of visual must be at least 0"),
        ({"visual_warmup": 2.0}, r"share of the stage, in \[0, 1\]"),
        ({"response_weight": 0.0, "visual_weight": 0.0, "relation_weight": 0.0}, "nothing is left"),
        ({"divergence": "jsd", "beta": 1.0}, r"beta of jsd must be in \(0, 1\)"),
    ],
)
def test_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ZooError, match=message):
        build(**options)


def test_merged_tokens_are_known_by_the_first_of_their_cells():
    groups = torch.tensor([[0, 0, 1, 1, 2, 2], [2, 0, 0, 1, 1, 2]])
    rows = ["ita", "ia"]
    student, teacher = (
        seen(rows, w, seed=w, tokens=t, trains=w == 6) for w, t in ((6, 2), (5, 3))
    )  # the teacher merged six cells into three; the student dropped one of those
    teacher.image_kept = ImageFeatures(torch.zeros(2, 3, 1), grid=None, groups=groups)
    dropped = torch.tensor([[0, 0, -1, -1, 1, 1], [-1, 0, 0, 1, 1, -1]])
    student.image_kept = ImageFeatures(torch.zeros(2, 2, 1), grid=None, groups=dropped)
    matched = match_images(student, teacher, {})
    theirs = image_rows(teacher)
    wanted = torch.stack([theirs[0][0], theirs[0][2], theirs[1][0], theirs[1][1]])
    torch.testing.assert_close(matched.target.rows, wanted, rtol=0, atol=0)
