"""Whether parts give as many tokens as they say, tried on two unlike images before a weight is read.

The processor writes as many placeholders as the parts' `num_tokens` say; a part that contradicts itself would be found
out by the first batch. Encoders, projectors and language models run on the meta device, where they have no weights to
read; towers of `zoo.vision` and language models that have a checkpoint are left out, since their sizes were run before.
Pruners look at what an image shows, so they run on made-up features: an even image, and one in which no two patches are
alike. A part that cannot be run so is left to the first batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.composed.assembly import Parts
from zoo.registry import Cut, Encoder, ImageFeatures, Layout, ZooError
from zoo.vision.encoders.base import Tower

_SMALL = 20_000_000  # parameters of a part that is built in full where it does not run on the meta device
_HEADS, _KEY = 2, 8  # of the keys that features come with


def check_counts(parts: Parts, slots: Mapping[str, Any]) -> None:
    """Run encoder, pruners, projector and layout, and compare the tokens that come out with those announced.

    Args:
        parts: on the meta device, as `zoo.composed.assembly.assemble` gives them.
        slots: that they were made of.

    Raises:
        ZooError: a part gives other counts, widths or grids than it says; the message names it.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        if not slots["llm"].get("checkpoint"):
            _check_llm(slots["llm"], parts.llm)
        if parts.vision is None:
            return
        _check_vision(parts.vision, parts.requested, slots["vision"])
        images = [_features(parts.vision, parts.requested, even) for even in (True, False)]
        given: dict[str, Any] = {"vision_dim": parts.vision.hidden_size}
        for name, pruner in parts.pruner.items():
            given |= {"grid": images[0].grid, "num_tokens": images[0].tokens.shape[1]}
            after = _check_pruner(name, pruner, {**slots["pruner"][name], "name": name}, images, given, parts)
            if after is None:
                return  # what follows would be given what nobody knows
            images = after
        if parts.projector is not None:
            given |= {"grid": images[0].grid, "num_tokens": images[0].tokens.shape[1]}
            _check_projector(parts, slots["projector"], images, given)
        if parts.layout is not None:
            _check_layout(parts.layout, parts.vision.transform.size, slots["layout"])


def _check_vision(vision: Encoder, requested: frozenset[str], node: Mapping[str, Any]) -> None:
    """Compare the encoder's tokens with `num_tokens`, `grid` and `hidden_size`."""
    name, size = f"vision {node['name']!r}", vision.transform.size
    pixels = torch.stack([torch.zeros(3, *size), torch.rand(3, *size)])  # (2, 3, S, S)
    alone: Any = vision
    if isinstance(vision, Tower):  # blocks are alike, and what an image shows does not matter
        if node.get("checkpoint") or node.get("model"):
            return
        node, pixels = {**node, "depth": min(1, node.get("depth", 1)), "layer": -1}, pixels[:1]
        with torch.device("meta"):
            alone = registry.build("vision", node)

    def run(part: Any, device: str) -> list[ImageFeatures]:
        part.eval()
        return [part(p[None].to(device), need=requested) for p in pixels]

    found = _tried(run, alone, lambda: registry.build("vision", node), name, node)
    for image in found or ():
        _compare(name, image.tokens, vision.num_tokens, vision.hidden_size, "num_tokens")
        if image.grid is not None and tuple(image.grid) != tuple(vision.grid):
            raise ZooError(f"{name} says grid {list(vision.grid)}, and gives tokens on {list(image.grid)}.")


