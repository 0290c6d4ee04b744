"""The pool-adapter: means of windows on the grid, then the MLP; each token keeps its place."""

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import ANSWERS, QUESTIONS, sample, tiny_slots
from tests.fusion_builders import features
from zoo import registry
from zoo.checking.checker import RefusedError, check
from zoo.checking.plan import Plan
from zoo.registry import IGNORE_INDEX, ImageFeatures, ZooError

D, C = 24, 40


def build(grid=(4, 6), seed=0, **options):
    torch.manual_seed(seed)
    node = {"name": "pool", **options}
    return registry.build("projector", node, vision_dim=D, text_dim=C, grid=grid, num_tokens=grid[0] * grid[1]).double()


def on(grid, m=2, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, *grid, D, generator=g, dtype=torch.float64).to(dtype)  # (M, H, W, D)


def run(projector, field):
    return projector(ImageFeatures(field.flatten(1, 2), tuple(field.shape[1:3])))


def naive(projector, field, windows):
    """Loops over images, cells and patches; `windows` gives the rows (or columns) of cell i."""
    (h, w), (rows, columns) = projector.grid_out, windows
    first, last = projector.net[0], projector.net[2]
    out = []
    for image in field:
        for i in range(h):
            for j in range(w):
                cell = [image[r, c] for r in rows(i) for c in columns(j)]
                mean = sum(cell) / len(cell)
                inner = first.weight @ mean + first.bias
                inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
                out.append(last.weight @ inner + last.bias)
    return torch.stack(out).view(len(field), h * w, -1)


@pytest.mark.parametrize(
    ("grid", "options"),
    [((4, 6), {}), ((4, 6), {"target": [4, 2]}), ((6, 6), {"stride": 3}), ((5, 7), {"uneven": "adaptive"})],
)
def test_values_and_gradients_are_those_of_the_equation(grid, options):
    projector = build(grid, **options)

    def spans(side, cells):  # floor(i * H / h) .. ceil((i + 1) * H / h) - 1; the plain windows where h divides H
        return lambda i: range(i * side // cells, -(-(i + 1) * side // cells))

    windows = [spans(side, cells) for side, cells in zip(grid, projector.grid_out, strict=True)]
    grads = []
    for way in (lambda x: run(projector, x), lambda x: naive(projector, x, windows)):
        field = on(grid).requires_grad_()
        out = way(field)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        grads.append([out, *torch.autograd.grad((out * weight).sum(), [field, *projector.parameters()])])
    assert out.shape == (2, projector.num_tokens(grid[0] * grid[1]), C)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))


def test_the_released_setting_is_the_default():
    """32 x 32 patches of width 1408 to 256 tokens of width 4096 with 22,552,576 parameters."""
    with torch.device("meta"):
        node = {"name": "pool"}
        projector = registry.build("projector", node, vision_dim=1408, text_dim=4096, grid=(32, 32))
        assert projector.num_tokens(1024) == 256
        assert sum(p.numel() for p in projector.parameters()) == 22_552_576 == 1408 * 4096 + 4096**2 + 2 * 4096
        same = registry.build("projector", {**node, "target": [16, 16]}, vision_dim=1408, text_dim=4096, grid=(32, 32))
        assert same.grid_out == projector.grid_out == (16, 16)


def test_a_constant_field_gives_the_mlp_of_it_everywhere():
    projector, v = build(), on((1, 1))[:, 0, 0]  # (2, D)
    out = run(projector, v[:, None, None].expand(2, 4, 6, D))
    assert torch.allclose(out, projector.net(v)[:, None].expand_as(out), atol=1e-12)


