"""The chunked divergence against its formulas in float64: values and gradients, whatever the head and the teacher."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.distill.losses.chunked import LiveTeacher, TopKTeacher, divergence
from zoo.registry import LinearHead, ZooError

S, C, V = 11, 6, 17
BETAS = (0.0, 0.3, 1.0)


class Student(SimpleNamespace):
    """What the divergence asks of a language model; `fused=False` hides the numbers of its head."""

    def head(self, hidden):
        logits = F.linear(hidden, self.weight, self.bias) * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def linear_head(self):
        return LinearHead(self.weight, self.bias, self.scale, self.cap) if self.fused else None


def student(fused=True, scale=1.0, cap=None, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    weight = torch.randn(V, C, dtype=dtype, requires_grad=True)
    more = torch.randn(V, dtype=dtype, requires_grad=True) if bias else None
    return Student(weight=weight, bias=more, scale=scale, cap=cap, fused=fused, vocab_size=V)


def rows(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(S, C, dtype=dtype, requires_grad=True)


def teacher(dtype=torch.float64, vocab=V):
    torch.manual_seed(2)
    hidden, weight = torch.randn(S, 4, dtype=dtype), torch.randn(vocab, 4, dtype=dtype)
    return hidden @ weight.T, LiveTeacher(hidden, lambda x: x @ weight.T)


def naive(logits, wanted, beta, temperature=1.0):
    """Divergence of each position, as the formulas say."""
    s, t = (F.softmax(z / temperature, -1) for z in (logits, wanted))
    if beta == 0:
        return (t * (t / s).log()).sum(-1)
    if beta == 1:
        return (s * (s / t).log()).sum(-1)
    m = beta * t + (1 - beta) * s
    return beta * (t * (t / m).log()).sum(-1) + (1 - beta) * (s * (s / m).log()).sum(-1)


def gradients(loss, model, hidden):
    inputs = [x for x in (hidden, model.weight, model.bias) if x is not None]
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, S, 50])
def test_values_and_gradients_are_those_of_the_formulas(beta, fused, chunk):
    model, hidden, weights = student(fused), rows(), torch.linspace(0.0, 2.0, S, dtype=torch.float64)
    logits, target = teacher()
    got = divergence(model, hidden, target, beta=beta, temperature=1.7, weights=weights, chunk=chunk)
    wanted = (naive(model.head(hidden), logits, beta, 1.7) * weights).sum()
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    assert got > 0
    for mine, theirs in zip(gradients(3 * got, model, hidden), gradients(3 * wanted, model, hidden), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_agrees_with_trl(beta):
    trl = pytest.importorskip("trl", reason="trl is not installed: its own JSD is not compared")
    gkd = getattr(trl, "GKDTrainer", None) or pytest.importorskip("trl.experimental.gkd").GKDTrainer
    model, hidden = student(), rows()
    logits, target = teacher()
    got = divergence(model, hidden, target, beta=beta, temperature=1.5, chunk=4)
    wanted = gkd.generalized_jsd_loss(model.head(hidden), logits, beta=beta, temperature=1.5, reduction="sum")
    torch.testing.assert_close(got, wanted)
    for mine, theirs in zip(gradients(got, model, hidden), gradients(wanted, model, hidden), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("options", [{"scale": 0.25}, {"cap": 2.0}, {"scale": 3.0, "cap": 1.5}, {"bias": False}])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_scaled_and_capped_heads(options, beta):
    model, hidden = student(**options), rows()
    logits, target = teacher()
    got = divergence(model, hidden, target, beta=beta, chunk=4)
    wanted = naive(model.head(hidden), logits, beta).sum()
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    for mine, theirs in zip(gradients(got, model, hidden), gradients(wanted, model, hidden), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_equals_torch_in_float32():
    model, hidden = student(dtype=torch.float32), rows(torch.float32)
    logits, target = teacher(torch.float32)
    got = divergence(model, hidden, target, chunk=3) / S
    pair = (F.log_softmax(model.head(hidden), -1), F.log_softmax(logits, -1))
    wanted = F.kl_div(*pair, log_target=True, reduction="batchmean")
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    for mine, theirs in zip(gradients(got, model, hidden), gradients(wanted, model, hidden), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("fused", [True, False])
def test_padding_rows_of_a_vocabulary_do_not_count(beta, fused):
    model, hidden = student(fused), rows()
    logits, target = teacher(vocab=V + 8)
    got = divergence(model, hidden, target, beta=beta, chunk=4)
    torch.testing.assert_close(got, naive(model.head(hidden), logits[:, :V], beta).sum())
    fewer = divergence(model, hidden, target, beta=beta, vocab_size=V - 5, chunk=4)
    wanted = naive(model.head(hidden)[:, : V - 5], logits[:, : V - 5], beta).sum()
    torch.testing.assert_close(fewer, wanted)
    for mine, theirs in zip(gradients(fewer, model, hidden), gradients(wanted, model, hidden), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert len(mine) != V or mine[V - 5 :].abs().sum() == 0


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_the_teacher_loses_nothing(beta):
    model, hidden = student(dtype=torch.float32), rows(torch.float32)
    loss = divergence(model, hidden, LiveTeacher(hidden.detach(), model.head), beta=beta)
    assert loss.abs() < 1e-5 and gradients(loss, model, hidden)[0].abs().max() < 1e-6


@pytest.mark.parametrize("beta", BETAS)
def test_a_constant_on_all_logits_of_a_position_changes_nothing(beta):
    model, hidden = student(), rows()
    _, target = teacher()
    shifted = LiveTeacher(target.rows, lambda x: target.head(x) + 5.0)
    torch.testing.assert_close(
        divergence(model, hidden, shifted, beta=beta), divergence(model, hidden, target, beta=beta)
    )


def stored(logits, k):
    log_probs = F.log_softmax(logits, -1)
    top = log_probs.topk(k, -1)
    rest = 1 - top.values.exp().sum(-1)
    return TopKTeacher(top.indices, top.values, rest.log())


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("fused", [True, False])
def test_a_stored_teacher_is_compared_over_its_tokens_and_the_rest(beta, fused):
    model, hidden = student(fused, cap=4.0), rows()
    logits, _ = teacher()
    target = stored(logits, 5)
    got = divergence(model, hidden, target, beta=beta, chunk=4)
    s, t = (F.softmax(z, -1) for z in (model.head(hidden), logits))
    pairs = []
    for p in (s, t):  # K + 1 outcomes
        few = p.gather(1, target.ids)
        pairs.append(torch.cat([few, 1 - few.sum(-1, keepdim=True)], -1).log())
    wanted = naive(*pairs, beta).sum()
    torch.testing.assert_close(got, wanted)
    for mine, theirs in zip(gradients(got, model, hidden), gradients(wanted, model, hidden), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_teacher_stored_almost_whole_gives_the_gradient_of_the_live_one():
    model, hidden = student(), rows()
    logits, target = teacher()
    got = gradients(divergence(model, hidden, stored(logits, V - 1)), model, hidden)
    for mine, theirs in zip(got, gradients(divergence(model, hidden, target), model, hidden), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_stored_teacher_has_no_other_temperature():
    with pytest.raises(ZooError, match="temperature=2"):
        divergence(student(), rows(), stored(teacher()[0], 3), temperature=2.0)


def test_no_position_is_no_loss():
    model, hidden = student(), rows()
    loss = divergence(model, hidden[:0], LiveTeacher(torch.zeros(0, 4), lambda x: x))
    assert loss == 0 and torch.autograd.grad(loss, hidden)[0].abs().sum() == 0


def test_frozen_heads_get_no_gradient():
    model, hidden = student(), rows()
    _, target = teacher()
    wanted = torch.autograd.grad(divergence(model, hidden, target), hidden)[0]
    model.weight.requires_grad_(False), model.bias.requires_grad_(False)
    loss = divergence(model, hidden, target)
    loss.backward()
    torch.testing.assert_close(hidden.grad, wanted)
    assert model.weight.grad is None
    assert not divergence(model, hidden.detach(), target).requires_grad


@pytest.mark.parametrize("fused", [True, False])
def test_bf16_products_stay_near_those_of_float32(fused):
    model, hidden = student(fused, dtype=torch.float32), rows(torch.float32)
    _, target = teacher(torch.float32)
    exact = divergence(model, hidden, target, chunk=4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = divergence(model, hidden, target, chunk=4)
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    assert loss.dtype == torch.float32
    pairs = zip(gradients(loss, model, hidden), gradients(exact, model, hidden), strict=True)
    assert all((a - b).norm() < 3e-2 * b.norm() and a.dtype == torch.float32 for a, b in pairs)


class Largest(TorchDispatchMode):
    """Remembers the most elements of any result whose last axis is the vocabulary."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[-1] == V:
            self.most = max(self.most, len(out))
        return out


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("fused", [True, False])
def test_no_logits_beyond_a_chunk_are_ever_held(beta, fused):
    model, hidden = student(fused), rows()
    _, target = teacher()
    with Largest() as seen:
        divergence(model, hidden, target, beta=beta, chunk=3).backward()
    assert seen.most == max(3, C)  # the head's own weight, transposed, has C rows
