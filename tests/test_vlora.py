"""VLoRA: where it starts and on what, rows of a batch on their own, refusals."""

from dataclasses import replace

import pytest
import torch

from tests.fusion_builders import SMALL, VOCAB, features, llm_node, padded_batch, same_state, tiny_llm
from tests.vlora_builders import DIM, FAMILIES, GRID, double, images, logits, pick, vlora_on
from zoo import registry
from zoo.registry import ImageFeatures, ZooError

# ---- start, sites, sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_fresh_one_changes_no_bit(model_type, dtype):
    llm = tiny_llm(model_type)
    llm.lm.to(dtype)
    with torch.no_grad():
        wanted = logits(llm)
        adapter = vlora_on(llm, moved=False)
        adapter.condition(images(), [1, 1])
        assert torch.equal(logits(llm), wanted)


def test_at_first_only_b_has_a_gradient_and_then_everything():
    llm = tiny_llm()
    llm.requires_grad_(False)
    adapter = vlora_on(llm, moved=False)
    base = {k: v.clone() for k, v in llm.lm.state_dict().items()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    found = []
    for _ in range(2):
        adapter.condition(images(), [1, 1])
        optimizer.zero_grad()
        logits(llm).logsumexp(-1).sum().backward()
        found.append({n for n, p in adapter.named_parameters() if p.grad.abs().max() > 0})
        optimizer.step()
    assert found[0] == {f"b.{t}" for t in "qkvom"}
    # The keys' bias shifts every score of a query alike
    still = {n for n, p in adapter.named_parameters()} - found[1]
    assert all(n.endswith("in_proj_bias") for n in still)
    assert same_state(llm.lm.state_dict(), base)


@pytest.mark.parametrize(("layers", "skip", "sites"), [(8, 4, [3, 7]), (7, 3, [2, 5]), (3, 1, [0, 1, 2]), (2, 2, [1])])
def test_the_last_layer_of_each_group_changes(layers, skip, sites):
    llm = tiny_llm(num_layers=layers)
    adapter = vlora_on(llm, skip=skip)
    assert [s.layer for s in adapter.sites] == [f"model.layers.{i}" for i in sites]
    assert (
        {len(b) for b in adapter.b.values()}
        == {g.queries.shape[0] for g in adapter.generators.values()}
        == {len(sites)}
    )
    inside = [(n, m) for n, m in llm.lm.named_modules() if ".layers." in n]
    hooked = {n.split(".")[2] for n, m in inside if m._forward_hooks or m._forward_pre_hooks}
    assert hooked == {str(i) for i in sites}


@pytest.mark.parametrize(("width", "total"), [(512, 851_891_712), (1024, 2_027_531_264)])
def test_the_released_sizes_are_the_default(width, total):
    """On Vicuna-7B with CLIP ViT-L/14-336: 8 layers change, all five types, rank 64."""
    sizes = {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 32, "intermediate_size": 64}
    with torch.device("meta"):
        llm = registry.build("llm", llm_node("llama", **sizes), vocab_size=VOCAB)
        node = {"name": "vlora", "width": width}
        adapter = registry.build("adapter", node, llm=llm, vision_dim=1024, grid=(24, 24))
        count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
        assert count(adapter) == total
        assert (len(adapter.sites), adapter.scale, adapter.config.types) == (8, 1.0, "qkvom")
        if width == 512:
            assert count(adapter.b) == 5 * 8 * 4096 * 64
            assert sum(count(g.blocks) for g in adapter.generators.values()) == 168_161_280
            assert sum(count(g.head) for g in adapter.generators.values()) == 672_399_360


def test_weights_start_as_the_released_code_leaves_them():
    adapter = vlora_on(tiny_llm(), moved=False, width=64, depth=1, rank=16)
    generator = adapter.generators["o"]
    for linear in (adapter.memory.proj, generator.head, generator.blocks[0].mlp[0], generator.blocks[0].own.out_proj):
        assert 0.018 < linear.weight.std() < 0.022 and not linear.bias.any()
    packed = generator.blocks[0].cross.in_proj_weight
    assert packed.abs().max() <= (6 / (4 * 64)) ** 0.5 < 1.02 * packed.abs().max()  # Xavier's, of the packed shape
    assert all(0.8 < t.std() < 1.2 for t in (generator.queries, adapter.memory.positions))
    assert not any(b.any() for b in adapter.b.values())
    louder = vlora_on(tiny_llm(), moved=False, width=64, depth=1, rank=16, image_std=0.3)
    assert 0.27 < louder.memory.proj.weight.std() < 0.33 and 0.018 < louder.generators["o"].head.weight.std() < 0.022


# ---- rows of a batch ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_images_of_a_batch_do_not_meet():
    llm = double()
    adapter = vlora_on(llm)
    ids, mask = padded_batch()
    ids[1], mask[0] = ids[0], 1
    image = images(dtype=torch.float64)
    adapter.condition(image, [1, 1])
    both = logits(llm, ids)
    for i in (0, 1):
        adapter.condition(pick(image, i), [1])
        assert torch.allclose(logits(llm, ids[:1]), both[i : i + 1], atol=1e-10)
    adapter.condition(pick(image, 1, 0), [1, 1])
    assert torch.allclose(logits(llm, ids), both.flip(0), atol=1e-10)
    other = replace(image, tokens=torch.stack([image.tokens[0], images(seed=7, dtype=torch.float64).tokens[1]]))
    adapter.condition(other, [1, 1])
    changed = logits(llm, ids)
    assert torch.equal(changed[0], both[0]) and not torch.allclose(changed[1], both[1], atol=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rows_of_text_among_images_are_the_plain_llm_to_the_bit(model_type):
    llm = tiny_llm(model_type)
    ids, mask = padded_batch(3)
    with torch.no_grad():
        wanted = logits(llm, ids, mask)
    adapter = vlora_on(llm)
    adapter.condition(images(), [1, 0, 1])
    out = logits(llm, ids, mask)
    assert torch.equal(out[1], wanted[1])
    assert not torch.allclose(out[0], wanted[0], atol=1e-4) and not torch.allclose(out[2], wanted[2], atol=1e-4)
    out[1].logsumexp(-1).sum().backward()
    assert not any(p.grad.any() for p in adapter.parameters())


@torch.no_grad()
def test_without_any_image_it_is_the_plain_llm():
    llm = tiny_llm()
    wanted = logits(llm)
    adapter = vlora_on(llm)
    none = ImageFeatures(torch.zeros(0, 16, DIM), GRID)
    for image, rows in ((None, [0, 0]), (None, []), (none, [0, 0]), (none, [])):
        adapter.condition(images(), [1, 1])
        adapter.condition(image, rows)
        assert adapter._given is None
        assert torch.equal(logits(llm), wanted)


def test_where_other_processes_wait_text_alone_still_reaches_every_parameter(monkeypatch):
    llm = tiny_llm()
    with torch.no_grad():
        wanted = logits(llm)
    adapter = vlora_on(llm, max_images=3)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    adapter.condition(None, [0, 0])
    out = logits(llm)
    assert torch.equal(out, wanted)
    out.logsumexp(-1).sum().backward()
    assert [n for n, p in adapter.named_parameters() if p.grad is None or p.grad.any()] == []
    with torch.no_grad():
        adapter.condition(None, [0, 0])
    assert adapter._given is None


@torch.no_grad()
def test_several_images_are_read_together_in_their_order():
    llm = double()
    one, several = vlora_on(llm, attach=False), vlora_on(llm, attach=False, max_images=3)
    for p, q in zip(one.parameters(), [p for n, p in several.named_parameters() if "numbers" not in n], strict=True):
        q.copy_(p)
    image = images(6, dtype=torch.float64)
    ids, _ = padded_batch(4)
    one.attach()
    one.condition(pick(image, 2), [1])
    wanted = logits(llm, ids[2:3])
    one.detach()
    several.attach()
    several.condition(image, [2, 0, 1, 3])
    out = logits(llm, ids)
    assert torch.allclose(out[2:3], wanted, atol=1e-10)  # one image is one image, whatever the limit
    several.condition(pick(image, 0, 1), [2])
    assert torch.allclose(logits(llm, ids[:1]), out[:1], atol=1e-10)
    several.condition(pick(image, 1, 0), [2])
    assert not torch.allclose(logits(llm, ids[:1]), out[:1], atol=1e-4)
    crops = replace(image, rows=(2, 1, 3), row_kind="crop")  # three images, cut into six
    several.condition(crops, [1, 0, 1, 1])
    assert torch.equal(logits(llm, ids), out)


@torch.no_grad()
def test_what_a_pruner_left_or_merged_is_read_at_the_positions_it_had():
    llm = double()
    adapter, image = vlora_on(llm), images(dtype=torch.float64)
    everything = torch.arange(16).expand(2, -1)
    adapter.condition(image, [1, 1])
    wanted = logits(llm)
    adapter.condition(replace(image, grid=None, keep=everything), [1, 1])
    assert torch.allclose(logits(llm), wanted, atol=1e-12)
    keep = torch.tensor([[1, 5, 9], [0, 2, 15]])
    few = replace(image, grid=None, keep=keep, tokens=image.tokens.gather(1, keep[..., None].expand(-1, -1, DIM)))
    adapter.condition(few, [1, 1])
    memory = adapter.memory.proj(few.tokens) + adapter.memory.positions[keep]
    assert torch.equal(adapter._given[1]["o"][0], adapter._generate(memory)["o"][:, 1])
    groups = torch.arange(16).view(4, 4).div(8, rounding_mode="floor").flatten().repeat(2, 1)  # two halves
    groups[1, :3] = -1
    halves = replace(image, grid=None, tokens=image.tokens[:, :2], groups=groups)
    adapter.condition(halves, [1, 1])
    table = adapter.memory.positions
    places = [[table[:8].mean(0), table[8:].mean(0)], [table[3:8].mean(0), table[8:].mean(0)]]
    memory = adapter.memory.proj(halves.tokens) + torch.stack([torch.stack(p) for p in places])
    assert torch.allclose(adapter._given[1]["o"][0], adapter._generate(memory)["o"][:, 1], atol=1e-12)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"types": "qx"}, "some of the letters qkvom, each once, got 'qx'"),
        ({"types": "qq"}, "each once, got 'qq'"),
        ({"types": ""}, "some of the letters"),
        ({"num_heads": 3}, "width 16 is not a multiple of num_heads 3"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be more than 0"),
        ({"skip": 4}, "skip=4 is more than the 2 layers of the LLM"),
        ({"rnak": 4}, "'rnak'. Did you mean 'rank'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        vlora_on(tiny_llm(), **options)


def test_llms_and_images_that_do_not_fit_are_refused():
    with pytest.raises(ZooError, match="finds no q_proj for 'q' in the layers of GPT2LMHeadModel"):
        vlora_on(tiny_llm("gpt2"))
    with pytest.raises(ZooError, match=r"one generator needs inputs of one width, got q 32.* o 48"):
        vlora_on(tiny_llm("qwen3", extra={"head_dim": 12}), separate=False)
    with pytest.raises(
        ZooError, match=r"'q' of 'model.layers.\d' is 32 to 2048 wide and that of 'model.layers.0' 32 to 32"
    ):
        vlora_on(tiny_llm("gemma4_text", num_layers=3, extra={"hidden_size_per_layer_input": 0}))
    with pytest.raises(ZooError, match="the slot vision is empty"):
        node = {"name": "vlora", **SMALL["vlora"]}
        registry.build("adapter", node, llm=tiny_llm(), vision_dim=None, grid=None)
    adapter = vlora_on(tiny_llm())
    with pytest.raises(ZooError, match=r"shows 2 images.*at most 1: set adapter.vlora.max_images=2"):
        adapter.condition(images(), [2, 0])
    with pytest.raises(ZooError, match=r"given 2 images, and the rows of the batch show \[1, 0\]"):
        adapter.condition(images(), [1, 0])
    with pytest.raises(ZooError, match="positions for 16 image tokens of an image, and 24 were given"):
        adapter.condition(features(m=2, grid=(4, 6), dim=DIM), [1, 1])
