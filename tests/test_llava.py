"""A composed model that holds the weights of a tiny `LlavaForConditionalGeneration` is that model."""

import pytest
import torch

from tests.conftest import ANSWERS, QUESTIONS, sample
from zoo.composed.model import ZooModel
from zoo.loading.build import processor_for
from zoo.model_config import ZooConfig


@pytest.fixture(scope="module")
def llava(tokenizer, tmp_path_factory):
    """The transformers model, and the composed one built from its parts saved in folders of their own."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    reference = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                image_size=32, patch_size=8,
            ),
            text_config=LlamaConfig(
                hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            ),
            image_token_id=tokenizer.image_token_id,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=16,
        )
    ).eval()  # fmt: skip
    reference.model.vision_tower.save_pretrained(folder / "vision")
    from transformers import LlamaForCausalLM

    lm = LlamaForCausalLM(reference.config.text_config)
    lm.model, lm.lm_head = reference.model.language_model, reference.lm_head
    lm.save_pretrained(folder / "llm")
    config = ZooConfig(
        slots={
            "vision": {"name": "hf", "checkpoint": str(folder / "vision"), "layer": -2},
            "projector": {"name": "mlp"},
            "llm": {"name": "hf", "checkpoint": str(folder / "llm")},
        },
        image_token_id=tokenizer.image_token_id,
        text_vocab_size=len(tokenizer),
        attention="sdpa",
    )
    ours = ZooModel(config).eval()
    theirs = reference.model.multi_modal_projector
    linears = [m for m in ours.projector.modules() if isinstance(m, torch.nn.Linear)]
    for mine, other in zip(linears, (theirs.linear_1, theirs.linear_2), strict=True):
        mine.load_state_dict(other.state_dict())
    return reference, ours, processor_for(ours, tokenizer)


SAMPLES = [
    sample((QUESTIONS[0], ANSWERS[0]), seed=1),
    sample((QUESTIONS[4], ANSWERS[6]), images=2, seed=2),
    sample((QUESTIONS[2], ANSWERS[4]), images=0),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_and_loss_are_equal(llava, attention, side):
    reference, ours, processor = llava
    reference.set_attn_implementation(attention)
    ours.set_attention(attention)
    batch = processor.collate([processor.encode(s) for s in SAMPLES], padding_side=side)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values", "position_ids")}
    with torch.no_grad():
        expected = reference(**inputs, labels=batch["labels"])
        got = ours(**inputs, labels=batch["labels"], all_logits=True)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generated_text_is_equal(llava, options):
    reference, ours, processor = llava
    ours.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    batch = processor.collate([processor.encode_prompt(s, s.dialogs[0]) for s in SAMPLES], padding_side="left")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    options = {**options, "max_new_tokens": 32, "pad_token_id": processor.tokenizer.pad_token_id}
    assert torch.equal(ours.generate(**inputs, **options), reference.generate(**inputs, **options))


def test_only_what_differs_from_the_base_is_saved(llava, tmp_path):
    from safetensors.torch import load_file

    from zoo.registry import ZooError

    _, ours, processor = llava
    ours.save_pretrained(tmp_path / "a")
    assert {n.partition(".")[0] for n in load_file(tmp_path / "a" / "model.safetensors")} == {"projector"}
    batch = processor.collate([processor.encode(s) for s in SAMPLES])
    again = ZooModel.from_pretrained(tmp_path / "a")
    before = ours(**batch, all_logits=True).logits
    assert torch.equal(again(**batch, all_logits=True).logits, before)

    weight = again.llm.lm.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight.add_(1.0)
    again.save_pretrained(tmp_path / "b")
    assert sum(n.startswith("llm") for n in load_file(tmp_path / "b" / "model.safetensors")) == 1
    changed = ZooModel.from_pretrained(tmp_path / "b")
    assert torch.equal(changed(**batch, all_logits=True).logits, again(**batch, all_logits=True).logits)

    ours.save_pretrained(tmp_path / "c", include_base=True)
    assert {n.partition(".")[0] for n in load_file(tmp_path / "c" / "model.safetensors")} == {
        "vision",
        "projector",
        "llm",
    }

    config = ZooConfig.from_pretrained(tmp_path / "a")
    config.base["llm"]["fingerprint"] = "0" * 64
    config.save_pretrained(tmp_path / "a")
    with pytest.raises(ZooError, match=r"base weights of llm.*differ"):
        ZooModel.from_pretrained(tmp_path / "a")
