"""What every encoder must do, whichever library it comes from; all are built from sizes with random weights."""

import copy
import dataclasses
import itertools

import pytest
import torch

from tests.vision_builders import SIZED, pixels, shake
from zoo.registry import Encoder, ZooError, build, config_of, names


@pytest.fixture(params=SIZED, ids=str)
def config(request):
    return SIZED[request.param]


def make(config, **changes):
    torch.manual_seed(0)
    tower = build("vision", {**config, **changes})
    return shake(tower)


def test_every_encoder_is_in_this_battery():
    assert {c["name"] for c in SIZED.values()} == set(names("vision")) - {"fused", "qwen_vision"}  # they have files


def test_keeps_the_contract(config):
    tower = make(config)
    assert isinstance(tower, Encoder)
    out = tower(pixels(), need=tower.provides)
    assert tower.grid == (4, 4) and tower.num_tokens == 16 and tower.transform.size == (32, 32)
    assert out.tokens.shape == (2, 16, tower.hidden_size) and out.grid == (4, 4) and out.keep is None
    assert ("prefix_tokens" in tower.provides) == (out.prefix is not None)
    assert ("cls_attention" in tower.provides) == (out.cls_attention is not None)
    plain = tower(pixels())
    assert plain.prefix is None and plain.cls_attention is None and torch.equal(plain.tokens, out.tokens)
    if out.cls_attention is not None:
        assert out.cls_attention.shape == (2, 16) and out.cls_attention.dtype == torch.float32
        # What the prefix takes is missing: the row sums to one over all keys, not over the patches.
        assert (out.cls_attention.sum(1) < 1).all() and (out.cls_attention > 0).all()
    for word, scores in [("key_attention", out.key_attention), ("pooling_head", out.pooling_attention)]:
        assert (word in tower.provides) == (scores is not None)
        if scores is not None:
            assert scores.shape == (2, 16) and scores.dtype == torch.float32 and (scores > 0).all()
            # Of all that is looked at, the prefix takes its share; without one the patches have it all.
            assert out.prefix is not None or torch.allclose(scores.sum(1), torch.ones(2))
            assert (scores.sum(1) < 1 + 1e-5).all()
    if out.keys is not None:
        assert out.keys.shape == (2, 16, 2, 16)


def test_a_batch_gives_what_each_image_gives_alone(config):
    tower, x = make(config), pixels(3)
    together = tower(x, need=tower.provides)
    for i in range(3):
        alone = tower(x[i : i + 1], need=tower.provides)
        torch.testing.assert_close(alone.tokens[0], together.tokens[i], atol=1e-5, rtol=1e-5)
        for name in ("cls_attention", "key_attention", "pooling_attention"):
            if getattr(together, name) is not None:
                torch.testing.assert_close(
                    getattr(alone, name)[0], getattr(together, name)[i], atol=1e-6, rtol=1e-5, msg=name
                )


def test_meta_builds_the_same_structure(config):
    real = build("vision", config)
    with torch.device("meta"):
        meta = build("vision", config)
    shapes = {name: p.shape for name, p in real.named_parameters()}
    assert {name: p.shape for name, p in meta.named_parameters()} == shapes
    assert all(p.device.type == "meta" for p in meta.parameters())
    assert (meta.grid, meta.hidden_size, meta.provides) == (real.grid, real.hidden_size, real.provides)
    assert meta.transform == real.transform
    out = meta(pixels().to("meta"), need=meta.provides)  # so that costs can be counted without weights
    assert out.tokens.shape == (2, 16, 32)


def test_a_frozen_tower_keeps_no_activation(config):
    tower = make(config).requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        out = tower(pixels(), need=tower.provides)
    assert not kept and not out.tokens.requires_grad
    assert tower(pixels().requires_grad_()).tokens.requires_grad  # who asks for the pixels' gradient gets it


def test_a_frozen_tower_stays_in_evaluation(config):
    tower = make(config).requires_grad_(False).train()
    assert not tower.tower.training
    assert tower.requires_grad_(True).train().tower.training


