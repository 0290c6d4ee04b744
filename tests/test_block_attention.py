"""Attention of another block than the one that made the features, against eager attention of the same tiny towers."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.conftest import tiny_slots
from tests.vision_builders import SIZED, pixels, shake
from zoo import registry
from zoo.checking.checker import check
from zoo.checking.plan import Plan
from zoo.composed.assembly import assemble
from zoo.registry import ImageFeatures, ZooError, build
from zoo.registry.part import block_of

TOWERS = pytest.mark.parametrize("name", [n for n in SIZED if n != "hf_siglip_head"])
DEPTH = SIZED["timm"]["depth"]  # 4: with layer=-2 three run


def make(name, **changes):
    torch.manual_seed(0)
    return shake(build("vision", {**SIZED[name], **changes}))


def words(tower, blocks=(1, 2, 3)):
    given = [word for word in ("cls_attention", "key_attention") if word in tower.provides]
    return frozenset(f"{word}@{block}" for word in given for block in blocks)


def matrices(tower, name):
    """The whole attention (M, H, L, L) of each block that runs, by the library's own unfused attention."""
    inner, found = tower.tower, []
    with torch.no_grad():
        if name.startswith("open_clip"):

            def look(module, args):
                found.append(module.forward(*args, need_weights=True, average_attn_weights=False)[1])

            handles = [b.attn.register_forward_pre_hook(look) for b in inner.transformer.resblocks]
            tower(pixels())
        elif name.startswith("timm"):
            tower.set_attention("eager")
            handles = [
                b.attn.attn_drop.register_forward_pre_hook(lambda module, args: found.append(args[0]))
                for b in inner.blocks
            ]
            tower(pixels())
            tower.set_attention("sdpa")
        else:  # eager attentions of transformers return their weights
            tower.set_attention("eager")
            modules = [tower.runner.attention(1 + i) for i in range(tower.attention_blocks)]
            handles = [m.register_forward_hook(lambda module, args, out: found.append(out[1])) for m in modules]
            tower(pixels())
            tower.set_attention("sdpa")
    for handle in handles:
        handle.remove()
    return found


@TOWERS
def test_scores_of_each_block_are_those_of_eager_attention(name):
    tower = make(name)
    assert tower.depth == DEPTH and tower.attention_blocks == 3
    need = words(tower)
    out, full = tower(pixels(), need=need), matrices(tower, name)
    assert set(out.block_attention) == need and len(full) == 3
    assert out.cls_attention is None and out.key_attention is None and out.keys is None
    for word, scores in out.block_attention.items():
        matrix = full[block_of(word) - 1]
        p = matrix.shape[-1] - 16
        assert p == tower.runner.num_prefix and scores.shape == (2, 16) and scores.dtype == torch.float32
        want = matrix[:, :, 0, p:].mean(1) if word.startswith("cls") else matrix.mean((1, 2))[:, p:]
        torch.testing.assert_close(scores, want, atol=1e-6, rtol=0)
    assert not torch.allclose(out.block_attention["key_attention@1"], out.block_attention["key_attention@2"], atol=1e-4)


@TOWERS
def test_the_last_block_is_the_one_that_made_the_features_and_tokens_are_the_same(name):
    tower = make(name)
    plain, need = tower(pixels(), need=tower.provides), words(tower, (1, 3))
    out = tower(pixels(), need=tower.provides | need)
    assert torch.equal(out.tokens, plain.tokens) and torch.equal(out.keys, plain.keys)
    assert plain.block_attention == {}
    for word in ("cls_attention", "key_attention"):
        if word in tower.provides:
            assert torch.equal(getattr(out, word), getattr(plain, word))
            assert torch.equal(out.block_attention[f"{word}@3"], getattr(plain, word))


