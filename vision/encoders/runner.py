"""Running a tower of one library up to a layer, and what hooks take from its last block.

Layers are counted as in `hidden_states` of transformers, for all three libraries: 0 is the input of the first block, k
the output of block k, -1 that of the last one, always before the encoder's final norm (`norm=true` applies it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zoo.registry import ZooError
from zoo.registry.forward_pass import Pass, current
from zoo.vision.encoders.attention_scores import PoolingHead

ATTENTION = frozenset({"cls_attention", "key_attention", "keys"})  # capabilities that need q and k of the last block


@dataclass
class Taken:
    """Tensors that hooks on the last block take from one pass of an encoder."""

    wants: frozenset[str]  # requested capabilities
    query: Tensor | None = None
    key: Tensor | None = None
    position: Any = None  # rotary embedding of both, if the encoder has one
    last: Tensor | None = None  # (M, P + N, D) output of the last block, before any norm


class Runner:
    """Uniform access to a tower of one library: running it, its sizes, its attention. One subclass per library.

    Not an nn.Module, so that the tower's weights keep the names that its library gives them.
    """

    tower: Any
    hidden_size: int
    num_prefix: int  # [CLS] and register tokens before the patches
    grid: tuple[int, int]
    has_cls: bool  # whether the first token is [CLS]
    has_scores: bool  # whether the last block's scores are plain q.k, without a bias or gate

    def __init__(self) -> None:
        self.alone = Pass()  # of a compiled encoder that runs outside of a composed model
        self.pooling: PoolingHead | None = None

    @property
    def taken(self) -> Taken | None:
        """Where hooks of the current pass store tensors; None: they store nothing, as in recomputation for backward."""
        return (current() or self.alone).taken

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Run the blocks: (M, 3, S, S) -> (M, P + N, D), prefix tokens first."""
        raise NotImplementedError

    def query_key(self, taken: Taken) -> tuple[Tensor, Tensor, float]:
        """Return queries and keys of the last block's attention, and the scale of q.k.

        Args:
            taken: tensors that the hooks stored.

        Returns:
            The queries (M, H, P + N, d), or those of [CLS] alone if only they are needed; the keys (M, H, P + N, d);
            the scale.
        """
        raise NotImplementedError

    def final_norm(self) -> nn.Module:
        """The final norm, or the identity that replaced it."""
        raise NotImplementedError

    def set_attention(self, name: str) -> None:
        raise NotImplementedError

    def set_gradient_checkpointing(self, enable: bool) -> None:
        raise NotImplementedError

    # Hooks are bound methods, so that a deep copy of the tower calls those of the copy. They store only on request.
    def keep_query(self, module: nn.Module, args: Any, out: Tensor) -> None:
        if (taken := self.taken) is not None and taken.wants & ATTENTION:
            taken.query = out.detach()

    def keep_key(self, module: nn.Module, args: Any, out: Tensor) -> None:
        if (taken := self.taken) is not None and taken.wants & ATTENTION:
            taken.key = out.detach()

    def keep_last(self, module: nn.Module, args: Any, out: Any) -> None:
        if (taken := self.taken) is not None and "pooling_head" in taken.wants:
            taken.last = (out[0] if isinstance(out, tuple) else out).detach()


def block_count(layer: int, depth: int, lowest: int = 0) -> int:
    """Return the number of blocks up to `layer` of an encoder with `depth` blocks: layer -2 of 24 is 23.

    Raises:
        ZooError: there is no such layer.
    """
    count = layer if layer >= 0 else depth + 1 + layer
    if not lowest <= count <= depth:
        raise ZooError(
            f"The encoder has {depth} blocks: layer must be {lowest} to {depth}, or {lowest - depth - 1} to -1"
            f" counted from the end, got {layer}."
        )
    return count
