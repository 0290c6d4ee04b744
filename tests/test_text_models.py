"""Language models of vision-language families alone: as in transformers' whole models, and as any LLM."""

import pytest
import torch

from tests.fusion_builders import VOCAB, adapter_on, padded_batch, tiny_llm
from zoo import registry
from zoo.fusion.llm.text_model import TEXT_MODELS
from zoo.registry import ZooError
from zoo.registry.forward_pass import running

WHOLE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v"]
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
INTERLEAVED = SECTIONS | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}


def options(family):
    rope = INTERLEAVED if family.startswith("qwen3") else SECTIONS
    more = {"num_experts": 4, "top_k": 2} if family.endswith("moe") else {}
    return {"hidden_size": 64, "num_layers": 3, "extra": {"rope_parameters": dict(rope)}, **more}


def of_family(family, **given):
    return tiny_llm(f"{family}_text", **{**options(family), **given})


def whole(family, llm):
    """The whole model of transformers, with a tiny tower and the weights of `llm`."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    config = CONFIG_MAPPING[family](text_config=llm.lm.config.to_dict())
    vision = {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32}
    vision |= {"embed_dim": 32, "image_size": 32, "patch_size": 4, "deepstack_visual_indexes": [0]}
    if family == "qwen2_vl":
        vision["hidden_size"] = 64
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, VOCAB - 1)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    model.model.language_model.load_state_dict(llm.decoder.state_dict())
    model.lm_head.load_state_dict(llm.lm.lm_head.state_dict())
    return model


def places(b, t, seed=0):
    """Positions of three axes that rise: (3, B, T)."""
    return torch.randint(0, 3, (3, b, t), generator=torch.Generator().manual_seed(seed)).cumsum(-1)


@pytest.mark.parametrize("family", WHOLE)
@torch.no_grad()
def test_logits_and_answers_are_those_of_the_whole_model(family):
    llm = of_family(family)
    theirs = whole(family, llm)
    ids, mask = padded_batch()
    ids = ids.clamp(max=VOCAB - 3)
    assert llm.axes == 3 and list(llm.lm.state_dict()) == [
        name.replace("model.language_model.", "model.")
        for name in theirs.state_dict()
        if not name.startswith("model.visual.")
    ]
    for given in ({}, {"position_ids": places(*ids.shape)}):
        wanted = theirs(input_ids=ids, attention_mask=mask, **given).logits
        assert torch.equal(llm.lm(input_ids=ids, attention_mask=mask, **given).logits, wanted)
        hidden = llm.hidden(inputs_embeds=llm.embed(ids), attention_mask=mask, **given).last_hidden_state
        assert torch.equal(llm.head(hidden), wanted)
    fixed = {"attention_mask": mask, "min_new_tokens": 12, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}, {"position_ids": places(*ids.shape)}):
        made = [m.generate(input_ids=ids, **fixed, **more) for m in (llm.lm, theirs)]
        assert torch.equal(*made)


@pytest.mark.parametrize(("family", "plain"), [("qwen2_vl", "qwen2"), ("qwen3_vl", "qwen3")])
@torch.no_grad()
def test_text_alone_has_positions_of_one_axis(family, plain):
    llm = of_family(family)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    extra = {"rope_parameters": rope, "rms_norm_eps": llm.lm.config.rms_norm_eps}
    alike = tiny_llm(plain, **{**options(family), "extra": extra})
    alike.lm.load_state_dict(llm.lm.state_dict())
    ids, mask = padded_batch()
    where = (mask.cumsum(1) - 1).clamp(min=0)
    for given in ({}, {"position_ids": where}, {"position_ids": where.expand(3, -1, -1)}):
        one = given | ({"position_ids": where} if given else {})
        wanted = alike.lm(input_ids=ids, attention_mask=mask, **one).logits
        assert torch.equal(llm.lm(input_ids=ids, attention_mask=mask, **given).logits, wanted)
    assert alike.axes == 1


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_weights_travel_through_a_folder(family, tmp_path):
    llm = of_family(family, tie_embeddings=True)
    llm.lm.save_pretrained(tmp_path)
    again = registry.build("llm", {"name": "hf", "checkpoint": str(tmp_path)}, vocab_size=VOCAB).eval()
    ids, _ = padded_batch()
    assert torch.equal(again.lm(input_ids=ids).logits, llm.lm(input_ids=ids).logits)
    assert again.lm.lm_head.weight is again.lm.get_input_embeddings().weight


def test_experts_have_their_balance_loss_and_their_kernel():
    from zoo.fusion.adapters.experts import ZOO_GROUPED

    llm = of_family("qwen3_vl_moe", router_aux_coef=0.1).train()
    assert llm.provides == {"moe"} and llm.lm.config._experts_implementation == ZOO_GROUPED
    ids, mask = padded_batch()
    with running():
        llm.hidden(inputs_embeds=llm.embed(ids), attention_mask=mask)
        loss = llm.aux_losses()["router_balance"]
    loss.backward()
    assert 0.05 < loss.item() < 1 and llm.layers[0].mlp.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_lora_attaches_and_leaves_it_as_it_was(family):
    llm = of_family(family)
    ids, _ = padded_batch()
    before = llm.lm(input_ids=ids).logits
    lora = adapter_on(llm, {"name": "lora", "rank": 2})
    with torch.no_grad():
        for name, weight in llm.lm.named_parameters():
            weight.add_(0.2) if lora.owns(name) else None
    assert not torch.allclose(llm.lm(input_ids=ids).logits, before, atol=1e-3)
    lora.detach()
    assert torch.equal(llm.lm(input_ids=ids).logits, before)


def test_a_loss_is_that_of_causal_lms():
    llm = of_family("qwen2_vl")
    ids, _ = padded_batch()
    out = llm.lm(input_ids=ids, labels=ids)
    wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, wanted)


def test_sections_of_a_family_fit_every_head():
    for family in ("qwen2_vl_text", "qwen3_vl_text"):
        for heads in (1, 2, 8):
            llm = tiny_llm(family, hidden_size=64, num_heads=heads, num_kv_heads=0)
            assert sum(llm.lm.config.rope_parameters["mrope_section"]) == 64 // heads // 2
            llm.lm(input_ids=torch.zeros(1, 2, dtype=torch.long))


def test_an_unknown_family_names_the_nearest():
    assert "qwen2_vl_text" in TEXT_MODELS
    with pytest.raises(ZooError, match="Did you mean 'qwen2_vl_text'"):
        tiny_llm("qwen2_vl_txt")


@pytest.mark.parametrize(
    ("family", "name"),
    [("qwen3_vl_moe", "mole"), ("qwen3_vl_moe", "moextend"), ("qwen3_vl", "mole"), ("qwen3_vl", "upcycle")],
)
@torch.no_grad()
def test_adapters_with_experts_attach_and_leave_it_as_it_was(family, name):
    llm = of_family(family)
    ids, _ = padded_batch()
    before = llm.lm(input_ids=ids).logits
    adapter = adapter_on(llm, {"name": name, **({"calibration_width": 4} if name == "moextend" else {})})
    for key, weight in llm.lm.named_parameters():
        weight.add_(0.1) if adapter.owns(key) else None
    with running():
        hidden = llm.hidden(inputs_embeds=llm.embed(ids)).last_hidden_state
    assert (llm.head(hidden) - before).abs().max() > 1e-2
    adapter.detach()
    assert torch.equal(llm.lm(input_ids=ids).logits, before)
