"""What every registered projector must do, with its default options."""

from dataclasses import replace

import pytest
import torch

from tests.fusion_builders import features, same_state
from zoo import registry
from zoo.registry import Projector

DIM, TEXT, GRID = 24, 40, (4, 6)
pytestmark = pytest.mark.parametrize("name", registry.names("projector"))


def width(name):
    return DIM if name == "identity" else TEXT


def build(name, seed=0):
    torch.manual_seed(seed)
    sizes = {"vision_dim": DIM, "text_dim": width(name), "grid": GRID, "num_tokens": 24}
    projector = registry.build("projector", {"name": name}, **sizes)
    return projector.eval()


def test_keeps_the_contract_and_counts_its_tokens(name):
    projector = build(name)
    assert isinstance(projector, Projector)
    assert isinstance(registry.get("projector", name).cls.needs, frozenset)
    out = projector(features(grid=GRID))
    assert out.shape == (3, projector.num_tokens(24), width(name))


def test_structure_on_meta_is_that_of_the_real_one(name):
    with torch.device("meta"):
        meta = build(name)
    assert {p.device.type for p in meta.parameters()} <= {"meta"}
    real = build(name)
    assert {k: v.shape for k, v in meta.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    image = replace(features(grid=GRID), tokens=torch.empty(3, 24, DIM, device="meta"), cls_attention=None)
    assert meta(image).shape == real(features(grid=GRID)).shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_reaches_every_parameter_and_the_tokens(name, dtype):
    projector = build(name).to(dtype).train()
    tokens = features(grid=GRID).tokens.to(dtype).requires_grad_()
    out = projector(replace(features(grid=GRID), tokens=tokens))
    assert out.dtype == dtype
    (out.float() ** 2).sum().backward()
    grads = {n: p.grad for n, p in projector.named_parameters()} | {"tokens": tokens.grad}
    assert [n for n, g in grads.items() if g is None or not g.isfinite().all() or not g.any()] == []


@torch.no_grad()
def test_a_batch_is_each_image_alone_and_twice_the_same(name):
    projector, image = build(name), features(grid=GRID)
    out = projector(image)
    assert torch.equal(out, projector(image))
    for i in range(3):
        one = replace(image, tokens=image.tokens[i : i + 1], cls_attention=image.cls_attention[i : i + 1])
        assert torch.allclose(projector(one), out[i : i + 1], atol=1e-5)


@torch.no_grad()
def test_state_dict_makes_another_the_same(name):
    a, b = build(name), build(name, seed=1)
    assert not same_state(a.state_dict(), b.state_dict()) or not a.state_dict()
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(features(grid=GRID)), b(features(grid=GRID)))


def test_starts_with_tokens_of_moderate_size(name):
    out = build(name)(features(grid=GRID))
    assert 0.01 < out.std() < 3
