"""Masks in every form, `zoo_eager` against the kernels it stands in for, and the choice among them."""

import pytest
import torch

from tests.fusion_builders import padded_batch, tiny_llm
from zoo.fusion.llm import attention
from zoo.fusion.llm.attention import ZOO_EAGER, as_backend_mask, block_mask, resolve_attention
from zoo.registry import ZooError

CPU = torch.device("cpu")


def naive_visible(attention_mask, segments, blocks):
    b, t = segments.shape
    mask = torch.zeros(b, 1, t, t, dtype=torch.bool)
    for i in range(b):
        for q in range(t):
            for k in range(t):
                same = segments[i, q] == segments[i, k] >= 0 and attention_mask[i, k]
                mask[i, 0, q, k] = q == k or (k <= q and same and blocks[i, k] in (0, blocks[i, q]))
    return mask


def packed_rows():
    """Two samples in a row: prefix of 4 with dialogs of 3 and 2, prefix of 2 with one of 3; then padding."""
    segments = torch.tensor([[0] * 9 + [1] * 5 + [-1] * 2])
    blocks = torch.tensor([[0] * 4 + [1] * 3 + [2] * 2 + [0] * 2 + [1] * 3 + [0] * 2])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 3, 4, 0, 0]])
    return (segments >= 0).long(), segments, blocks, positions


def alone(positions):
    """The rows that the packed one is made of: where each position of each dialog stands in it."""
    return [[*range(7)], [0, 1, 2, 3, 7, 8], [*range(9, 14)]]


def test_block_mask_is_the_loop_over_pairs():
    mask, segments, blocks, _ = packed_rows()
    got = block_mask(mask, segments, blocks)
    assert got.dtype == torch.bool and got.shape == (1, 1, 16, 16)
    assert torch.equal(got, naive_visible(mask, segments, blocks))
    mask[0, 2] = 0
    assert torch.equal(block_mask(mask, segments, blocks), naive_visible(mask, segments, blocks))
    assert torch.equal(block_mask(None, segments), block_mask(None, segments, torch.zeros_like(segments)))


def test_backend_masks():
    mask = block_mask(*packed_rows()[:3])
    assert as_backend_mask(mask, "sdpa", torch.float32) is mask
    for name in ("eager", ZOO_EAGER):
        added = as_backend_mask(mask, name, torch.bfloat16)
        assert added.dtype == torch.bfloat16
        assert torch.equal(added == 0, mask)
        assert added[~mask].unique().tolist() == [torch.finfo(torch.bfloat16).min]
    with pytest.raises(ZooError, match="'flash_attention_2' takes no block mask"):
        as_backend_mask(mask, "flash_attention_2", torch.bfloat16)


@pytest.mark.parametrize("name", ["eager", "sdpa", ZOO_EAGER])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_packed_rows_compute_what_each_dialog_computes_alone(model_type, name):
    llm = tiny_llm(model_type, attention=name)
    mask, segments, blocks, positions = packed_rows()
    embeds = torch.randn(1, 16, 32).requires_grad_()
    seen = as_backend_mask(block_mask(mask, segments, blocks), name, torch.float32)
    packed = llm.hidden(inputs_embeds=embeds, attention_mask=seen, position_ids=positions).last_hidden_state
    weights = torch.randn(16, 32)
    new = [[4, 5, 6], [7, 8], [11, 12, 13]]  # positions that are a dialog's own
    (packed[0] * weights)[[i for own in new for i in own]].sum().backward()
    grads = [embeds.grad.clone(), *(p.grad.clone() for p in llm.layers.parameters())]
    embeds.grad = None
    llm.zero_grad()
    total = 0
    for where, own in zip(alone(positions), new, strict=True):
        row = llm.hidden(inputs_embeds=embeds[:, where]).last_hidden_state[0]
        row = row[[where.index(i) for i in own]]
        assert torch.allclose(row, packed[0, own], atol=1e-5)
        total = total + (row * weights[own]).sum()
    total.backward()
    for a, b in zip(grads, [embeds.grad, *(p.grad for p in llm.layers.parameters())], strict=True):
        assert torch.allclose(a, b, atol=1e-5 * max(1, b.abs().max()))


@pytest.mark.parametrize("name", ["sdpa", ZOO_EAGER])
@torch.no_grad()
def test_positions_that_start_again_do_not_pack_by_themselves(name):
    """They mean packing to transformers only without mask and cache; an all-ones mask mixes the samples silently."""
    llm = tiny_llm(attention=name)
    _, segments, _, _ = packed_rows()
    segments = segments[:, :14]
    positions = torch.tensor([[*range(9), *range(5)]])
    embeds = torch.randn(1, 14, 32)
    second = llm.hidden(inputs_embeds=embeds[:, 9:]).last_hidden_state
    ones = llm.hidden(inputs_embeds=embeds, attention_mask=torch.ones(1, 14), position_ids=positions)
    assert (ones.last_hidden_state[:, 9:] - second).abs().max() > 1e-2  # the trap
    mask = as_backend_mask(block_mask(None, segments), name, torch.float32)
    ours = llm.hidden(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=True)
    assert torch.allclose(ours.last_hidden_state[:, 9:], second, atol=1e-5)