def test_a_patch_changes_its_own_token_alone():
    projector, field = build(), on((4, 6), m=1).requires_grad_()
    for t in range(6):
        (grad,) = torch.autograd.grad(run(projector, field)[0, t].sum(), field)
        i, j = divmod(t, 3)
        inside = torch.zeros(4, 6, dtype=torch.bool)
        inside[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = True
        assert not grad[0][~inside].any() and grad[0][inside].any(-1).all()
    pooled = projector.pool(field.flatten(1, 2), (4, 6))
    (grad,) = torch.autograd.grad(pooled[0, 0, 0], field)
    assert torch.equal(grad[0, :2, :2, 0], torch.full((2, 2), 0.25, dtype=torch.float64))


def test_cls_and_registers_change_nothing():
    projector, field = build(), on((4, 6))
    prefix = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    out = projector(ImageFeatures(field.flatten(1, 2), (4, 6), prefix=prefix))
    assert torch.equal(out, run(projector, field))
    assert torch.autograd.grad(out.sum(), prefix, allow_unused=True) == (None,)


def test_order_within_a_window_does_not_matter():
    field = on((4, 6))
    cells = field.view(2, 2, 2, 3, 2, D)
    shuffled = cells.flip(2).transpose(2, 4).reshape(2, 4, 6, D)
    assert not torch.equal(shuffled, field)
    assert torch.allclose(run(build(), shuffled), run(build(), field), atol=1e-12)


def test_rolls_mirrors_and_transposes_of_patches_are_those_of_tokens():
    projector = build((6, 6))
    field = on((6, 6))
    tokens = run(projector, field).unflatten(1, (3, 3))
    rolled = run(projector, field.roll((2, 4), (1, 2))).unflatten(1, (3, 3))
    assert torch.allclose(rolled, tokens.roll((1, 2), (1, 2)), atol=1e-12)
    half = run(projector, field.roll(1, 2)).unflatten(1, (3, 3))
    assert not any(torch.allclose(half, tokens.roll(k, 2), atol=1e-3) for k in range(3))
    mirrored = run(projector, field.flip(2)).unflatten(1, (3, 3))
    assert torch.allclose(mirrored, tokens.flip(2), atol=1e-12)
    turned = run(projector, field.transpose(1, 2)).unflatten(1, (3, 3))
    assert torch.allclose(turned, tokens.transpose(1, 2), atol=1e-12)


def test_no_pooling_and_pooling_to_one():
    field = on((4, 6))
    one_each, one = build(stride=1), build(target=[1, 1])
    assert torch.allclose(run(one_each, field), one_each.net(field.flatten(1, 2)), atol=1e-12)
    assert torch.allclose(run(one, field), one.net(field.mean((1, 2)))[:, None], atol=1e-12)


def test_means_of_means():
    field = on((8, 8))
    tokens = field.flatten(1, 2)
    pooled = build((8, 8)).pool(tokens, (8, 8))
    assert torch.allclose(pooled.mean(1), tokens.mean(1), atol=1e-12)
    twice = build((4, 4)).pool(pooled, (4, 4))
    assert torch.allclose(twice, build((8, 8), stride=4).pool(tokens, (8, 8)), atol=1e-12)


def test_the_mlp_comes_after_pooling():
    projector, field = build(), on((4, 6))
    swapped = projector.pool(projector.net(field.flatten(1, 2)), (4, 6))
    assert (run(projector, field) - swapped).abs().max() > 1e-3


def test_tokens_stand_in_rows():
    places = torch.zeros(1, 4, 9, D, dtype=torch.float64)
    places[..., 0], places[..., 1] = torch.arange(4.0)[:, None], torch.arange(9.0)[None]
    pooled = build((4, 9), target=[2, 3]).pool(places.flatten(1, 2), (4, 9))[0, :, :2]
    assert pooled.tolist() == [[2 * i + 0.5, 3 * j + 1.0] for i in range(2) for j in range(3)]


def test_images_do_not_see_each_other():
    projector, field = build(), on((4, 6), m=5)
    out = run(projector, field)
    assert torch.equal(out, run(projector, field))
    for i in range(5):
        assert torch.allclose(run(projector, field[i : i + 1]), out[i : i + 1], atol=1e-12)


def test_adaptive_windows_are_the_strict_ones_where_they_divide():
    field = on((4, 6), dtype=torch.float32)
    strict, adaptive = build().float(), build(uneven="adaptive").float()
    assert torch.equal(run(strict, field), run(adaptive, field))
    odd = on((5, 7))
    wanted = F.adaptive_avg_pool2d(odd.permute(0, 3, 1, 2), (3, 4)).flatten(2).transpose(1, 2)
    assert torch.equal(build((5, 7), uneven="adaptive").pool(odd.flatten(1, 2), (5, 7)), wanted)


def test_means_of_bfloat16_are_taken_in_float32():
    tokens = (on((16, 16), m=1) + 100).bfloat16().flatten(1, 2)
    pooled = build((16, 16), target=[1, 1]).pool(tokens, (16, 16))
    assert pooled.dtype == torch.bfloat16
    assert torch.equal(pooled, tokens.double().mean(1, keepdim=True).bfloat16())


def test_the_norm_ahead_is_a_layer_norm():
    projector = build(norm=True)
    with torch.no_grad():
        projector.norm.weight.uniform_(0.5, 2)
        projector.norm.bias.uniform_(-1, 1)
    projector.float()
    field = on((4, 6), dtype=torch.float32)
    wanted = projector.net(projector.pool(projector.norm(field.flatten(1, 2)), (4, 6)))
    assert torch.allclose(run(projector, field), wanted, atol=1e-6)
    assert run(projector.bfloat16(), field.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ((27, 27), {}, r"stride 2 does not divide the grid \[27, 27\].*\(1, 3, 9, 27\).*uneven=adaptive"),
        ((24, 24), {"target": [16, 16]}, r"target \[16, 16\] does not divide.*\(1, 2, 3, 4, 6, 8, 12, 24\)"),
        ((4, 4), {"stride": 3}, "stride 3 does not divide"),
        ((4, 4), {"target": [8, 8]}, r"target \[8, 8\] is larger than the grid \[4, 4\]"),
        ((4, 4), {"target": [0, 2]}, "target must be two positive numbers"),
        ((4, 4), {"target": [2]}, "target must be two positive numbers"),
        ((4, 4), {"stride": 0}, "stride must be at least 1, got 0"),
        ((4, 4), {"uneven": "adaptiv"}, "uneven must be one of error, adaptive, got 'adaptiv'"),
        ((4, 4), {"strid": 2}, "'strid'. Did you mean 'stride'"),
    ],
)
def test_what_cannot_be_is_refused(grid, options, message):
    with pytest.raises(ZooError, match=message):
        build(grid, **options)


