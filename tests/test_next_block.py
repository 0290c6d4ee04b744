"""The block behind the features: what is kept of it computes what the whole encoder does, and is saved with it."""

import pytest
import torch

from tests.conftest import tiny_slots
from tests.vision_builders import SIZED, TIMM, pixels, save_timm, shake, timm_model
from zoo.registry import ZooError, build
from zoo.vision.encoders.next_block import NextBlock

NEED = frozenset({"next_block", "grid"})
WITH_CLS = ["timm", "timm_registers", "open_clip", "hf_clip", "hf_dinov2", "hf_dinov2_registers"]


@pytest.mark.parametrize("layer", [-2, 1])
@pytest.mark.parametrize("name", WITH_CLS)
def test_it_is_what_the_whole_encoder_computes(name, layer):
    part = shake(build("vision", {**SIZED[name], "layer": layer, "next_block": True}))
    whole = build("vision", {**SIZED[name], "layer": layer + 1 if layer > 0 else -1}).eval()
    whole.load_state_dict(part.state_dict(), strict=False)
    found, prefix = part(pixels(), need=NEED), part.runner.num_prefix
    with torch.no_grad():
        attention = {}
        runner = whole.runner
        hook = runner.query_key
        runner.query_key = lambda block, taken: attention.setdefault("qk", hook(block, taken))
        keys = whole(pixels(), need=frozenset({"keys", "key_attention"})).keys
        query, key, _ = attention["qk"]
    flat = [x.transpose(1, 2).flatten(2) for x in (query, key)]  # (M, P + N, C)
    torch.testing.assert_close(found.next_keys, keys.flatten(2), atol=1e-6, rtol=1e-5)
    want = (flat[0][:, :1] @ flat[1].mT * flat[1].shape[-1] ** -0.5).softmax(-1)[:, 0, prefix:]
    torch.testing.assert_close(found.next_attention, want, atol=1e-6, rtol=1e-5)
    alone = part(pixels())
    assert torch.equal(alone.tokens, found.tokens) and alone.next_keys is None
    assert part.attention_blocks == (3 if layer == -2 else 1) and part.depth == 4
    kept = {n for n, _ in part.named_buffers()} - {n for n, _ in build("vision", SIZED[name]).named_buffers()}
    assert kept and not any("mlp" in n or "v_proj" in n or "fc1" in n for n in kept)


@pytest.mark.parametrize("name", [n for n in TIMM if "siglip" not in n])
def test_towers_of_timm(name, tmp_path):
    save_timm(timm_model(name), tmp_path)
    node = {"name": "timm", "checkpoint": str(tmp_path), "layer": -2, "next_block": True}
    part = build("vision", node).eval()
    whole = build("vision", {**node, "layer": -1, "next_block": False}).eval()
    if "keys" not in whole.provides or "dinov3" in name or "eva" in name:  # rotated there
        assert part(pixels(), need=NEED).next_keys.shape == (2, 16, 32)
        return
    keys = whole(pixels(), need=frozenset({"keys"})).keys
    torch.testing.assert_close(part(pixels(), need=NEED).next_keys, keys.flatten(2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["timm", "open_clip", "hf_clip", "hf_dinov3"])
def test_where_it_cannot_be_read(name):
    with pytest.raises(ZooError, match="they are of the last of 4: choose an earlier layer, or next_block=false"):
        build("vision", {**SIZED[name], "layer": -1, "next_block": True})
    with pytest.raises(ZooError, match=r"does not provide \['next_block'\]"):
        build("vision", SIZED[name]).eval()(pixels(), need=NEED)
    for other in ("hf_siglip", "timm_conv"):
        with pytest.raises(ZooError, match=r"reads what .CLS. attends to, and the encoder has none"):
            build("vision", {**SIZED[other], "next_block": True})


@pytest.mark.parametrize("name", ["timm", "hf_clip", "open_clip"])
def test_a_model_is_saved_loaded_and_exported_with_it(name, make_model, tmp_path):
    from zoo.published.encoders import encoder_of

    slots = tiny_slots(vision={**SIZED[name], "next_block": True}, pruner={"prumerge": {"name": "prumerge"}})
    model, _ = make_model(**slots)
    shake(model)
    images = pixels()
    before = model.encode_images(images).tokens
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again.encode_images(images).tokens, before)
    blocks = [m for m in again.vision.modules() if isinstance(m, NextBlock)]
    assert len(blocks) == 1 and not list(blocks[0].parameters())
    written = encoder_of(model, {"clip_vision_model", "dinov2"}) if name == "hf_clip" else None
    if written is not None:
        assert written.config.num_hidden_layers == 3 and not any(".3." in n for n in written.tensors)


def test_a_published_llava_gives_it_and_is_written_without_it(tmp_path):
    import zoo
    from tests import published_builders
    from zoo.published.export import export

    plain, processor = published_builders.llava(tmp_path / "published")
    named = f"dir:{tmp_path / 'published'}"
    model, own = zoo.load(named, "pruner=[prumerge]", "vision.next_block=true")
    images = pixels()
    with torch.no_grad():
        tower = plain.model.vision_tower
        hidden = tower(images, output_hidden_states=True).hidden_states[-2]
        block = dict(tower.named_modules())["encoder.layers.3"]
        normed = block.layer_norm1(hidden)
        query, key = block.self_attn.q_proj(normed[:, :1]), block.self_attn.k_proj(normed)
        found = model.vision(images, need=NEED)
    assert torch.equal(found.next_keys, key[:, 1:])
    row = (query @ key.mT * key.shape[-1] ** -0.5).softmax(-1)[:, 0, 1:]
    torch.testing.assert_close(found.next_attention, row, atol=1e-7, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again, _ = zoo.load(f"dir:{tmp_path / 'saved'}")
    assert torch.equal(again.encode_images(images).tokens, model.encode_images(images).tokens)
    model, own = zoo.load(named, "vision.next_block=true")
    export(model, own, tmp_path / "exported")
    written = type(plain).from_pretrained(tmp_path / "exported").eval()
    batch = processor(text="<image> what is it?", images=published_builders.photo(40, 40), return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(written(**batch).logits, plain(**batch).logits)
