"""Run a ViT of timm, for the timm encoder and for timm trunks inside open_clip's towers."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ZooError
from zoo.vision.encoders.attention_scores import pooling_head
from zoo.vision.encoders.conv_stem import ConvStem
from zoo.vision.encoders.runner import QueryKey, Runner, block_count, count_with_next

PARTS = ("blocks", "embed_dim", "num_prefix_tokens", "prune_intermediate_layers", "forward_intermediates", "norm")


class TimmRunner(Runner):
    """Runs a timm ViT up to `layer`, with hooks on the attention of that block.

    Raises:
        ZooError: the model has no blocks of one width on one patch grid, or no such layer, or no final norm.
    """

    def __init__(
        self,
        tower: Any,
        layer: int,
        norm: bool,
        name: str,
        pooling: bool = False,
        following: bool = False,
        summary: bool = False,
    ) -> None:
        super().__init__()
        if not is_vit(tower):
            raise ZooError(
                f"{name!r} is a {type(tower).__name__}, which has no blocks of one width on one fixed patch grid;"
                " a plain ViT is needed (vit_*, deit_*, eva*, beit* of timm)."
            )
        last = block_count(layer, len(tower.blocks), lowest=1) - 1
        if norm and isinstance(tower.norm, nn.Identity):  # models with average pooling have their norm after it
            tower.norm = getattr(tower, "fc_norm", tower.norm)
            if isinstance(tower.norm, nn.Identity):
                raise ZooError(f"{name!r} has no final norm: norm must be false.")
        if pooling:
            later, head = list(tower.blocks[last + 1 :]), getattr(tower, "attn_pool", None)
            self.pooling = pooling_head(head, later, None if norm else tower.norm, repr(name), summary)
        self.depth = len(tower.blocks)
        later_block = tower.blocks[count_with_next(last + 1, self.depth) - 1] if following else None
        tower.prune_intermediate_layers([last], prune_norm=not norm, prune_head=True)
        self.tower, self.index, self.norm = tower, last, norm
        self.hidden_size = tower.embed_dim
        self.num_prefix = tower.num_prefix_tokens
        grid = tower.patch_embed.grid_size
        self.grid, self.patch, self.name = (grid[0], grid[1]), tuple(tower.patch_embed.patch_size), name
        self.num_blocks = len(tower.blocks)
        self.has_cls = getattr(tower, "cls_token", None) is not None and self.num_prefix > 0
        self.has_scores = self.gives_scores(self.num_blocks)
        if self.has_scores:
            self.listen_to(self.num_blocks)
        if self.pooling is not None:
            tower.blocks[-1].register_forward_hook(self.keep_last)
        if later_block is not None:
            self.put_next(tower.blocks, later_block)

    def encode(self, pixel_values: Tensor) -> Tensor:
        (out,) = self.tower.forward_intermediates(
            pixel_values,
            indices=[self.index],
            return_prefix_tokens=self.num_prefix > 0,  # some of timm's classes fail where there are none
            norm=self.norm,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return torch.cat([out[1], out[0]], dim=1) if isinstance(out, tuple) else out  # (M, P + N, D)

    def resize(self, grid: tuple[int, int]) -> None:
        """Let timm resample positions in forward, as models made with `dynamic_img_size` do."""
        from timm.layers import Format, PatchEmbed

        tower, embed = self.tower, self.tower.patch_embed
        if not (hasattr(tower, "dynamic_img_size") and isinstance(embed, (PatchEmbed, ConvStem))):
            raise ZooError(f"{self.name!r} is a {type(tower).__name__}, which has tables for images of one size")
        tower.dynamic_img_size = True
        embed.flatten, embed.strict_img_size, embed.output_fmt = False, False, Format.NHWC
        rope: Any = getattr(tower, "rope", None)
        if hasattr(rope, "update_feat_shape"):
            rope.update_feat_shape(list(grid))
        self.grid = grid

    def attention(self, block: int) -> Any:
        return getattr(self.tower.blocks[block - 1], "attn", None)

    def gives_scores(self, block: int) -> bool:
        from timm.layers import Attention, AttentionRope
        from timm.models.eva import EvaAttention

        return type(self.attention(block)) in (Attention, AttentionRope, EvaAttention)  # scores are q.k and no more

    def hook(self, block: int) -> None:
        attention = self.attention(block)
        attention.register_forward_pre_hook(partial(self._keep_rope, block), with_kwargs=True)
        self.hook_query_key(block, attention.q_norm, attention.k_norm)  # q and k behind their norms

    def _keep_rope(self, block: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if (taken := self.wanted(block)) is not None:
            taken.position = kwargs.get("rope")

    def query_key(self, block: int, taken: QueryKey) -> tuple[Tensor, Tensor, float]:
        from timm.layers import apply_rot_embed_cat

        assert taken.query is not None and taken.key is not None, f"the hooks of block {block} did not fire"
        attention = self.attention(block)
        query, key = taken.query, taken.key  # (M, H, P + N, d)
        if (rope := taken.position) is not None:  # only patches are rotated; the hooks run before the rotation
            p, half = self.num_prefix, getattr(attention, "rotate_half", False)

            def rotated(x: Tensor) -> Tensor:
                return torch.cat([x[:, :, :p], apply_rot_embed_cat(x[:, :, p:], rope, half=half)], dim=2)

            query, key = rotated(query), rotated(key)
        return query, key, attention.scale

    def final_norm(self) -> nn.Module:
        return self.tower.norm

    def set_attention(self, name: str) -> None:
        for module in self.tower.modules():  # timm's fused attention is torch's SDPA, flash kernels included
            if hasattr(module, "fused_attn"):
                module.fused_attn = not name.endswith("eager")

    def set_gradient_checkpointing(self, enable: bool) -> None:
        self.tower.set_grad_checkpointing(enable)


def is_vit(tower: Any) -> bool:
    """Whether a model of timm has blocks of one width on one patch grid, with prefix tokens among the patches.

    Others give feature maps; so does CaiT, whose prefix tokens do not run through the blocks.
    """
    fixed = getattr(getattr(tower, "patch_embed", None), "grid_size", None)
    if not fixed or not all(hasattr(tower, part) for part in PARTS):
        return False
    return "return_prefix_tokens" in signature(tower.forward_intermediates).parameters