def _check_llm(node: Mapping[str, Any], llm: Any) -> None:
    """Run a language model of given sizes on a few embeddings: rotary positions want even heads, for one.

    One of its layers shows that, two where the second is of another kind; all of them run where those do not, as in
    families whose later layers differ.
    """
    name = f"llm {node['name']!r}" + (f" of type {node['model_type']!r}" if node.get("model_type") else "")

    def run(part: Any, device: str) -> Tensor:
        part.eval()
        embeds = torch.zeros(1, 4, llm.hidden_size, device=device)
        places = torch.arange(4, device=device)[None]
        # On the meta device transformers cannot look for packed sequences in the positions; beside a mask it does not.
        mask = {"attention_mask": torch.zeros(1, 1, 4, 4, device=device)} if device == "meta" else {}
        return part.hidden(inputs_embeds=embeds, position_ids=places, **mask).last_hidden_state

    first = 1 if llm.num_layers < 2 or _begins_alike(llm) else 2
    for layers in sorted({first, llm.num_layers}):
        made = partial(registry.build, "llm", {**node, "num_layers": layers}, vocab_size=llm.vocab_size)
        try:
            with torch.device("meta"):
                alone = made()  # the one of the parts has adapters, which wait for images
            _tried(run, alone, made, name, node)
        except ZooError:
            if layers == llm.num_layers:
                raise
        else:
            return


def _begins_alike(llm: Any) -> bool:
    """Whether the first two layers compute the same with other weights: equal classes, sizes and plain attributes."""

    def said(layer: nn.Module) -> list[Any]:
        return [
            (
                path,
                type(part),
                {key: value for key, value in vars(part).items() if key != "layer_idx" and _is_simple(value)},
                {key: t.shape for key, t in (*part._parameters.items(), *part._buffers.items()) if t is not None},
            )
            for path, part in layer.named_modules()
        ]

    try:
        first, second = llm.layers[:2]
    except ZooError:  # its layers are not one list
        return False
    return said(first) == said(second)


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_simple, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _features(vision: Encoder, requested: frozenset[str], even: bool) -> ImageFeatures:
    """Features as the encoder would give them: of an image that is the same everywhere, or nowhere."""
    n, d = vision.num_tokens, vision.hidden_size

    def made(*shape: int) -> Tensor:
        return torch.ones(1, *shape) if even else torch.randn(1, *shape)

    score = made(n).softmax(1)
    asked: dict[str, Tensor] = {
        "cls_attention": score,
        "key_attention": score,
        "pooling_attention": score,
        "keys": made(n, _HEADS, _KEY),
        "prefix": made(1, d),
    }
    words = {"pooling_attention": "pooling_head", "prefix": "prefix_tokens"}
    known: dict[str, Any] = {name: value for name, value in asked.items() if words.get(name, name) in requested}
    return ImageFeatures(made(n, d), (vision.grid[0], vision.grid[1]), **known)


def _check_pruner(
    key: str, pruner: Any, node: Mapping[str, Any], images: list[ImageFeatures], given: dict[str, Any], parts: Parts
) -> list[ImageFeatures] | None:
    """Run a pruner on each image by itself; returns what it leaves of them, None where it cannot be run here."""
    name, n = f"pruner {key!r}", images[0].tokens.shape[1]
    step = next(s for s in parts.steps if s.kind == "pruner" and s.name == key)

    def run(part: Any, device: str) -> list[ImageFeatures]:
        part.eval() if isinstance(part, nn.Module) else None
        return [part(image) for image in images]

    if isinstance(pruner, nn.Module) and any(True for _ in (*pruner.parameters(), *pruner.buffers())):
        found = _built(run, lambda: registry.build("pruner", node, **given), name, pruner)
    else:
        found = _run(run, pruner, name)
    for given_back in found or ():
        if not isinstance(given_back, ImageFeatures):
            raise ZooError(
                f"{name} gives {_named_type(given_back)}, and has to give ImageFeatures: `image.take(keep)` keeps "
                "tokens, `dataclasses.replace(image, tokens=...)` changes them."
            )
    counts = [image.tokens.shape[1] for image in found or ()]
    if len(set(counts)) > 1:
        raise ZooError(
            f"{name} leaves {counts[0]} tokens of one image and {counts[1]} of another, of {n} each; every image has "
            f"the same number of placeholders, and its num_tokens({n}) says {step.tokens}."
        )
    for image in found or ():
        _compare(name, image.tokens, step.tokens, step.width, f"num_tokens({n})")
        if step.grid is not None and (image.grid is None or tuple(image.grid) != tuple(step.grid)):
            left = "no grid" if image.grid is None else f"a grid {list(image.grid)}"
            raise ZooError(f"{name} leaves {left}, and does not say that it destroys the grid {list(step.grid)}.")
    return found