@pytest.mark.parametrize("layer", [-1, -2, 2])
@pytest.mark.parametrize("norm", [False, True])
def test_every_parameter_gets_a_gradient(config, layer, norm):
    """DDP waits for a gradient of each parameter, so nothing that is unused may be kept."""
    tower = make(config, layer=layer, norm=norm)
    assert all(p.requires_grad for p in tower.parameters())
    tower(pixels()).tokens.square().mean().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == []


def test_the_norm_normalises(config):
    raw, normed = make(config, layer=-1), make(config, layer=-1, norm=True)
    missing = normed.load_state_dict(raw.state_dict(), strict=False).missing_keys
    assert len(missing) == 2, missing  # weight and bias of one norm
    with torch.no_grad():
        for name in missing:
            normed.get_parameter(name).fill_(float(name.endswith("weight")))
    want = torch.nn.functional.layer_norm(raw(pixels()).tokens, (32,), eps=1e-6)
    torch.testing.assert_close(normed(pixels()).tokens, want, atol=2e-4, rtol=1e-3)  # eps differs by family


def test_layers_count_from_both_ends(config):
    four = make(config, layer=4)
    assert torch.equal(make(config, layer=-1)(pixels()).tokens, four(pixels()).tokens)
    lowest = 0 if config["name"] == "hf" else 1
    for layer in (5, lowest - 6):
        with pytest.raises(
            ZooError, match=rf"4 blocks: layer must be {lowest} to 4, or {lowest - 5} to -1.*got {layer}"
        ):
            build("vision", {**config, "layer": layer})


def test_unused_blocks_are_not_kept(config):
    sizes = [sum(p.numel() for p in make(config, layer=layer).parameters()) for layer in (1, 2, 3, 4)]
    steps = {b - a for a, b in itertools.pairwise(sizes)}
    assert len(steps) == 1 and steps.pop() > 0


def test_what_is_not_provided_is_refused(config):
    tower = make(config)
    with pytest.raises(ZooError, match=r"does not provide \['moe'\]; it provides \["):
        tower(pixels(), need=frozenset({"moe"}))


def test_the_wrong_image_size_is_refused(config):
    with pytest.raises(ZooError, match="takes images of 32 x 32, got 40 x 40"):
        make(config)(pixels(size=40))


def test_bf16_autocast_stays_close(config):
    tower = make(config)
    want = tower(pixels(), need=tower.provides)
    with torch.autocast("cpu", torch.bfloat16):
        got = tower(pixels(), need=tower.provides)
    scale = want.tokens.abs().mean()
    assert (got.tokens.float() - want.tokens).abs().mean() < 0.05 * scale  # bf16 has 8 bits
    if want.cls_attention is not None:
        assert got.cls_attention.dtype == torch.float32
        torch.testing.assert_close(got.cls_attention, want.cls_attention, atol=0.02, rtol=0.2)


def test_bf16_weights_run(config):
    tower = make(config).bfloat16()
    out = tower(pixels().bfloat16(), need=tower.provides)
    assert out.tokens.dtype == torch.bfloat16 and out.tokens.isfinite().all()


def test_eager_attention_equals_fused(config):
    tower = make(config)
    want = tower(pixels(), need=tower.provides)
    tower.set_attention("eager")
    got = tower(pixels(), need=tower.provides)
    torch.testing.assert_close(got.tokens, want.tokens, atol=1e-5, rtol=1e-5)
    if want.cls_attention is not None:
        torch.testing.assert_close(got.cls_attention, want.cls_attention, atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(config):
    plain, saving = make(config), make(config)
    saving.set_gradient_checkpointing(True)
    kept = []
    for tower in (plain, saving):
        # DINOv3 shakes its positions at random in training, which is not what is compared here.
        tower.train()
        for module in tower.modules():
            if "Rope" in type(module).__name__:
                module.eval()
        count = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, count=count: count.append(t) or t, lambda t: t):
            out = tower(pixels(), need=tower.provides)
        out.tokens.square().mean().backward()
        kept.append(len(count))
    assert kept[1] < kept[0]
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_deep_copy_listens_to_itself(config):
    tower = make(config)
    twin = copy.deepcopy(tower)
    shake(twin, seed=5)
    own = twin(pixels(), need=twin.provides)
    if own.cls_attention is not None:
        assert not torch.allclose(own.cls_attention, tower(pixels(), need=tower.provides).cls_attention)
        fresh = make(config)
        fresh.load_state_dict(twin.state_dict())
        assert torch.equal(fresh(pixels(), need=fresh.provides).cls_attention, own.cls_attention)
    assert tower.runner.taken is None  # after a pass


