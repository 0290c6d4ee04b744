"""Shared by the encoders of transformers, timm and open_clip: attention scores on request, frozen towers, sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.registry import Encoder, ImageFeatures, ImageTransform, ZooError
from zoo.registry.forward_pass import joined
from zoo.registry.part import OF_BLOCKS, base_of, block_of
from zoo.vision.encoders.attention_scores import column_mean, row
from zoo.vision.encoders.runner import Runner, Taken
from zoo.vision.encoders.text_tower import FOLDER, TextTower, read_words
from zoo.vision.images.transform import require_transform

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # mean and std of SigLIP, and of encoders trained from scratch here


class Tower(Encoder, nn.Module):
    """A wrapped encoder without the blocks after the chosen layer. Each component of this folder builds one.

    Args:
        runner: of the encoder.
        transform: resize and normalisation of its pixels.
        frames: runner of a second encoder of the same sizes, for video frames; None: the first one encodes them too.
        text: builds the text tower of the same contrastive model; a sentence: why there is none.
    """

    def __init__(
        self,
        runner: Runner,
        transform: ImageTransform,
        frames: Runner | None = None,
        text: Callable[[], TextTower] | str = "it was not trained with texts.",
    ) -> None:
        super().__init__()
        require_transform(transform)
        self.tower: nn.Module = runner.tower
        if frames is not None:
            self.frame_tower: nn.Module = frames.tower
        for module in self.modules():
            if isinstance(module, _BatchNorm):  # 16 bits are too few for running statistics, and torch wants one dtype
                module._keep_in_fp32_modules_strict = ("weight", "bias", "running_")  # type: ignore[assignment]
        self.pooling = runner.pooling
        self.runner, self.frame_runner = runner, frames
        self.by_kind = frames is not None
        self.transform = transform
        self.hidden_size = runner.hidden_size
        self.grid = runner.grid
        words = {
            "grid": True,
            "prefix_tokens": runner.num_prefix > 0,
            "cls_attention": runner.has_cls and runner.has_scores,
            "key_attention": runner.has_scores,
            "keys": runner.has_scores,
            "pooling_head": runner.pooling is not None,
            "summary": runner.pooling is not None and runner.pooling.whole,
            "next_block": runner.has_next,
            "text_tower": not isinstance(text, str),
        }
        self.text: TextTower | None = None
        self._read_text = text
        self.lacks = {**runner.lacks, **({"text_tower": text} if isinstance(text, str) else {})}
        if not words["summary"]:
            self.lacks["summary"] = "vision.summary=true keeps the pooling head of a SigLIP whole."
        if not runner.has_cls:
            self.lacks["cls_attention"] = "there is no [CLS], whose attention is read."
            self.lacks["next_block"] = "there is no [CLS], whose attention is read."
        elif not runner.has_next:
            last = runner.num_blocks >= runner.depth
            why = "its features are those of the last block." if last else "it keeps that with vision.next_block=true."
            self.lacks["next_block"] = why
        self.provides = frozenset(word for word, given in words.items() if given)
        self.depth = runner.depth
        every = runner.has_scores and all(runner.gives_scores(1 + i) for i in range(runner.num_blocks))
        self.attention_blocks = runner.num_blocks if every else 0

    @property
    def num_tokens(self) -> int:  # type: ignore[override]
        return self.grid[0] * self.grid[1]

    def prepare(self, need: frozenset[str]) -> None:
        """Put hooks on the blocks that `need` names, and read the text tower where it does.

        `forward` puts hooks, too, but a compiled graph cannot.
        """
        for runner in self._runners():
            runner.listen(need)
        if "text_tower" in need and self.text is None and not isinstance(self._read_text, str):
            self.text = self._read_text()
            self.text_tower = sum(weight.numel() for weight in self.text.state_dict().values())

    def embed_texts(self, texts: Sequence[str]) -> list[Tensor]:
        """Embed texts by the text tower: (S, P) float32 for each, S pieces where one is longer than it takes.

        Raises:
            ZooError: the text tower was not asked for (`prepare`), or has no tokenizer.
        """
        if self.text is None:
            raise ZooError("The encoder embeds texts once `prepare` was called with text_tower, and it was not.")
        return self.text.embed(texts)

    def write_files(self, folder: Path) -> None:
        """Write the tokenizer of the text tower."""
        if self.text is not None and self.text.words is not None and self.text.words.save is not None:
            self.text.words.save(folder / FOLDER)

    def read_files(self, folder: Path) -> None:
        """Read the tokenizer of the text tower, unless its checkpoint gave one."""
        if self.text is not None and self.text.words is None:
            self.text.words = read_words(folder / FOLDER)

    def resize(self, grid: tuple[int, int]) -> None:
        """Take images of `grid` patches from now on; positions are interpolated as `image_size` does it.

        Raises:
            ZooError: the tower has tables for one size.
        """
        for runner in self._runners():
            runner.resize(grid)
        self.grid = grid
        height, width = (side * patch for side, patch in zip(grid, self.runner.patch, strict=True))
        self.transform = replace(self.transform, size=(height, width))

    def set_attention(self, name: str) -> None:
        """Choose the attention kernel: eager, sdpa, or another one that the library supports."""
        for runner in self._runners():
            runner.set_attention(name)

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        for runner in self._runners():
            runner.set_gradient_checkpointing(enable)

    def train(self, mode: bool = True) -> Tower:
        """Switch to training; a frozen tower stays in evaluation (DINOv3 augments its positions in training mode).

        Batch norms stay in evaluation also where the tower trains: they normalise by the running statistics that they
        have, so that a row does not depend on its batch, and learn their scale and shift alone.
        """
        super().train(mode)
        for runner in self._runners():
            if not _trains(runner):
                runner.tower.eval()
            for module in runner.tower.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _runners(self) -> list[Runner]:
        return [runner for runner in (self.runner, self.frame_runner) if runner is not None]

    def forward(
        self, pixel_values: Tensor, *, need: frozenset[str] = frozenset(), kinds: Sequence[str] | None = None
    ) -> ImageFeatures:
        """Encode images.

        A frozen tower builds no graph and keeps no activations, unless the pixels require a gradient.

        Args:
            pixel_values: (M, 3, S, S), prepared by `transform`.
            need: requested capabilities of `provides`; `grid` is always given. Those of another block, up to
                `attention_blocks`, name it: key_attention@9.
            kinds: image, crop or frame for each row; None: there are no frames.

        Returns:
            Patch tokens (M, N, D); cls_attention (M, N) float32, without gradient: attention of [CLS] in the block that
            computed the tokens, mean over heads, normalised over all P + N keys, prefix columns dropped; key_attention
            (M, N): the same for the mean over all queries; keys (M, N, H, d) of that block; pooling_attention (M, N);
            summary (M, D), the pooling head's output;
            prefix (M, P, D); next_attention (M, N) and next_keys (M, N, C) of `NextBlock.read`; patch_embeds (M, N, P)
            float32, of the space that the text tower shares; block_attention, scores (M, N) of other blocks by their
            words.

        Raises:
            ZooError: a capability that the encoder does not provide, or images of another size.
        """
        if missing := [word for word in sorted(need - self.provides) if not self._gives_block(word)]:
            blocks = f", and attention of the blocks 1 to {self.attention_blocks}" if self.attention_blocks else ""
            raise ZooError(f"This encoder does not provide {missing}; it provides {sorted(self.provides)}{blocks}.")
        if tuple(pixel_values.shape[-2:]) != self.transform.size:
            given, wanted = tuple(pixel_values.shape[-2:]), self.transform.size
            raise ZooError(f"The encoder takes images of {wanted[0]} x {wanted[1]}, got {given[0]} x {given[1]}.")
        self.prepare(need)
        if self.frame_runner is None:
            return self._encode(self.runner, pixel_values, need)
        kinds = kinds if kinds is not None else ["image"] * len(pixel_values)
        films = [i for i, kind in enumerate(kinds) if kind == "frame"]
        images = [i for i, kind in enumerate(kinds) if kind != "frame"]
        if not films or not images:
            seen = self._encode(self.frame_runner if films else self.runner, pixel_values, need)
            other = self.runner if films else self.frame_runner
            if self.training and _trains(other):  # zero gradients for the unused tower: other ranks may use it
                seen.tokens = seen.tokens + 0.0 * self._encode(other, pixel_values[:1] * 0.0, need).tokens.sum()
            return seen
        halves = [
            self._encode(runner, pixel_values[rows], need)
            for runner, rows in ((self.runner, images), (self.frame_runner, films))
        ]
        order = torch.tensor(images + films, device=pixel_values.device).argsort()
        return _in_order(halves, order)

    def _gives_block(self, word: str) -> bool:
        block = block_of(word)
        return block is not None and 1 <= block <= self.attention_blocks and base_of(word) in self.provides

    def _encode(self, runner: Runner, pixel_values: Tensor, need: frozenset[str]) -> ImageFeatures:
        """Encode rows with one tower."""
        p = runner.num_prefix
        taken, learns = Taken(need, runner.num_blocks), pixel_values.requires_grad or _trains(runner)
        # `taken` is in the pass only while the tower runs, so recomputation in backward finds none and stores nothing.
        with joined(runner.alone) as now, torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            now.taken = taken
            tokens = runner.encode(pixel_values)  # (M, P + N, D)
            now.taken = None
        asked: dict[str, Any] = {}
        scores: dict[tuple[str, int], Tensor] = {}  # by capability and block
        for block, found in taken.blocks.items():
            query, key, scale = runner.query_key(block, found)
            if "cls_attention" in found.wants:
                scores["cls_attention", block] = row(query[:, :, :1], key, scale)[:, p:]  # (M, N)
            if "key_attention" in found.wants:
                scores["key_attention", block] = column_mean(query, key, scale, runner.bias(block))[:, p:]  # (M, N)
            if "keys" in found.wants:
                asked["keys"] = key[:, :, p:].transpose(1, 2)  # (M, N, H, d)
        named: dict[str, Tensor] = {}
        for word in need:
            if (of := block_of(word)) is not None:
                named[word] = scores[base_of(word), of]
            elif word in OF_BLOCKS:
                asked[word] = scores[word, runner.num_blocks]
        asked["block_attention"] = named
        if taken.pools:
            assert runner.pooling is not None and taken.last is not None, "the hook of the last block did not fire"
            pooled, summary = runner.pooling(taken.last, runner.final_norm())
            asked |= {"pooling_attention": pooled[:, p:]} if "pooling_head" in need else {}  # (M, N)
            asked |= {"summary": summary} if "summary" in need else {}  # (M, D)
        if "next_block" in need:
            assert taken.next is not None, "the hook of the next block did not fire"
            asked["next_attention"], asked["next_keys"] = taken.next
        if "text_tower" in need:
            assert self.text is not None, "prepare read it"
            asked["patch_embeds"] = self.text.patches(tokens[:, p:])  # (M, N, P)
        if "prefix_tokens" in need:
            asked["prefix"] = tokens[:, :p]  # (M, P, D)
        return ImageFeatures(tokens[:, p:], self.grid, **asked)


def _trains(runner: Runner) -> bool:
    return any(parameter.requires_grad for parameter in runner.tower.parameters())


def _in_order(halves: Sequence[ImageFeatures], order: Tensor) -> ImageFeatures:
    """Concatenate features of two towers, and restore the order of their rows."""
    joined: dict[str, Any] = {}
    for field in fields(ImageFeatures):
        values = [getattr(half, field.name) for half in halves]
        if isinstance(values[0], dict):
            joined[field.name] = {word: torch.cat([half[word] for half in values])[order] for word in values[0]}
        else:
            joined[field.name] = torch.cat(values)[order] if isinstance(values[0], Tensor) else values[0]
    return ImageFeatures(**joined)


def on_meta() -> bool:
    """Whether modules are built on the meta device, without weights."""
    return torch.get_default_device().type == "meta"