def test_tokens_without_their_grid_are_refused():
    projector = build((4, 4))
    image = features(dim=D)
    with pytest.raises(ZooError, match="needs a grid, and the image tokens have none"):
        projector.double()(ImageFeatures(image.tokens.double(), None))
    with pytest.raises(ZooError, match=r"was made for a grid \[4, 4\], and was given 16 tokens on \[2, 8\]"):
        projector(ImageFeatures(image.tokens.double(), (2, 8)))
    with pytest.raises(ZooError, match="does not hold 15 tokens"):
        projector.num_tokens(15)


@pytest.mark.fixes
def test_after_a_pruner_that_destroyed_the_grid_the_check_refuses():
    slots = tiny_slots(projector={"name": "pool"}, pruner={"random": {"keep_ratio": 0.5}})
    with pytest.raises(RefusedError, match="projector 'pool' needs grid, but pruner 'random' destroys it") as refusal:
        check(Plan(slots, vocab_size=360))
    assert "pruner=null" in refusal.value.fixes
    odd = tiny_slots(projector={"name": "pool", "stride": 3})
    with pytest.raises(RefusedError, match="does not divide") as refusal:
        check(Plan(odd, vocab_size=360))
    assert {"projector.stride=2", "projector.uneven=adaptive"} <= set(refusal.value.fixes)
    assert check(Plan(tiny_slots(projector={"name": "pool"}), vocab_size=360)).num_image_tokens == 4


def test_splicing_leaves_the_text_alone(make_model):
    model, processor = make_model(projector={"name": "pool"})
    rows = [sample((QUESTIONS[0], ANSWERS[0]), images=2), sample((QUESTIONS[1], ANSWERS[2]), images=0)]
    rows = [processor.encode(row) for row in rows]
    batch = processor.collate(rows)
    slots = batch["input_ids"] == processor.image_token_id
    assert slots.sum(1).tolist() == [2 * 4, 0]
    tokens = model.encode_images(batch["pixel_values"]).tokens
    embeds = model.merge(batch["input_ids"], tokens)
    assert torch.equal(embeds[slots], tokens.flatten(0, 1))
    assert torch.equal(embeds[~slots], model.llm.embed(batch["input_ids"][~slots]))
    assert (batch["labels"][slots] == IGNORE_INDEX).all() and batch["attention_mask"][slots].all()
    alone = processor.collate(rows[1:])
    with torch.no_grad():
        both, text = (model(**b, all_logits=True).logits for b in (batch, alone))
    length = alone["input_ids"].shape[1]
    assert torch.allclose(both[1:, :length], text, atol=1e-5)