def _check_projector(parts: Parts, node: Mapping[str, Any], images: list[ImageFeatures], given: dict[str, Any]) -> None:
    name, n = f"projector {node['name']!r}", images[0].tokens.shape[1]
    step = next(s for s in parts.steps if s.kind == "projector")

    def run(part: Any, device: str) -> list[Tensor]:
        part.eval()
        return [part(_on(image, device)) for image in images]

    given = {**given, "text_dim": step.width}
    found = _tried(run, parts.projector, lambda: registry.build("projector", node, **given), name, node)
    for tokens in found or ():
        if not isinstance(tokens, Tensor):
            raise ZooError(f"{name} gives {_named_type(tokens)}, and has to give a Tensor (M, K, {step.width}).")
        _compare(name, tokens, step.tokens, step.width, f"num_tokens({n})")


def _check_layout(layout: Layout, size: tuple[int, int], node: Mapping[str, Any]) -> None:
    """Lay out two images of one row each, and compare with what `count` says of them."""
    name = f"layout {node['name']!r}"
    rows = layout.given.get("num_tokens")
    if rows is None:
        return
    cuts = [Cut(size=size)] * 2

    def run(part: Any, device: str) -> Tensor:
        return part(torch.randn(2, rows, _KEY), cuts)  # (S, C)

    small = {"text_dim": _KEY, **layout.given}
    laid = _built(run, lambda: registry.build("layout", node, **small), name, layout)
    if laid is not None and laid.shape[0] != (said := sum(layout.count(cut) for cut in cuts)):
        raise ZooError(f"{name} gives {laid.shape[0]} tokens for two images, and its count says {said}.")


# ---- running ---------------------------------------------------------------------------------------------------------


def _tried(
    run: Callable[[Any, str], Any], part: Any, build: Callable[[], Any], name: str, node: Mapping[str, Any]
) -> Any:
    """Run a part on the meta device; where it does not run there, run a small one that is built anew."""
    try:
        return run(part, "meta")
    except Exception:  # much can fail without data: what it is, shows where there is some
        return None if node.get("checkpoint") else _built(run, build, name, part)


def _built(run: Callable[[Any, str], Any], build: Callable[[], Any], name: str, part: Any) -> Any:
    """Build a small part with random weights and run it; None of a large one."""
    if sum(p.numel() for p in part.parameters()) > _SMALL:
        return None
    return _run(run, build(), name)


def _run(run: Callable[[Any, str], Any], part: Any, name: str) -> Any:
    try:
        return run(part, "cpu")
    except ZooError as error:
        raise ZooError(f"{name} does not run: {error}") from error
    except Exception as error:
        said = " ".join(str(error).split())
        raise ZooError(f"{name} fails when it is run, with {type(error).__name__}: {said}") from error


def _on(image: ImageFeatures, device: str) -> ImageFeatures:
    moved: dict[str, Any] = {k: v.to(device) for k, v in vars(image).items() if isinstance(v, Tensor)}
    return replace(image, **moved)


def _named_type(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _compare(name: str, tokens: Tensor, count: int, width: int, where: str) -> None:
    if tokens.ndim != 3:
        raise ZooError(f"{name} gives tokens of the shape {list(tokens.shape)}, and has to give (M, K, {width}).")
    if tokens.shape[1] != count:
        raise ZooError(f"{name} gives {tokens.shape[1]} tokens of an image, and its {where} says {count}.")
    if tokens.shape[2] != width:
        raise ZooError(f"{name} gives tokens {tokens.shape[2]} wide, where {width} are expected.")
