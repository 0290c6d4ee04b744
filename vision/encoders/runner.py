"""Running a tower of one library up to a layer, and what hooks take from its blocks.

Layers are counted as in `hidden_states` of transformers, for all three libraries: 0 is the input of the first block, k
the output of block k, -1 that of the last one, always before the encoder's final norm (`norm=true` applies it).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from zoo.registry import ZooError
from zoo.registry.forward_pass import Pass, current
from zoo.registry.part import base_of, block_of
from zoo.vision.encoders.attention_scores import PoolingHead
from zoo.vision.encoders.next_block import NextBlock

ATTENTION = frozenset({"cls_attention", "key_attention", "keys"})  # capabilities that need q and k of a block


@dataclass
class QueryKey:
    """Queries and keys of one block's attention in one pass, for the capabilities that `wants` names."""

    wants: frozenset[str]
    query: Tensor | None = None
    key: Tensor | None = None
    position: Any = None  # rotary embedding of both, if the encoder has one


class Taken:
    """Tensors that hooks take from one pass of an encoder.

    Args:
        need: requested capabilities, such as cls_attention, of the last block, and key_attention@9.
        last: number of the last block that runs; blocks are counted from 1.
    """

    def __init__(self, need: frozenset[str], last: int) -> None:
        wants: dict[int, set[str]] = {}
        for word in need:
            if base_of(word) in ATTENTION:
                wants.setdefault(block_of(word) or last, set()).add(base_of(word))
        self.blocks = {block: QueryKey(frozenset(words)) for block, words in wants.items()}
        self.pools = not need.isdisjoint({"pooling_head", "summary"})
        self.reads = "next_block" in need
        self.last: Tensor | None = None  # (M, P + N, D) output of the last block, before any norm
        self.next: tuple[Tensor, Tensor] | None = None  # of `NextBlock.read`


class Runner:
    """Uniform access to a tower of one library: running it, its sizes, its attention. One subclass per library.

    Not an nn.Module, so that the tower's weights keep the names that its library gives them.
    """

    tower: Any
    hidden_size: int
    num_prefix: int  # [CLS] and register tokens before the patches
    grid: tuple[int, int]
    has_cls: bool  # whether the first token is [CLS]
    has_scores: bool  # whether the last block's scores are q.k, without a gate, and with no bias but `bias`
    patch: tuple[int, int]  # (height, width) of a patch in pixels
    depth: int  # blocks of the whole encoder
    num_blocks: int  # of them, those that run

    def __init__(self) -> None:
        self.alone = Pass()  # of a compiled encoder that runs outside of a composed model
        self.pooling: PoolingHead | None = None
        self.lacks: dict[str, str] = {}  # capability -> why it is not given, a sentence
        self.has_next = False  # whether a `NextBlock` is behind the last block
        self.heard: set[int] = set()  # blocks with hooks, counted from 1; the others run as they are

    @property
    def taken(self) -> Taken | None:
        """Where hooks of the current pass store tensors; None: they store nothing, as in recomputation for backward."""
        return (current() or self.alone).taken

    def attention(self, block: int) -> Any:
        """The attention of a block, counted from 1."""
        raise NotImplementedError

    def gives_scores(self, block: int) -> bool:
        """Whether the scores of a block's attention are q.k, and its q and k can be taken."""
        raise NotImplementedError

    def hook(self, block: int) -> None:
        """Put hooks on the attention of a block that take its q and k."""
        raise NotImplementedError

    def listen(self, need: frozenset[str]) -> None:
        """Put hooks on the blocks that `need` names."""
        for word in need:
            if (block := block_of(word)) is not None:
                self.listen_to(block)

    def listen_to(self, block: int) -> None:
        """Put hooks on a block, unless it has them."""
        if block not in self.heard:
            self.heard.add(block)
            self.hook(block)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Run the blocks: (M, 3, S, S) -> (M, P + N, D), prefix tokens first."""
        raise NotImplementedError

    def query_key(self, block: int, taken: QueryKey) -> tuple[Tensor, Tensor, float]:
        """Return queries and keys of a block's attention, and the scale of q.k.

        Args:
            block: counted from 1.
            taken: tensors that its hooks stored.

        Returns:
            The queries (M, H, P + N, d), or those of [CLS] alone if only they are needed; the keys (M, H, P + N, d);
            the scale.
        """
        raise NotImplementedError

    def bias(self, block: int) -> Tensor | None:
        """What a block's attention adds to q.k: (H, N, N), without gradient; None: nothing."""
        return None

    def resize(self, grid: tuple[int, int]) -> None:
        """Run on images of `grid` patches from now on; weights stay, positions are interpolated in `encode`.

        Raises:
            ZooError: the tower has tables for one size.
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
    def wanted(self, block: int) -> QueryKey | None:
        """Where hooks on this block store its q and k; None: the current pass does not ask for them."""
        return None if (taken := self.taken) is None else taken.blocks.get(block)

    def hook_query_key(self, block: int, query: nn.Module, key: nn.Module) -> None:
        """Take q and k of a block from the outputs of two modules."""
        query.register_forward_hook(partial(self.keep_query, block))
        key.register_forward_hook(partial(self.keep_key, block))

    def keep_query(self, block: int, module: nn.Module, args: Any, out: Tensor) -> None:
        if (taken := self.wanted(block)) is not None:
            taken.query = out.detach()

    def keep_key(self, block: int, module: nn.Module, args: Any, out: Tensor) -> None:
        if (taken := self.wanted(block)) is not None:
            taken.key = out.detach()

    def keep_last(self, module: nn.Module, args: Any, out: Any) -> None:
        if (taken := self.taken) is not None and taken.pools:
            taken.last = (out[0] if isinstance(out, tuple) else out).detach()

    def keep_next(self, module: NextBlock, args: tuple[Tensor, ...], out: Tensor) -> None:
        if (taken := self.taken) is not None and taken.reads:
            taken.next = module.read(out, self.num_prefix)

    def put_next(self, blocks: Any, block: nn.Module) -> None:
        """Put what is read of the block behind the features behind the blocks that run.

        Raises:
            ZooError: there is no [CLS], or the block is of another kind.
        """
        if not self.has_cls:
            raise ZooError("next_block reads what [CLS] attends to, and the encoder has none: it must be false.")
        kept = NextBlock(block)
        kept.register_forward_hook(self.keep_next)
        blocks.append(kept)
        self.has_next = True


def count_with_next(count: int, depth: int) -> int:
    """Return the number of blocks to build where the one behind the first `count` is read, too.

    Raises:
        ZooError: there is none.
    """
    if count >= depth:
        raise ZooError(
            f"next_block keeps the block behind the features, and they are of the last of {depth}: choose an earlier "
            "layer, or next_block=false."
        )
    return count + 1


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
