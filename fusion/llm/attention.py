"""Choice of the attention kernel, masks in its form, and `zoo_eager`, the fastest for short bf16 rows on CPU.

Masks are bool, (B, 1, T, T), True where key k is visible to query q. `as_backend_mask` converts them to what a kernel
takes: bool for sdpa, an additive mask for eager forms; flash kernels take none.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.registry import ZooError, unknown

ZOO_EAGER = "zoo_eager"
LONG = 1024  # number of keys from which `zoo_eager` calls the fused kernel: scores no longer fit the CPU's caches

_CACHED = 1 << 21  # bytes of scores computed at a time on CPU, about an L2 cache

_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
_LARGEST_HEAD = 256  # head size limit of FlashAttention, in all versions
_SMALLEST_HEAD = 16  # head size limit of flex_attention on CUDA, that of tl.dot
_NAMES = ("auto", "eager", "sdpa", "flex_attention", ZOO_EAGER, *_FLASH)


def resolve_attention(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    seq_len: int | None = None,
    *,
    lm: nn.Module | None = None,
) -> str:
    """Return the name of the attention implementation to use, among installed ones; nothing is downloaded.

    Args:
        name: `auto`, or a name of transformers, or `zoo_eager`.
        device: where the model runs.
        dtype: of the products, so bfloat16 under bf16 autocast.
        seq_len: longest row; None: unknown.
        lm: the transformers model, if there is one: some families have no sdpa.

    Raises:
        ZooError: the name does not exist, or a package, device or dtype that it needs is missing.
    """
    device = torch.device(device)
    require_attention(name, device, dtype)
    if name == ZOO_EAGER:
        register_zoo_eager()
    if lm is not None:
        require_kernel(name, lm, device)
    if name != "auto":
        return name
    if device.type == "cuda":
        # FlashAttention 3 is written for Hopper (compute capability 9); 2 is the faster one elsewhere.
        flash = (3, 2) if torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9 else (2,)
        if getattr(lm, "_supports_flash_attn", True):
            for version in flash:  # 4 is a pre-release: used only if named
                if not _why_no_flash(version, device, dtype):
                    return f"flash_attention_{version}"
    # Such families add softcaps or sinks to their scores, which sdpa cannot compute.
    if lm is not None and not getattr(lm, "_supports_sdpa", True):
        return "eager"  # the family's own, which implements its softcaps and sinks
    if device.type == "cpu" and dtype == torch.bfloat16 and (seq_len is None or seq_len < LONG):
        register_zoo_eager()
        return ZOO_EAGER
    return "sdpa"


def require_kernel(name: str, lm: nn.Module, device: torch.device | str) -> None:
    """Refuse an attention that a language model's family does not support (Gemma 2 and GPT-OSS have no sdpa).

    Args:
        name: as in `resolve_attention`.
        lm: the transformers model, real or on the meta device.
        device: where it runs; a CPU has no limits on head sizes.
    """
    flags = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"} | dict.fromkeys(
        _FLASH, "_supports_flash_attn"
    )
    if name in flags and not getattr(lm, flags[name], True):
        raise ZooError(f"attention {name!r} cannot run: {type(lm).__name__} has none. Use 'auto' or 'eager'.")
    sizes = _head_sizes(lm) if name in flags else []
    if name in _FLASH and sizes and max(sizes) > _LARGEST_HEAD:
        raise ZooError(
            f"attention {name!r} cannot run: heads of {type(lm).__name__} are {max(sizes)} wide, and its kernels take "
            f"{_LARGEST_HEAD} at most. Use 'auto' or 'sdpa'."
        )
    cuda = torch.device(device).type == "cuda"
    if name == "flex_attention" and cuda and sizes and min(sizes) < _SMALLEST_HEAD:
        raise ZooError(
            f"attention {name!r} cannot run: heads of {type(lm).__name__} are {min(sizes)} wide, and it takes "
            f"{_SMALLEST_HEAD} or more. Use 'auto' or 'sdpa'."
        )


def _head_sizes(lm: Any) -> list[int]:
    """Head sizes stated by a transformers model's config; empty if it states none."""
    text = lm.config.get_text_config() if hasattr(lm, "config") else None
    layers = list(getattr(text, "per_layer_config", None) or [text])  # families whose layers differ in heads
    stated = [getattr(layer, name, None) for layer in layers for name in ("head_dim", "global_head_dim")]
    if not any(isinstance(size, int) for size in stated):
        heads, width = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
        stated = [width // heads] if isinstance(heads, int) and heads and isinstance(width, int) else []
    return [size for size in stated if isinstance(size, int)]


def require_attention(name: str, device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Refuse an attention that does not exist or cannot run on this machine; needs no model.

    Args:
        name: as in `resolve_attention`.
        device: where the model will run.
        dtype: of the products; None: any.
    """
    if name not in _NAMES:
        raise unknown("attention", name, _NAMES)
    if name in _FLASH and (reason := _why_no_flash(int(name[-1]), torch.device(device), dtype or torch.bfloat16)):
        raise ZooError(f"attention {name!r} cannot run: {reason}. Use 'auto' or 'sdpa'.")


def _why_no_flash(version: int, device: torch.device, dtype: torch.dtype) -> str:
    """Return the reason why this version of FlashAttention cannot run; an empty string if it can."""
    from transformers.utils import import_utils

    # Checked first: asking transformers for a kernel that is not installed may start a download.
    if not getattr(import_utils, f"is_flash_attn_{version}_available")():
        return f"the package of FlashAttention {version} is not installed"
    if device.type != "cuda":
        return f"it needs a CUDA device, and this is {device.type!r}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, and this is {str(dtype).removeprefix('torch.')}"
    major = torch.cuda.get_device_capability(device)[0]
    least = {2: 8, 3: 8, 4: 9}[version]
    return "" if major >= least else f"it needs compute capability {least}.0, and the device has {major}.x"


def block_mask(attention_mask: Tensor | None, segment_ids: Tensor, block_ids: Tensor | None = None) -> Tensor:
    """Mask of packed rows: (B, 1, T, T), True where key k is visible to query q.

    Key k is visible to q where k <= q, both belong to one segment, and k's block is 0 (the shared prefix) or that of q.
    Every position attends to itself, padding too, so that softmax over a fully masked row does not return NaN.

    Args:
        attention_mask: (B, T) 1 for valid tokens; None: all are valid.
        segment_ids: (B, T) index of the sample within the row; -1 is padding.
        block_ids: (B, T) index of the block within the sample; None: one block.
    """
    t = segment_ids.shape[1]
    valid = segment_ids >= 0  # (B, T)
    if attention_mask is not None:
        valid = valid & attention_mask.bool()
    mask = segment_ids[:, :, None] == segment_ids[:, None, :]  # (B, T, T)
    # In place from here on: (B, T, T) bool is the largest tensor of a packed batch after the logits.
    if block_ids is not None:
        mask &= (block_ids[:, None, :] == 0) | (block_ids[:, :, None] == block_ids[:, None, :])
    mask &= valid[:, None, :]
    mask &= torch.ones(t, t, dtype=torch.bool, device=mask.device).tril_()
    mask |= torch.eye(t, dtype=torch.bool, device=mask.device)
    return mask[:, None]  # (B, 1, T, T)


def as_backend_mask(mask: Tensor, attn_implementation: str, dtype: torch.dtype) -> Tensor:
    """Convert a bool mask (B, 1, T, T) to the form that an attention implementation takes.

    Args:
        mask: True where a key is visible.
        attn_implementation: the resolved name.
        dtype: of the products, so bfloat16 under bf16 autocast; that of additive masks.

    Raises:
        ZooError: the implementation takes no such mask.
    """
    if attn_implementation == "sdpa":
        return mask
    if attn_implementation in ("eager", ZOO_EAGER):
        return _additive(mask, dtype)
    raise ZooError(
        f"attention {attn_implementation!r} takes no block mask, which packed rows need: "
        "use 'sdpa', 'eager' or 'zoo_eager', or do not pack."
    )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    # The smallest number, not -inf: a fully masked row is then uniform instead of NaN.
    return torch.where(mask, zero, torch.finfo(dtype).min)


def register_zoo_eager() -> None:
    """Register `zoo_eager` with transformers, and its mask function: without one, padding would not be masked."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ZOO_EAGER, zoo_eager)
    AttentionMaskInterface.register(ZOO_EAGER, _zoo_eager_mask)


def _zoo_eager_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    from transformers.masking_utils import eager_mask

    device = torch.device(kwargs.get("device", "cpu"))
    kwargs["dtype"] = _product_dtype(device, dtype)
    return eager_mask(*args, **kwargs)


def _product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def zoo_eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as matmul, softmax, matmul, with all tensors in the dtype of the products.

    Unlike transformers' eager: scores, mask, softmax and weights stay bf16 under bf16 autocast (torch's softmax sums
    in float32 inside), the mask is added in place, and grouped queries share keys without copies. From `LONG` keys
    on, the fused kernel runs instead, with the same mask.

    Args:
        module: the attention layer, for `is_causal`.
        query: (B, H, T, d), after rotation.
        key: (B, H_kv, S, d), with H a multiple of H_kv.
        value: (B, H_kv, S, e).
        attention_mask: additive or bool, (B or 1, 1, T, S); None: causal where the layer is.
        scaling: of the scores; None: 1 / sqrt(d).
        dropout: of the weights.
        softcap: cap of the scores through tanh (Gemma 2).
        kwargs: further arguments of transformers.

    Returns:
        (B, T, H, e), and no weights.
    """
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ZooError(f"attention {ZOO_EAGER!r} does not implement {name!r}, which {type(module).__name__} uses.")
    # Inside autocast, q and k may still be float32 (after rotary tables): products run in the autocast dtype.
    dtype = _product_dtype(query.device, query.dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    b, h, t, _ = query.shape
    kv, s = key.shape[1], key.shape[2]
    if attention_mask is None and t > 1 and kwargs.get("is_causal", getattr(module, "is_causal", True)):
        # The last query is aligned with the last key: with a cache, the queries are the end of the sequence.
        attention_mask = torch.ones(t, s, dtype=torch.bool, device=query.device).tril_(s - t)[None, None]
    if attention_mask is not None:
        attention_mask = attention_mask[..., :s]  # a mask may cover more keys, as in transformers' eager
        if attention_mask.dtype == torch.bool:
            attention_mask = _additive(attention_mask, dtype)  # (B, 1, T, S)
        attention_mask = attention_mask.to(dtype)
    key, value = key.to(dtype).contiguous(), value.to(dtype).contiguous()
    if s >= LONG and softcap is None:
        query = query.to(dtype)
        if kv != h:  # the fused kernel takes a key head per query head
            key, value = (x.repeat_interleave(h // kv, dim=1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
        return out.transpose(1, 2).contiguous(), None  # (B, T, H, e)
    # The query is scaled, not the scores: it is the smaller tensor. Queries of a key head become rows of one product.
    query = (query * scaling).to(dtype).reshape(b, kv, h // kv * t, -1)  # (B, H_kv, H/H_kv * T, d)
    plain = softcap is not None or dropout or query.device.type != "cpu" or torch.compiler.is_compiling()
    if attention_mask is not None and not plain:
        out = _Rows.apply(query, key, value, attention_mask.expand(b, -1, -1, -1))
        return out.view(b, h, t, -1).transpose(1, 2).contiguous(), None  # (B, T, H, e)
    scores = query @ key.transpose(-1, -2)  # (B, H_kv, H/H_kv * T, S)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(b, kv, h // kv, t, s)
    if attention_mask is not None:
        # In place: neither the product nor the sum needs its result for the gradient (tanh does).
        mask = attention_mask[:, :, None]  # (B, 1, 1, T, S)
        scores = scores.add_(mask) if softcap is None else scores + mask
    weights = F.softmax(scores, dim=-1, dtype=dtype)
    if dropout:
        weights = F.dropout(weights, dropout, training=module.training)
    out = weights.view(b, kv, h // kv * t, s) @ value  # (B, H_kv, H/H_kv * T, e)
    return out.view(b, h, t, -1).transpose(1, 2).contiguous(), None  # (B, T, H, e)


class _Rows(torch.autograd.Function):
    """The same products a few rows of the batch at a time, so that their scores stay in the cache of the core.

    Measured against all rows at once, 20 rows of 230, 4 heads of 32, bf16: 0.92 to 0.94 of the step of a 4-layer model
    of width 128 on one thread.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Attend: query (B, H_kv, G * T, d) with scaled entries, key (B, H_kv, S, d), mask (B, 1, T, S)."""
        b, kv, gt, _ = query.shape
        t, s = mask.shape[-2:]
        # As many rows at a time as keep their scores in the cache between the three operations.
        n = max(1, _CACHED // (kv * gt * s * query.element_size()))
        keep = any(ctx.needs_input_grad)
        weights = query.new_empty(b if keep else n, kv, gt, s)
        out = query.new_empty(b, kv, gt, value.shape[-1])
        for i in range(0, b, n):
            rows = slice(i, i + n)
            scores = query[rows] @ key[rows].transpose(-1, -2)  # (n, H_kv, G * T, S)
            scores.view(-1, kv, gt // t, t, s).add_(mask[rows, :, None])
            part = weights[rows] if keep else weights[: len(scores)]
            torch.softmax(scores, dim=-1, out=part)
            torch.matmul(part, value[rows], out=out[rows])
        if keep:
            ctx.save_for_backward(query, key, value, weights)
            ctx.n = n
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value; the mask has none."""
        query, key, value, weights = ctx.saved_tensors
        grad = grad.contiguous()
        dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
        for i in range(0, len(query), ctx.n):
            rows = slice(i, i + ctx.n)
            w, g = weights[rows], grad[rows]
            torch.matmul(w.transpose(-1, -2), g, out=dv[rows])
            ds = torch._softmax_backward_data(g @ value[rows].transpose(-1, -2), w, -1, w.dtype)  # (n, H_kv, G * T, S)
            torch.matmul(ds, key[rows], out=dq[rows])
            torch.matmul(ds.transpose(-1, -2), query[rows], out=dk[rows])
        return dq, dk, dv, None
