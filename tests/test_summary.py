"""`print(model)` shows what a model is composed of, and `summary()` its numbers."""

import pytest
import torch

import zoo

LORA = "adapter.lora.targets=[q_proj,k_proj,v_proj,o_proj]"
WORDS = ["vision.image_size=32", "llm.num_layers=2"]


@pytest.fixture(scope="module")
def model():
    return zoo.compose(*WORDS, "pruner=[random,fastv]", "pruner.fastv.layer=1", "adapter=[lora,mole]", LORA)[0]


def test_the_numbers_are_those_of_torch(model):
    found = model.summary()
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.memory >= 4 * found.parameters and found.image_tokens == model.num_image_tokens == 4
    assert sum(part.parameters for part in found.parts) == found.parameters
    assert [f"{p.kind} {p.name}" for p in found.parts] == [
        "vision timm", "pruner random", "projector mlp", "llm hf", "pruner fastv", "adapter lora", "adapter mole",
    ]  # fmt: skip
    parts = {part.name: part for part in found.parts}
    assert parts["timm"].tokens == 16 and parts["timm"].grid == (4, 4) and parts["random"].tokens == 4
    assert parts["lora"].parameters == sum(p.numel() for n, p in model.named_parameters() if "lora" in model.part_of(n))


def test_print_shows_the_composition_in_80_columns(model):
    lines = str(model).splitlines()
    assert repr(model) == str(model) and len(lines) == 9 and all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("ZooModel: ") and lines[0].endswith(" parameters, all trainable")
    assert lines[1].split()[:2] == ["vision", "timm"] and "16 tokens (4 x 4) of width 128" in lines[1]
    assert "starcoder2, 2 layers" in lines[4] and lines[5].endswith("4 image tokens in the first layer, 2 in the last")
    assert "positions kept" in lines[-1] and "float32 on cpu" in lines[-1]
    assert "Linear(" in repr(model.projector)  # a part shows its modules


def test_frozen_and_mixed(model):
    held = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        model.requires_grad_(False)
        assert "none trainable" in str(model)
        model.projector.requires_grad_(True)
        next(model.llm.parameters()).requires_grad_(True)
        lines = str(model).splitlines()
        assert lines[1].endswith("frozen") and lines[3].endswith("trains") and " train" in lines[4]
        assert f"{model.summary().trainable / 1000:.1f} K trainable" in lines[0]
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(held[name])


def test_16_bits():
    model = zoo.compose(*WORDS)[0].to(torch.bfloat16)
    lines = str(model).splitlines()
    assert len(lines) == 5 and "bfloat16 on cpu" in lines[-1] and "positions" not in lines[-1]