@TOWERS
def test_a_batch_gives_what_each_image_gives_alone(name):
    tower, x = make(name), pixels(3)
    need = words(tower, (1, 2))
    together = tower(x, need=need).block_attention
    for i in range(3):
        for word, scores in tower(x[i : i + 1], need=need).block_attention.items():
            torch.testing.assert_close(scores[0], together[word][i], atol=1e-6, rtol=1e-5)


@TOWERS
def test_gradient_checkpointing_and_training_change_no_score(name):
    tower = make(name)
    need = words(tower, (1, 2))
    want = tower(pixels(), need=need).block_attention
    tower.set_gradient_checkpointing(True)
    tower.train()
    for module in tower.modules():  # DINOv3 shakes its positions at random in training
        if "Rope" in type(module).__name__:
            module.eval()
    out = tower(pixels(), need=need)
    out.tokens.square().mean().backward()
    for word, scores in out.block_attention.items():
        assert not scores.requires_grad
        torch.testing.assert_close(scores, want[word], atol=1e-6, rtol=0)


@TOWERS
def test_a_deep_copy_takes_scores_of_its_own_blocks(name):
    tower = make(name)
    need = words(tower, (1,))
    first = tower(pixels(), need=need).block_attention
    twin = copy.deepcopy(tower)
    shake(twin, seed=5)
    assert not torch.allclose(twin(pixels(), need=need).block_attention["key_attention@1"], first["key_attention@1"])
    assert torch.equal(tower(pixels(), need=need).block_attention["key_attention@1"], first["key_attention@1"])


@pytest.mark.parametrize("name", ["timm", "open_clip", "hf_clip"])
def test_blocks_that_are_not_requested_have_no_hooks(name):
    tower = make(name)

    def hooks(block):
        modules = tower.runner.attention(block).modules()
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    tower(pixels(), need=tower.provides)
    assert [hooks(b) > 0 for b in (1, 2, 3)] == [False, False, True]
    for _ in range(2):
        tower(pixels(), need=frozenset({"key_attention@2"}))
        assert hooks(1) == 0 and hooks(2) == hooks(3)


@pytest.mark.parametrize("name", ["timm", "open_clip", "hf_clip", "hf_dinov3"])
def test_compiles_to_one_graph_once_it_is_prepared(name):
    tower = make(name)
    need = words(tower, (1, 2))
    tower.prepare(need)
    want = tower(pixels(), need=need).block_attention
    torch._dynamo.reset()
    got = torch.compile(tower, fullgraph=True, backend="eager")(pixels(), need=need).block_attention
    for word, scores in want.items():
        torch.testing.assert_close(got[word], scores, atol=1e-6, rtol=1e-5)


def test_a_tower_for_frames_gives_its_own_scores_in_the_order_of_rows():
    tower = make("hf_siglip", frame_tower=True)
    x, need = pixels(3), frozenset({"key_attention@1"})
    mixed = tower(x, need=need, kinds=["frame", "image", "frame"]).block_attention["key_attention@1"]
    for i, kind in enumerate(["frame", "image", "frame"]):
        alone = tower(x[i : i + 1], need=need, kinds=[kind]).block_attention["key_attention@1"]
        torch.testing.assert_close(mixed[i : i + 1], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("word", ["key_attention@0", "key_attention@4", "cls_attention@1", "keys@1", "key_attention@x"])
def test_what_an_encoder_does_not_run_is_refused(word):
    tower = make("hf_siglip")  # no [CLS]; three of four blocks run
    with pytest.raises(ZooError, match=r"attention of the blocks 1 to 3|may name a block, by a whole number"):
        tower(pixels(), need=frozenset({word}))


def test_scores_stay_beside_their_tokens():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [4.0, 3.0, 2.0, 1.0]])
    image = ImageFeatures(torch.randn(2, 4, 3), (2, 2), block_attention={"key_attention@2": scores})
    taken = image.take_best(torch.tensor([[3, 1], [0, 3]]))
    assert torch.equal(taken.block_attention["key_attention@2"], torch.tensor([[0.4, 0.3], [4.0, 1.0]]))
    again = taken.take(torch.tensor([[1], [0]]))
    assert torch.equal(again.block_attention["key_attention@2"], torch.tensor([[0.3], [4.0]]))
    apart = ImageFeatures(
        image.tokens, None, keep=torch.tensor([[2, 0, 3, 1]] * 2), block_attention={"key_attention@2": scores}
    ).placed(4)
    assert torch.equal(apart.block_attention["key_attention@2"], scores[:, [1, 3, 0, 2]])
    pool = build("pruner", {"name": "pool", "target": [1, 1]}, grid=(2, 2))
    pooled = pool(image).block_attention["key_attention@2"]
    torch.testing.assert_close(pooled, torch.tensor([[0.25], [2.5]]))


