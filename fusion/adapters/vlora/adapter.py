"""VLoRA: an image becomes a low-rank change of some weights of the LLM, and no token.

Paper: Ma et al., arXiv:2405.20339 (Visual Perception by Large Language Model's Weights).

In each `skip`-th layer, and for each type of weight in q, k, v, o, m, a generator turns the encoder's features into a
factor A; the other factor B is an ordinary learned matrix that starts at zero. For row i, with s = alpha / rank:

    delta(x; A_i, B) = s (x A_i) B^T        A_i: (in, rank), B: (out, rank)

q, k, v: added to the outputs of the projections, ahead of rotary positions; o: to the output projection's; m: to the
output of the whole feed-forward block, from its input. The full change s B A^T is never built, except by `merge`.

We differ from the authors' code: the placeholder of an image leaves the sequence (in their code it stays as a masked
position); rows without an image get zero factors without an empty picture being encoded, and a batch without images
runs the plain LLM (their code stops); positions continue after the prompt while generating (their code repeats one);
beams and several returned sequences repeat A; several images are refused unless `max_images` allows them, and are then
read together, each but the first with an embedding of its number (their code reads the first alone); tokens that a
pruner kept are read at the positions they had; widths follow the LLM (grouped keys, fused q/k/v); the encoder can be
trained as well. Arguments of their training code default to a smaller model; the defaults here are those of their
launch scripts, with width 512: of their two scripts, with 1024 and 512, only that one gives the parameter count that
they report.

New weights start in float32, whatever the LLM has, and follow the model where it is cast; factors are cast to the
LLM's dtype.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from zoo.fusion.adapters import adapter_file
from zoo.fusion.adapters.checkpointing import detach_through_checkpoint
from zoo.fusion.adapters.routing_trace import Passes, never
from zoo.fusion.adapters.vlora.generator import WeightGenerator
from zoo.fusion.adapters.vlora.image_memory import ImageMemory, rows_of
from zoo.fusion.adapters.vlora.sites import Site, find_sites
from zoo.fusion.attach import add_to_output, refer
from zoo.registry import Adapter, ImageFeatures, ZooError, register, require_at_least
from zoo.registry.forward_pass import Pass

_TYPES = "qkvom"
Factors = Mapping[str, tuple[Tensor, Tensor]]  # type -> A (B, in, R) and s * B (out, R) of one layer


@dataclass
class VLoRAConfig:
    rank: int = 64  # of the change of each weight
    alpha: float | None = None  # the change is scaled by alpha / rank; null: the rank, so by 1
    types: str = "qkvom"  # weights that change: some of q, k, v, o and m, a path around the feed-forward block
    skip: int = 4  # every skip-th layer changes, the last of each group of `skip`
    width: int = 512  # hidden size of the generators
    depth: int = 8  # blocks of a generator
    num_heads: int = 16  # attention heads of a generator
    mlp_ratio: float = 4.0  # width of a generator's feed-forward over its width
    separate: bool = True  # a generator for each type; false: one for all, where their inputs are equally wide
    max_images: int = 1  # images (or crops, frames) of one sequence; they are read together
    # Initial std of the projection of image features. The released 0.02 is for features 1024 wide; scale it by
    # sqrt(1024 / width) for narrower ones, or positions (std 1) dominate what is added to them.
    image_std: float = 0.02

    def __post_init__(self) -> None:
        require_at_least(
            1,
            rank=self.rank,
            skip=self.skip,
            width=self.width,
            depth=self.depth,
            num_heads=self.num_heads,
            max_images=self.max_images,
        )
        if not self.types or set(self.types) - set(_TYPES) or len(set(self.types)) < len(self.types):
            raise ZooError(f"types is some of the letters {_TYPES}, each once, got {self.types!r}.")
        if self.width % self.num_heads:
            raise ZooError(f"width {self.width} is not a multiple of num_heads {self.num_heads}.")
        for name in ("mlp_ratio", "image_std"):
            if getattr(self, name) <= 0:
                raise ZooError(f"{name} must be more than 0, got {getattr(self, name)}.")


@register("adapter", "vlora")
class VLoRA(Adapter, nn.Module):
    """Computes the base model at the start: B is zero, so only B has a gradient in the first step."""

    needs: frozenset[str] = frozenset({"image"})
    concurrent = True
    losses: frozenset[str] = frozenset()
    excludes: frozenset[str] = frozenset({"image_tokens"})
    per_row = True  # weights change for a whole row, so samples with different images cannot be packed into one
    choices = {"skip": (1, 2)}  # what `zoo check` may propose

    lm: Any  # the transformers model, held outside of the module tree: its parameters belong to the LLM
    sites: list[Site]  # layers that change, and where in them

    def __init__(
        self,
        config: VLoRAConfig,
        *,
        llm: Any,
        vision_dim: int | None,
        grid: tuple[int, int] | None,
        encoder_grid: tuple[int, int] | None = None,
        own_grid: tuple[int, int] | None = None,
    ) -> None:
        """Build generators and factors for the sites of `llm`.

        Args:
            config: sizes.
            llm: language model with its base weights.
            vision_dim: width of the image features.
            grid: of the image features; None once tokens were dropped.
            encoder_grid: grid of the encoder's own tokens, if known: positions are learned on it, since a pruner's
                tokens keep their places in it.
            own_grid: the encoder's grid on images of full size, where it runs on smaller ones: positions are learned on
                it, and interpolated.
        """
        super().__init__()
        places = encoder_grid or grid
        if vision_dim is None or places is None:
            raise ZooError("adapter 'vlora' turns image features into weights, but the slot vision is empty.")
        self.config = config
        refer(self, lm=llm.lm, sites=find_sites(llm, config.types, config.skip, "adapter 'vlora'"))
        self.memory = ImageMemory(
            vision_dim, places, config.width, config.max_images, config.image_std, learned_on=own_grid
        )
        self.generators = self._make_generators()
        self.b = nn.ParameterDict(
            {
                t: nn.Parameter(torch.zeros(len(self.sites), self.sites[0].widths[t][1], config.rank))
                for t in config.types
            }
        )
        self.passes = Passes(llm, never, "vlora")
        self._undo: list[Callable[[], None]] = []
        self._blocks: list[tuple[Any, int]] = []  # feed-forward blocks, and the id of our hook that must run last
        self._merged: list[Callable[[], None]] = []

    def _make_generators(self) -> nn.ModuleDict:
        config, count = self.config, len(self.sites)
        sizes = {t: self.sites[0].widths[t][0] * config.rank for t in config.types}
        shape = (config.width, config.depth, config.num_heads, config.mlp_ratio)
        if config.separate:
            return nn.ModuleDict({t: WeightGenerator(count, *shape, size) for t, size in sizes.items()})
        if len(set(sizes.values())) > 1:
            widths = ", ".join(f"{t} {size // config.rank}" for t, size in sizes.items())
            raise ZooError(f"adapter 'vlora': one generator needs inputs of one width, got {widths}: separate=true.")
        return nn.ModuleDict({"all": WeightGenerator(count * len(sizes), *shape, next(iter(sizes.values())))})

    # ---- in and out of the LLM -----------------------------------------------------------------------------------

    def attach(self) -> None:
        """Register hooks on the layers that change; the module tree and weights stay as they are."""
        if self._undo:
            return
        self._undo = self.passes.attach()
        for number, site in enumerate(self.sites):
            layer = self.lm.get_submodule(site.layer)
            handles = [
                layer.register_forward_pre_hook(partial(self._enter, number)),
                *self._hook(number, site),
            ]
            self._undo += [handle.remove for handle in handles]

    def _hook(self, number: int, site: Site) -> Iterator[RemovableHandle]:
        for name, types in site.linears:
            if types != "m":
                yield add_to_output(self.lm, name, partial(self._delta, number, types))
                continue
            block = self.lm.get_submodule(name)
            # Our pre-hook first, our hook last: adapters between them (MoLE sorts tokens by expert) reorder the rows,
            # and m is a path around all of that.
            yield block.register_forward_pre_hook(partial(self._before_block, number), prepend=True)
            last = block.register_forward_hook(partial(self._behind_block, number))
            self._blocks.append((block, last.id))
            yield last

    def detach(self) -> None:
        """Remove the hooks; the language model computes what it did before, bit for bit."""
        self.unmerge()
        for undo in self._undo:
            undo()
        self._undo, self._blocks, self.passes.alone = [], [], Pass()

    def owns(self, name: str) -> bool:
        """False for every parameter of the language model: all weights are this module's own."""
        return False

    def aux_losses(self) -> dict[str, Tensor]:
        """Return an empty dict: there is no auxiliary loss."""
        return {}

    def save(self, folder: str | Path) -> None:
        """Write this adapter's weights with its options."""
        adapter_file.write(folder, "vlora", self.config, self.state_dict())

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote; the options must be those of this adapter."""
        same = [f.name for f in fields(self.config) if f.name != "image_std"]
        self.load_state_dict(adapter_file.read(folder, "vlora", self.config, same, self.state_dict()))

    # ---- image -> factors ----------------------------------------------------------------------------------------

    def condition(self, image: ImageFeatures | None, images_per_row: Sequence[int], expand: int = 1) -> None:
        """Turn the features into factors, once for a forward pass or a whole generation.

        The current pass keeps them. Outside of a pass they serve direct calls of the language model, and `merge`.

        Args:
            image: tokens (M, N, D), images in the order of the rows; None: no image.
            images_per_row: number of images of each row.
            expand: copies of each row in the LLM's batch, side by side.

        Raises:
            ZooError: a row has more images than `max_images`, or the features are of another grid.
        """
        rows = [] if image is None else rows_of(image, images_per_row, self.config.max_images, "vlora")
        if self._merged:
            if rows:
                raise ZooError("adapter 'vlora' is merged for one image: call unmerge() before showing another.")
            return
        made = self._made(image, rows, len(images_per_row) * expand, expand) if self._undo else None
        self.passes.condition = made

    def _made(self, image: ImageFeatures | None, rows: Any, count: int, expand: int) -> list[Factors] | None:
        """Compute the factors of each site; None: the LLM runs unchanged."""
        for block, last in self._blocks:  # hooks registered since ours must not run behind it
            if next(reversed(block._forward_hooks)) != last:
                block._forward_hooks.move_to_end(last)
        if image is not None and rows:
            return self._factors(*self.memory(image, rows, expand))
        return self._factors(*self.memory.nothing(count)) if self._must_run() else None

    @property
    def _given(self) -> list[Factors] | None:
        """Factors of each site in the current pass; None: the LLM runs unchanged."""
        return self.passes.alone.conditions.get("vlora") if self._merged else self.passes.condition

    def _must_run(self) -> bool:
        """Whether a batch of text must run the generators: data parallelism waits for their gradients on each rank."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        return trains and several and torch.distributed.get_world_size() > 1

    def _factors(self, memories: list[Tensor], place: Tensor | None) -> list[Factors]:
        """Generate A, and scale B, for each site.

        Args:
            memories: (G, S, W), one tensor for each number of images per row.
            place: (B,) index of each row in the concatenated memories, one past the last for rows without images;
                None: in order.
        """
        parts = [self._generate(memory) for memory in memories]  # each: type -> (G, sites, in, R)
        autocast = torch.is_autocast_enabled(memories[0].device.type)
        made: dict[str, tuple[Tensor, Tensor]] = {}
        for t in self.config.types:
            a = parts[0][t] if len(parts) == 1 else torch.cat([p[t] for p in parts])
            if place is not None:
                # Rows without an image index the appended zeros: their change is exactly zero.
                a = torch.cat([a, torch.zeros_like(a[:1])])[place]  # (B, sites, in, R)
            # The scale is applied to B, which is the same for all rows and smaller than A.
            b = self.b[t] * self.scale if self.scale != 1 else self.b[t]
            made[t] = (a, b) if autocast else (a.to(self.lm.dtype), b.to(self.lm.dtype))
        return [{t: (a[:, i], b[i]) for t, (a, b) in made.items()} for i in range(len(self.sites))]

    def _generate(self, memory: Tensor) -> dict[str, Tensor]:
        """Turn memory (G, S, W) into the factor A of each type, (G, sites, in, R)."""
        types, rank = self.config.types, self.config.rank
        if self.config.separate:
            return {t: self.generators[t](memory).unflatten(-1, (-1, rank)) for t in types}
        whole = self.generators["all"](memory).unflatten(-1, (-1, rank))  # (G, types * sites, in, R)
        return dict(zip(types, whole.chunk(len(types), dim=1), strict=True))

    @property
    def scale(self) -> float:
        """The factor s = alpha / rank."""
        return 1.0 if self.config.alpha is None else self.config.alpha / self.config.rank

    # ---- inside a forward pass -----------------------------------------------------------------------------------

    def _enter(self, number: int, layer: Any, args: tuple[Any, ...]) -> Any:
        """Give a layer under reentrant checkpointing detached copies of its factors (a forward pre-hook).

        The hook runs outside of the checkpointed function, so the originals' graph is not traversed by the layer's
        nested backward; `detach_through_checkpoint` passes the copies' gradients on to them afterwards.
        """
        if torch.compiler.is_compiling() or not (layer.training and getattr(layer, "gradient_checkpointing", False)):
            return None
        options = getattr(layer._gradient_checkpointing_func, "keywords", {})
        if not torch.is_grad_enabled() or not options.get("use_reentrant") or (given := self._given) is None:
            return None
        factors = given[number]
        notes = self.passes.now.notes
        hidden, copies = detach_through_checkpoint(args[0], [tensor for pair in factors.values() for tensor in pair])
        notes[f"vlora.{number}"] = dict(zip(factors, zip(copies[::2], copies[1::2], strict=True), strict=True))
        return hidden, *args[1:]

    def _factors_of(self, number: int) -> Factors | None:
        """Return the factors of the layer that runs, detached copies if `_enter` made some."""
        now = self.passes.now
        if (copies := now.notes.get(f"vlora.{number}")) is not None:
            return copies
        given = (self.passes.alone if self._merged else now).conditions.get("vlora")
        return None if given is None else given[number]

    def _before_block(self, number: int, block: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep a block's input in the order of the tokens, before hooks of other adapters sort it by expert."""
        self.passes.now.notes[f"vlora.{number}.input"] = args[0]

    def _behind_block(self, number: int, block: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        extra = self._delta(number, "m", self.passes.now.notes.pop(f"vlora.{number}.input"))
        return out if extra is None else out + extra

    def _delta(self, number: int, types: str, x: Tensor) -> Tensor | None:
        """Compute what is added to an output; several types belong to a fused linear layer, side by side."""
        factors = self._factors_of(number)
        if factors is None:
            return None
        terms = []
        for t in types:
            if t not in factors:  # a part of a fused q/k/v layer without a change
                terms.append(x.new_zeros(*x.shape[:-1], self.sites[number].widths[t][1]))
                continue
            a, b = factors[t]
            if a.shape[0] != x.shape[0] and not self._merged:
                raise ZooError(
                    f"The LLM runs {x.shape[0]} rows, but adapter 'vlora' took the images of {a.shape[0]}: call "
                    f"condition with the rows of this pass."
                )
            # Two thin products, (B, T, in) @ (B, in, R) and R to out: B A^T would be (B, out, in), a matrix per row.
            terms.append(F.linear(x @ a, b))  # (B, T, out)
        return terms[0] if len(terms) == 1 else torch.cat(terms, dim=-1)

    # ---- merging -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, row: int = 0) -> None:
        """Add one image's changes to the weights of q, k, v and o, for many questions about that image.

        The path of m bypasses a nonlinear block, so it cannot be merged and stays a separate term. `unmerge` (and
        `detach`) restore the original weights.

        Args:
            row: of the last `condition`.

        Raises:
            ZooError: `condition` was not called, there is nothing to merge, or weights are not plain matrices
                (quantised).
        """
        if self.config.types == "m":
            raise ZooError(
                "adapter 'vlora' with types=m has nothing to merge: no weight of the block can hold its path."
            )
        given = self._given
        if not self._undo or given is None:
            raise ZooError("adapter 'vlora' has no image to merge: attach it, and call condition with one, first.")
        if self._merged:
            raise ZooError("adapter 'vlora' is merged already: call unmerge() first.")
        left: list[Factors] = []
        for site, factors in zip(self.sites, given, strict=True):
            for name, types in site.linears:
                if types != "m":
                    self._merged.append(_add_to_weight(self.lm, name, site.change(types, factors, row)))
            # A batch of one row, which broadcasts over the rows of later passes.
            left.append({t: (a[row : row + 1], b) for t, (a, b) in factors.items() if t == "m"})
        self.passes.alone.conditions["vlora"] = left if "m" in self.config.types else None

    @property
    def merged(self) -> bool:  # type: ignore[override]
        """Whether the language model holds the changes of one image."""
        return bool(self._merged)

    def unmerge(self) -> None:
        """Restore the base weights that `merge` replaced; `condition` must be called again."""
        if self._merged:
            self.passes.alone = Pass()
        for undo in reversed(self._merged):
            undo()
        self._merged = []


def _add_to_weight(lm: nn.Module, name: str, change: Tensor) -> Callable[[], None]:
    """Replace the weight of a linear layer by its sum with `change`; returns a function that restores the old one.

    The old parameter object is kept, so restoring is exact: subtracting the change would round.
    """
    linear: Any = lm.get_submodule(name)
    while hasattr(linear, "base_layer"):  # PEFT's
        linear = linear.base_layer
    old = linear.weight
    if not old.is_floating_point() or old.shape != change.shape:
        raise ZooError(f"adapter 'vlora' cannot merge into {name!r}: its weight is {old.dtype} {tuple(old.shape)}.")
    linear.weight = nn.Parameter((old.double() + change).to(old.dtype), requires_grad=old.requires_grad)

    return partial(setattr, linear, "weight", old)