@pytest.mark.parametrize("long", [1024, 4])  # 4: the fused kernel from four keys on
@pytest.mark.parametrize(
    "model_type", ["llama", "starcoder2", "gpt2", "gpt_neox", "mixtral", "phi3", "gemma2", "stablelm"]
)
def test_zoo_eager_is_the_other_kernels(model_type, long, monkeypatch):
    monkeypatch.setattr(attention, "LONG", long)
    ids, mask = padded_batch(3, 11)
    found = {}
    for name in ("eager", "sdpa", ZOO_EAGER):
        if name == "sdpa" and model_type == "gemma2":
            continue  # has caps that sdpa lacks
        llm = tiny_llm(model_type, attention=name)
        for m in (mask, None):
            logits = llm.lm(input_ids=ids, attention_mask=m).logits
            real = (logits * mask[..., None]) if m is not None else logits
            real.logsumexp(-1).sum().backward()
            found.setdefault(name, []).append(real)
        found[name] += [p.grad for p in llm.parameters()]
        llm.zero_grad(set_to_none=False)
    for other in found.keys() - {"eager"}:
        for a, b in zip(found[other], found["eager"], strict=True):
            assert torch.allclose(a, b, atol=1e-5 * max(1, b.abs().max())), other


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 5])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mask_rows", [1, 5])
def test_rows_in_any_portions_are_the_equation(rows_at_a_time, groups, mask_rows, monkeypatch):
    b, kv, t, d = 5, 2, 7, 4
    monkeypatch.setattr(attention, "_CACHED", rows_at_a_time * kv * groups * t * t * 4)
    q, k, v = (torch.randn(b, h, t, d).requires_grad_() for h in (kv * groups, kv, kv))
    visible = torch.rand(mask_rows, 1, t, t).gt(0.5) | torch.eye(t).bool()
    out, _ = attention.zoo_eager(torch.nn.Identity(), q, k, v, visible, scaling=0.3)
    weight = torch.randn(b, t, kv * groups, d)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    scores = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(groups, 1)) * 0.3
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    wanted = torch.einsum("bhts,bhsd->bthd", probs, v.repeat_interleave(groups, 1))
    assert torch.allclose(out, wanted, atol=1e-5)
    for a, b in zip(grads, torch.autograd.grad((wanted * weight).sum(), (q, k, v)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(attention.zoo_eager(torch.nn.Identity(), q, k, v, visible, scaling=0.3)[0], out)


@pytest.mark.parametrize("name", ["eager", "sdpa", ZOO_EAGER])
@torch.no_grad()
def test_padding_is_honoured(name):
    """A registered kernel without a mask function of its name would lose it without a word."""
    llm = tiny_llm(attention=name)
    ids, mask = padded_batch()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    row = llm.lm(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, 3:]
    assert torch.allclose(row, llm.lm(input_ids=ids[:1, 3:]).logits[0], atol=1e-5)
    lost = llm.lm(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(mask)).logits[0, 3:]
    assert (row - lost).abs().max() > 1e-3


@torch.no_grad()
def test_zoo_eager_decodes_with_a_cache():
    ids, mask = padded_batch(2, 7)
    texts = [
        tiny_llm(attention=name).lm.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        for name in ("sdpa", ZOO_EAGER)
    ]
    assert torch.equal(*texts)


def test_zoo_eager_stays_in_bf16_under_autocast_and_near_float32():
    ids, mask = padded_batch(2, 40)
    llm = tiny_llm(attention=ZOO_EAGER)
    wanted = llm.lm(input_ids=ids, attention_mask=mask).logits
    with torch.autocast("cpu", torch.bfloat16):
        seen = []
        handle = llm.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].dtype))
        got = llm.lm(input_ids=ids, attention_mask=mask).logits.float()
        handle.remove()
    assert seen == [torch.bfloat16]
    assert (got - wanted)[mask.bool()].abs().max() < 0.05 * wanted.abs().max()


def test_zoo_eager_refuses_what_it_would_compute_wrongly():
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ZooError, match="does not implement 's_aux'"):
        attention.zoo_eager(torch.nn.Identity(), q, q, q, None, s_aux=torch.zeros(2))


def test_auto_looks_and_never_asks(monkeypatch):
    from transformers.utils import import_utils

    assert resolve_attention("auto", CPU, torch.float32) == "sdpa"
    assert resolve_attention("auto", CPU, torch.bfloat16) == ZOO_EAGER
    assert resolve_attention("auto", CPU, torch.bfloat16, seq_len=4096) == "sdpa"
    assert resolve_attention("auto", "meta", torch.bfloat16) == "sdpa"
    assert resolve_attention("auto", CPU, torch.float32, lm=tiny_llm("gemma2").lm) == "eager"
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for version in (2, 3, 4):
        monkeypatch.setattr(import_utils, f"is_flash_attn_{version}_available", lambda: False)
    assert resolve_attention("auto", cuda, torch.bfloat16) == "sdpa"
    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: True)
    assert resolve_attention("auto", cuda, torch.bfloat16) == "flash_attention_2"
    monkeypatch.setattr(import_utils, "is_flash_attn_3_available", lambda: True)
    assert resolve_attention("auto", cuda, torch.bfloat16) == "flash_attention_3"
    assert resolve_attention("auto", cuda, torch.float32) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert resolve_attention("auto", cuda, torch.float16) == "sdpa"
    with pytest.raises(ZooError, match=r"compute capability 8.0, and the device has 7.x"):
        resolve_attention("flash_attention_2", cuda, torch.float16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sdap", "No attention named 'sdap'. Did you mean 'sdpa'"),
        ("kernels-community/flash-attn2", "No attention named"),  # would be downloaded and run
        ("flash_attention_2", "cannot run: the package of FlashAttention 2 is not installed"),
    ],
)
def test_names_that_cannot_run_are_refused(name, message, monkeypatch):
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ZooError, match=message):
        resolve_attention(name, CPU, torch.float32)
    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: True)
    with pytest.raises(ZooError, match="it needs a CUDA device, and this is 'cpu'"):
        resolve_attention("flash_attention_2", CPU, torch.bfloat16)