@dataclass
class NeedsBlockConfig:
    word: str = "key_attention@1"


@pytest.fixture
def needs_block():
    """A pruner that needs the block that an option names; gone again after the test."""

    @registry.register("pruner", "needs_block")
    class NeedsBlock(registry.Pruner, nn.Module):
        needs = frozenset({"key_attention"})
        destroys = frozenset({"grid"})

        def __init__(self, config: NeedsBlockConfig) -> None:
            super().__init__()
            self.word, self.needs = config.word, frozenset({config.word})

        def num_tokens(self, n: int) -> int:
            return n // 2

        def forward(self, image: ImageFeatures) -> ImageFeatures:
            return image.take_best(image.block_attention[self.word].argsort(dim=1)[:, : image.tokens.shape[1] // 2])

    yield
    del registry.table._entries["pruner"]["needs_block"]


def plan(word, first=None, **vision):
    slots = tiny_slots(
        vision={**SIZED["hf_siglip"], "depth": 5, **vision}, pruner={**(first or {}), "needs_block": {"word": word}}
    )
    return Plan(slots, vocab_size=360)


@pytest.mark.parametrize(
    ("word", "vision", "reason"),
    [
        (
            "key_attention@0",
            {},
            "needs key_attention@0, but vision 'hf' runs 4 blocks of its 5: key_attention@1 to .*@4",
        ),
        ("key_attention@5", {}, "'needs_block' needs key_attention@5, but vision 'hf' runs 4 blocks of its 5"),
        ("key_attention@6", {"layer": -1}, "runs 5 blocks: key_attention@1 to key_attention@5 are given"),
        ("cls_attention@1", {}, "needs cls_attention@1, but vision 'hf' does not give it"),
        ("keys@2", {}, "'keys@2' is unknown: cls_attention and key_attention may name a block"),
        ("key_attention@-2", {}, "'key_attention@-2' is unknown"),
    ],
)
def test_the_check_refuses_what_the_encoder_does_not_run_ahead_of_weights(needs_block, word, vision, reason):
    with pytest.raises(ZooError, match=reason):
        check(plan(word, **vision), fixes=0)


def test_what_destroys_the_attention_of_the_last_block_destroys_that_of_others(needs_block):
    with pytest.raises(ZooError, match="needs key_attention@1, but pruner 'visionzip' destroys it"):
        check(plan("key_attention@1", first={"visionzip": {"score": "column_mean"}}), fixes=0)


def test_the_check_lets_through_what_runs_and_the_model_runs_it(needs_block):
    walk = check(plan("key_attention@2", first={"random": {"keep_ratio": 0.75}}), fixes=0)
    assert walk.num_image_tokens == 6  # 12 of 16, and half of them
    torch.manual_seed(0)
    parts = assemble(plan("key_attention@2").slots, vocab_size=360)
    assert parts.requested == {"key_attention@2"} and parts.vision.runner.heard == {2, 4}
    image = parts.vision(pixels(), need=parts.requested)
    assert parts.pruner["needs_block"](image).tokens.shape == (2, 8, 32)
