"""Dropping inside decoders whose masks are their own: sliding windows, and kernels that take padding alone."""

import pytest
import torch
from torch.nn import functional as F

from tests.dropping_builders import dropper, forward, generate, kept, llm_of, padded, row
from zoo.registry import ZooError


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "phi3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_sliding_windows_count_the_places_that_tokens_had(model_type, attention):
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    extra = {"sliding_window": 8} | (
        {"layer_types": kinds, "use_sliding_window": True} if model_type == "qwen2" else {}
    )
    ids, mask = padded([row("titt", 8), row("titit", 3, 1)])
    found = []
    for hide in (False, True):
        llm = llm_of(model_type, attention, extra=extra)
        found.append(generate(llm, dropper(llm, hide=hide), ids, mask, max_new_tokens=12))
    a, b = found
    assert torch.equal(a.sequences, b.sequences)
    assert all(torch.allclose(x, y, atol=3e-6, rtol=3e-6) for x, y in zip(a.scores, b.scores, strict=True))


def flash(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What a flash kernel makes of padding (B, S), computed plainly; it takes no other mask."""
    (b, h, q, _), s = query.shape, key.shape[2]
    assert attention_mask is None or attention_mask.shape == (b, s)
    mask = torch.ones(q, s, dtype=torch.bool).tril(s - q).expand(b, 1, q, s)
    if attention_mask is not None:
        mask = mask & attention_mask.bool()[:, None, None]
        mask = mask | ~mask.any(-1, keepdim=True)
    key, value = (x.repeat_interleave(h // x.shape[1], 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash_llm(monkeypatch):
    """Makes decoders that are set to FlashAttention, which is `flash` here."""
    from transformers import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)

    def made(model_type="qwen2", **options):
        llm = llm_of(model_type, **options)
        llm.lm.config._attn_implementation = "flash_attention_2"
        return llm

    return made


@torch.no_grad()
def test_flash_kernels_are_given_the_masks_they_take(flash_llm):
    rows = [row("tit", 8), row("titit", 4, 1)]
    for ids, mask in (padded(rows), (rows[1][None], None)):
        found = []
        for llm in (flash_llm(), llm_of("qwen2")):
            found.append(generate(llm, dropper(llm), ids, mask))
        a, b = found
        assert torch.equal(a.sequences, b.sequences)
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a.scores, b.scores, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(kept(a), kept(b), strict=True))


@torch.no_grad()
def test_flash_kernels_with_a_window_in_effect_are_refused(flash_llm):
    llm = flash_llm("mistral", extra={"sliding_window": 8})
    with pytest.raises(ZooError, match=r"sliding window of 8 is exceeded by the sequence of 24.*attention=sdpa"):
        forward(llm, dropper(llm), row()[None])