@pytest.mark.parametrize("name", ["timm", "timm_conv", "open_clip", "hf_clip", "hf_siglip_head", "hf_dinov3"])
def test_compiles_to_one_graph(name):
    tower = make(SIZED[name]).requires_grad_(name != "timm")
    need = tower.provides
    want = tower(pixels(), need=need)
    torch._dynamo.reset()
    got = torch.compile(tower, fullgraph=True, backend="eager")(pixels(), need=need)
    torch.testing.assert_close(got.tokens, want.tokens, atol=1e-5, rtol=1e-5)
    if want.cls_attention is not None:
        torch.testing.assert_close(got.cls_attention, want.cls_attention, atol=1e-6, rtol=1e-5)


def test_column_means_hold_a_block_of_scores_at_a_time(monkeypatch):
    from zoo.vision.encoders import attention_scores as attention_rows

    query, key = torch.randn(2, 4, 21, 8), torch.randn(2, 2, 21, 8)  # two queries share a key
    full = (query.double() * 0.3) @ key.double().repeat_interleave(2, dim=1).transpose(-1, -2)
    want = full.softmax(-1).mean((1, 2))
    torch.testing.assert_close(attention_rows.column_mean(query, key, 0.3).double(), want, atol=1e-7, rtol=1e-5)
    seen = []
    scores = attention_rows._scores
    monkeypatch.setattr(attention_rows, "BLOCK", 1000)
    monkeypatch.setattr(attention_rows, "_scores", lambda *a: seen.append(scores(*a)) or seen[-1])
    torch.testing.assert_close(attention_rows.column_mean(query, key, 0.3).double(), want, atol=1e-7, rtol=1e-5)
    assert max(s.numel() for s in seen) <= 1000 and len(seen) == 5


def test_the_pooling_head_is_never_trained():
    tower = make(SIZED["hf_siglip_head"])
    assert [n for n, _ in tower.named_parameters() if "pooling" in n] == []
    assert len(tower.pooling.blocks) == 1 and "pooling.head.probe" in tower.state_dict()
    with pytest.raises(ZooError, match="'clip' has no pooling head with a learned probe"):
        make(SIZED["hf_clip"], pooling_head=True)
    for name in ("timm", "open_clip"):
        with pytest.raises(ZooError, match="has no pooling head with a learned probe"):
            make(SIZED[name], pooling_head=True)


@pytest.mark.parametrize(
    "change",
    [{"patch_size": 7}, {"heads": 3}, {"depth": 0}],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(config, change):
    with pytest.raises(ZooError, match=r"got width 32, heads 3|does not divide image_size 32|got .*depth 0"):
        build("vision", {**config, **change})


def test_every_option_is_documented():
    for name in names("vision"):
        entry, _ = config_of("vision", {"name": name})
        assert [o.name for o in entry.options if not o.doc] == []
        assert "name" not in {f.name for f in dataclasses.fields(entry.config)}


@pytest.mark.parametrize("name", sorted({c["name"] for c in SIZED.values()}))
def test_a_hub_name_that_is_not_in_the_cache_says_so(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ZooError, match=r"json of 'nobody/nothing@v1' is not in the cache"):
        build("vision", {"name": name, "checkpoint": "nobody/nothing", "revision": "v1"})
    with pytest.raises(ZooError, match=r"revision 'v1' needs a hub checkpoint, and checkpoint is"):
        build("vision", {"name": name, "checkpoint": str(tmp_path), "revision": "v1"})
    with pytest.raises(ZooError, match=r"No checkpoint at '/no/such/place'"):
        build("vision", {"name": name, "checkpoint": "/no/such/place"})
