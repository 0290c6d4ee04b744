"""FLOPs are counted alike whatever kernel runs them, on every version of torch."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.fusion_builders import MOE, tiny_llm
from zoo import registry
from zoo.benches.flops import count_flops
from zoo.composed.costs import encoder_flops


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_fused_attention_counts_as_its_products_one_by_one(groups, masked, backward):
    query = torch.randn(2, 4, 10, 8, requires_grad=backward)
    key, value = (torch.randn(2, 4 // groups, 12, 8, requires_grad=backward) for _ in range(2))
    mask = torch.ones(10, 12, dtype=torch.bool).tril() if masked else None

    def attend():
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=groups > 1)
        if backward:
            out.sum().backward()

    def by_kernel(backend):
        with sdpa_kernel(backend):
            return count_flops(attend)

    products = 2 * 2 * 4 * 10 * 12 * 8  # one product of B = 2, H = 4, T = 10, S = 12, D = 8
    assert by_kernel(SDPBackend.MATH) == products * (6 if backward else 2)
    assert by_kernel(SDPBackend.FLASH_ATTENTION) == products * (7 if backward else 2)  # scores are computed again


@pytest.mark.parametrize("backward", [False, True])
def test_grouped_products_count_each_row_once(backward):
    rows, stack = (torch.randn(*s, requires_grad=backward) for s in ((10, 16), (3, 16, 8)))
    ends = torch.tensor([3, 5, 10], dtype=torch.int32)

    def multiply():
        out = F.grouped_mm(rows, stack, offs=ends)
        if backward:
            out.square().sum().backward()

    assert count_flops(multiply) == 2 * 10 * 16 * 8 * (3 if backward else 1)


@pytest.mark.parametrize("model_type", MOE)
def test_experts_count_alike_at_once_and_one_by_one(model_type):
    llm = tiny_llm(model_type)
    ids = torch.randint(8, 90, (1, 40))
    at_once = count_flops(lambda: llm.lm(input_ids=ids, use_cache=False))
    llm.lm.set_experts_implementation("eager")
    assert at_once == count_flops(lambda: llm.lm(input_ids=ids, use_cache=False))


@pytest.mark.parametrize("name", ["timm", "open_clip", "hf"])
def test_the_closed_form_of_an_encoder_counts_all_products(name):
    if name == "open_clip":
        pytest.importorskip("open_clip")
    sizes = {"width": 32, "depth": 3, "heads": 2, "image_size": 32, "patch_size": 8, "layer": -2}
    vision = registry.build("vision", {"name": name, **sizes}).eval()
    pixels = torch.randn(1, 3, 32, 32)
    assert encoder_flops(vision.runner, vision.num_tokens) == count_flops(lambda: vision(pixels))
