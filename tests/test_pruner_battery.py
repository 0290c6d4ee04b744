"""What every registered pruner must do before the LLM, with its default options."""

import inspect
from dataclasses import fields, replace

import pytest
import torch

from tests.fusion_builders import features, image_row, tiny_llm
from zoo import registry
from zoo.registry import Pruner

DIM, GRID = 24, (4, 6)
NAMES = registry.names("pruner")
pytestmark = pytest.mark.parametrize("name", NAMES)


def build(name, **options):
    torch.manual_seed(0)
    wants_llm = "llm" in inspect.signature(registry.get("pruner", name).cls.__init__).parameters
    llm = tiny_llm() if wants_llm else None
    node = {"name": name, **options}
    return registry.build("pruner", node, vision_dim=DIM, vision_depth=3, grid=GRID, num_tokens=24, llm=llm).eval()


def image_for(**given):
    given = {"m": 3, "grid": GRID, "dim": DIM, **given}
    return features(**given, prefix=torch.zeros(given["m"], 1, given["dim"]))


def inside_only(pruner):
    return pruner.num_tokens(24) == 24


def test_keeps_the_contract_and_counts_its_tokens(name):
    pruner = build(name)
    assert isinstance(pruner, Pruner)
    cls = registry.get("pruner", name).cls
    assert isinstance(cls.needs, frozenset) and isinstance(cls.destroys, frozenset)  # read without building
    out = pruner(image_for())
    k = pruner.num_tokens(24)
    assert out.tokens.shape == (3, k, DIM)
    assert 1 <= k <= 24
    if "grid" in pruner.destroys:
        assert out.grid is None
    elif out.grid is not None:
        assert out.grid[0] * out.grid[1] == k
        assert tuple(getattr(pruner, "grid", None) or GRID) == tuple(out.grid)
    for name in ("cls_attention", "key_attention", "pooling_attention", "keys"):  # in step with the tokens, or gone
        known = getattr(out, name)
        assert known is None or known.shape[:2] == (3, k), name
    assert all(known.shape == (3, k) for known in out.block_attention.values())


def test_kept_indices_point_at_the_tokens_kept(name):
    image = image_for()
    out = build(name)(image)
    if out.keep is None:
        return  # merged tokens, or all of them
    assert out.keep.shape == out.tokens.shape[:2]
    assert all(len(row.unique()) == len(row) for row in out.keep)
    if out.mixed:
        return  # each begins with the token that it names, and others are added
    index = out.keep.unsqueeze(-1).expand(-1, -1, DIM)
    assert torch.equal(out.tokens, image.tokens.gather(1, index))


def test_groups_say_where_each_token_went(name):
    pruner, image = build(name), image_for()
    out = pruner(image)
    if out.groups is None:
        return
    k = out.tokens.shape[1]
    assert out.keep is None and out.groups.shape == (3, 24) and out.groups.min() >= -1
    summaries = {0} if "prefix_tokens" in pruner.needs else set()  # [CLS] stands for no patch
    assert all(set(range(k)) - summaries == set(row.tolist()) - {-1} for row in out.groups)
    # A token that no patch went into would be no part of the picture, and one patch moves its own token alone.
    moved = image.tokens.clone()
    moved[:, 5] += 0.01
    same = (pruner(replace(image, tokens=moved)).tokens - out.tokens).abs().amax(-1) < 1e-7  # (M, K)
    for i in range(3):
        assert int(out.groups[i, 5]) in {-1, *(~same[i]).nonzero().flatten().tolist()}


def test_structure_on_meta(name):
    with torch.device("meta"):
        pruner = build(name)
    assert pruner.num_tokens(24) == build(name).num_tokens(24)


def test_a_batch_is_each_image_alone_and_twice_the_same(name):
    pruner, image = build(name), image_for()
    out = pruner(image)
    assert torch.equal(out.tokens, pruner(image).tokens)
    for i in range(3):
        alone = pruner(image_row(image, i))
        assert torch.allclose(alone.tokens, out.tokens[i : i + 1], atol=1e-6)
        if out.keep is not None:
            assert torch.equal(alone.keep, out.keep[i : i + 1])


def test_keep_ratio_one_is_no_pruner(name):
    if "keep_ratio" not in {f.name for f in fields(registry.get("pruner", name).config)}:
        pytest.skip(f"pruner {name!r} has no keep_ratio")
    pruner, image = build(name, keep_ratio=1.0), image_for()
    out = pruner(image)
    assert torch.equal(out.tokens, image.tokens)
    assert pruner.num_tokens(24) == 24
    assert out.grid == image.grid and "grid" not in pruner.destroys


def test_gradient_passes_and_there_are_no_parameters_without_one(name):
    pruner = build(name).train()
    tokens = image_for().tokens.requires_grad_()
    out = pruner(replace(image_for(), tokens=tokens))
    out.tokens.sum().backward()
    assert tokens.grad.any()
    if not inside_only(pruner):
        assert [n for n, p in pruner.named_parameters() if p.grad is None] == []


def test_works_in_bf16(name):
    image = image_for()
    out = build(name)(replace(image, tokens=image.tokens.bfloat16()))
    assert out.tokens.dtype == torch.bfloat16


def test_rows_of_crops_stay(name):
    out = build(name)(replace(image_for(), rows=(2, 1), row_kind="crop"))
    assert out.rows == (2, 1) and out.row_kind == "crop"
