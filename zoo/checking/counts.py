"""Whether parts return as many tokens as their `num_tokens`, tried on two different images before a weight is read.

The processor writes `num_tokens` placeholders; without this check a part that returns another number would fail at the
first batch. Encoders, projectors and language models run on the meta device, without weights; towers of `zoo.vision`
and language models with a checkpoint are skipped, since their sizes are known to work. What pruners keep depends on the
image, so they run on synthetic features: of a uniform image, and of one whose patches are all different; one with an
empty question, one with words. A part that cannot be run so is left to the first batch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.composed import behind
from zoo.composed.assembly import Parts
from zoo.composed.positions import decided
from zoo.registry import Cut, Encoder, ImageFeatures, Layout, Question, UnlikeRows, ZooError
from zoo.vision.encoders.base import Tower
from zoo.vision.encoders.map_runner import MapRunner

_SMALL = 20_000_000  # parameters of a part that is built in full where it does not run on the meta device
_HEADS, _KEY = 2, 8  # sizes of the synthetic keys
_SHAPE = (4, 6)  # tokens of an image, where images keep their shapes
_WORDS = 3  # tokens of the synthetic question


def check_counts(parts: Parts, slots: Mapping[str, Any], positions: str = "auto") -> None:
    """Run encoder, pruners, projector and layout, and compare their outputs with the declared counts.

    Args:
        parts: on the meta device, from `zoo.composed.assembly.assemble`.
        slots: that they were built from.
        positions: kept, dense or auto; where they are kept, pruners must say which tokens they left.

    Raises:
        ZooError: a part returns other counts, widths or grids than it declares; the message names it.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # a check must not move the seed of a run
        torch.manual_seed(0)
        if not slots["llm"].get("checkpoint"):
            _check_llm(slots["llm"], parts.llm)
        if parts.vision is None:
            return
        _check_vision(parts.vision, parts.requested, slots["vision"])
        images = [_features(parts.vision, parts.requested, even) for even in (True, False)]
        given: dict[str, Any] = {"vision_dim": parts.vision.hidden_size, "vision_depth": parts.vision.depth}
        ahead = {name: p for name, p in parts.pruner.items() if not p.behind}
        for name, pruner in ahead.items():
            images = [_about(parts, image, even) for image, even in zip(images, (True, False), strict=True)]
            given |= {"grid": images[0].grid, "num_tokens": images[0].tokens.shape[1]}
            after = _check_pruner(name, pruner, {**slots["pruner"][name], "name": name}, images, given, parts)
            if after is None:
                return  # the input of later parts is not known
            images = after
        if (unpruned := decided(parts, slots, positions).unpruned) is not None:
            images = [unpruned.placed(image) for image in images]
        if parts.projector is not None:
            given |= {"grid": images[0].grid, "num_tokens": images[0].tokens.shape[1]}
            _check_projector(parts, slots["projector"], images, given)
            _check_behind(parts, slots["pruner"], images[0])
        if parts.layout is not None and parts.layout.native:
            _check_native_layout(parts.layout, slots["layout"])
        elif parts.layout is not None:
            _check_layout(parts.layout, parts.vision.transform.size, slots["layout"])


def _check_vision(vision: Encoder, requested: frozenset[str], node: Mapping[str, Any], name: str = "") -> None:
    """Compare the encoder's tokens with `num_tokens`, `grid` and `hidden_size`."""
    if vision.native:
        _check_native_vision(vision, requested, node)
        return
    for member, encoder in vision.members.items():  # each by itself: what joins them is known to work
        needed = frozenset(word for word in requested if word in encoder.provides)
        _check_vision(encoder, needed, node["encoders"][member], f"encoder {member!r} of vision {node['name']!r}")
    if vision.members:
        return
    name, shape = name or f"vision {node['name']!r}", vision.transform.shape
    pixels = torch.stack([torch.zeros(shape), torch.rand(shape)])  # (2, 3, S, S)
    alone: Any = vision

    def built() -> Any:
        part = registry.build("vision", node)
        if vision.own_size != vision.transform.size:
            part.resize((vision.grid[0], vision.grid[1]))
        return part

    if isinstance(tower := vision, Tower):  # one block and one image show the shapes: all blocks have them
        if node.get("checkpoint") or node.get("model") or isinstance(tower.runner, MapRunner):
            return
        # Not those of further blocks, nor of a text tower: its weights would be read.
        requested = frozenset(w for w in requested if "@" not in w and w not in ("text_tower", "next_block"))
        node, pixels = {**node, "depth": min(1, node.get("depth", 1)), "layer": -1, "next_block": False}, pixels[:1]
        with torch.device("meta"):
            alone = built()

    def run(part: Any, device: str) -> list[ImageFeatures]:
        part.eval()
        return [part(p[None].to(device), need=requested) for p in pixels]

    found = _tried(run, alone, built, name, node)
    for image in found or ():
        _compare(name, image.tokens, vision.num_tokens, vision.hidden_size, "num_tokens")
        if image.grid is not None and tuple(image.grid) != tuple(vision.grid):
            raise ZooError(f"{name} declares grid {list(vision.grid)}, and returns tokens on {list(image.grid)}.")


def _check_native_vision(vision: Encoder, requested: frozenset[str], node: Mapping[str, Any]) -> None:
    """Encode three images of two grids, and compare with these."""
    name, grids = f"vision {node['name']!r}", [(1, 2), (2, 2), (1, 2)]
    (unit, width), tokens = vision.patch_shape, sum(h * w for h, w in grids)

    def run(part: Any, device: str) -> UnlikeRows:
        part.eval()
        return part(torch.zeros(tokens * unit, width, device=device), need=requested, grids=grids)

    found = _tried(run, vision, lambda: registry.build("vision", node), name, node)
    if found is None:
        return
    if not isinstance(found, UnlikeRows):
        raise ZooError(f"{name} is native and gives {_named_type(found)}; it has to give UnlikeRows.")
    for group, members in zip(found.groups, found.members, strict=True):
        h, w = grids[members[0]]
        _compare(name, group.tokens, h * w, vision.hidden_size, f"grid {h} x {w}")
        if len(group.deep) != vision.deep:
            raise ZooError(f"{name} declares deep={vision.deep}, and gives {len(group.deep)} further maps.")


def _check_llm(node: Mapping[str, Any], llm: Any) -> None:
    """Run a language model of given sizes on a few embeddings: rotary positions need an even head size, for example.

    One layer suffices, two where the second is of another kind; all of them run where those fail, as in families whose
    later layers differ.
    """
    name = f"llm {node['name']!r}" + (f" of type {node['model_type']!r}" if node.get("model_type") else "")

    def run(part: Any, device: str) -> Tensor:
        part.eval()
        embeds = torch.zeros(1, 4, llm.hidden_size, device=device)
        places = torch.arange(4, device=device)[None]
        # transformers searches positions for packed sequences, which needs data, unless a mask is given.
        mask = {"attention_mask": torch.zeros(1, 1, 4, 4, device=device)} if device == "meta" else {}
        return part.hidden(inputs_embeds=embeds, position_ids=places, **mask).last_hidden_state

    first = 1 if llm.num_layers < 2 or _begins_alike(llm) else 2
    sized = "num_layers" in {f.name for f in fields(registry.config_of("llm", node)[0].config)}  # else of one depth
    for layers in sorted({first, llm.num_layers}) if sized else [llm.num_layers]:
        fewer = {"num_layers": layers} if sized else {}
        made = partial(registry.build, "llm", {**node, **fewer}, vocab_size=llm.vocab_size)
        try:
            with torch.device("meta"):
                alone = made()  # anew: `llm` has adapters attached, which need images
            _tried(run, alone, made, name, node)
        except ZooError:
            if layers == llm.num_layers:
                raise
        else:
            return


def _begins_alike(llm: Any) -> bool:
    """Whether the first two layers compute the same with other weights: equal classes, sizes and plain attributes."""

    def described(layer: nn.Module) -> list[Any]:
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
    return described(first) == described(second)


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_simple, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _features(vision: Encoder, requested: frozenset[str], even: bool) -> ImageFeatures:
    """Make synthetic features of the encoder's sizes: `even`, with all patches equal, or else all different."""
    grid = _SHAPE if vision.native else (vision.grid[0], vision.grid[1])
    n, d = grid[0] * grid[1], vision.hidden_size

    def made(*shape: int) -> Tensor:
        return torch.ones(1, *shape) if even else torch.randn(1, *shape)

    score = made(n).softmax(1)
    asked: dict[str, Tensor] = {
        "cls_attention": score,
        "key_attention": score,
        "pooling_attention": score,
        "keys": made(n, _HEADS, _KEY),
        "prefix": made(1, d),
        "summary": made(d),
        "patch_embeds": made(n, _KEY),
        "next_attention": score,
        "next_keys": made(n, _KEY),
    }
    words = {"pooling_attention": "pooling_head", "prefix": "prefix_tokens", "patch_embeds": "text_tower"}
    words |= {"next_attention": "next_block", "next_keys": "next_block"}
    known: dict[str, Any] = {name: value for name, value in asked.items() if words.get(name, name) in requested}
    known["block_attention"] = {word: score for word in requested if "@" in word}
    deep = tuple(made(n, d) for _ in range(vision.deep))
    known_grid = grid if vision.native else vision.token_grid
    return ImageFeatures(made(n, d), known_grid, **known, deep=deep)


def _about(parts: Parts, image: ImageFeatures, even: bool) -> ImageFeatures:
    """Add what pruners may need beside the encoder's features: a question, empty or of words, and projected tokens."""
    needed = frozenset().union(*(s.needs for s in parts.steps))
    m, n, width = *image.tokens.shape[:2], parts.llm.hidden_size
    if "projected" in needed:
        image = replace(image, projected=(torch.ones if even else torch.randn)(m, n, width))
    if "question" not in needed:
        return image
    words = 0 if even else _WORDS
    asked = Question(torch.zeros(m, dtype=torch.long), texts=("" if even else "what is it?",) * m)
    asked.ids, asked.mask = torch.zeros(m, words, dtype=torch.long), torch.ones(m, words, dtype=torch.bool)
    asked.embeds = torch.randn(1, words, width).expand(m, -1, -1)
    if "text_tower" in parts.requested:
        asked.text_embeds, asked.text_mask = torch.randn(1, 1, _KEY).expand(m, -1, -1), asked.mask.new_ones(m, 1)
    return replace(image, question=asked)


def _check_pruner(
    key: str, pruner: Any, node: Mapping[str, Any], images: list[ImageFeatures], given: dict[str, Any], parts: Parts
) -> list[ImageFeatures] | None:
    """Run a pruner on each image by itself; returns the features kept, None where it cannot be run here."""
    name, n = f"pruner {key!r}", images[0].tokens.shape[1]
    step = next(s for s in parts.steps if s.kind == "pruner" and s.name == key)

    def run(part: Any, device: str) -> list[ImageFeatures]:
        part.eval() if isinstance(part, nn.Module) else None
        return [behind.run(part, image) for image in images]

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
            f"{name} keeps {counts[0]} tokens of one image and {counts[1]} of another, of {n} each; every image has "
            f"the same number of placeholders, and its num_tokens({n}) is {pruner.num_tokens(n)}."
        )
    native = parts.vision is not None and parts.vision.native
    for shown, image in zip(images, found or (), strict=False):
        pooled = pruner.grid_of(shown.grid) if native and shown.grid is not None else None
        if pooled is not None:
            _compare(name, image.tokens, math.prod(pooled), step.width, f"grid_of({shown.grid})")
        else:
            _compare(name, image.tokens, pruner.num_tokens(n), step.width, f"num_tokens({n})")
        if any(other.shape[:2] != image.tokens.shape[:2] for other in image.deep):
            raise ZooError(
                f"{name} leaves features for further layers of the LLM behind: `image.take(keep)` and "
                "`image.made(change)` change these with the tokens."
            )
        if step.grid is not None and (image.grid is None or tuple(image.grid) != tuple(step.grid)):
            kept = "no grid" if image.grid is None else f"a grid {list(image.grid)}"
            raise ZooError(f"{name} returns {kept}, and does not declare that it destroys the grid {list(step.grid)}.")
        if image.valid is not shown.valid:  # else they are marks of a pruner ahead, handed on
            _check_valid(name, pruner, image, n)
    return found


def _check_valid(name: str, pruner: Any, kept: ImageFeatures, n: int) -> None:
    """Compare the tokens that a pruner marked with what it declares for an image, or a video, of `n` tokens a row."""
    if kept.valid is None:
        return
    cut = kept.cuts[0] if kept.cuts else Cut()
    if not (pruner.ragged or pruner.behind):
        raise ZooError(f"{name} marks tokens in `valid`, and does not declare that rows are ragged (ragged=True).")
    if kept.valid.shape != kept.tokens.shape[:2] or kept.valid.dtype != torch.bool:
        what = f"{str(kept.valid.dtype).removeprefix('torch.')} {list(kept.valid.shape)}"
        raise ZooError(f"{name} gives `valid` as {what}, and has to give bool {list(kept.tokens.shape[:2])}.")
    if (found := int(kept.valid.sum())) > (most := pruner.tokens_of_image(n, cut)):
        what = "an image" if cut.rows == 1 else f"a video of {cut.rows} frames"
        raise ZooError(f"{name} keeps {found} tokens of {what}, and its tokens_of_image({n}, cut) is {most}.")


def _check_behind(parts: Parts, nodes: Mapping[str, Any], ahead: ImageFeatures) -> None:
    """Run the pruners behind the projector on two images and on a video, of tokens of the LLM's width.

    Args:
        parts: of the model.
        nodes: of the pruners, by name.
        ahead: what reaches the projector, the shape of a row where images keep theirs.
    """
    assert parts.vision is not None, "there is a projector"
    steps = {s.name: s for s in parts.steps if s.kind == "pruner"}
    for key, pruner in parts.pruner.items():
        if not pruner.behind:
            continue
        name, n, width = f"pruner {key!r}", steps[key].tokens, steps[key].width
        grid = parts.projected_grid
        if parts.vision.native:
            n, grid = ahead.tokens.shape[1], ahead.grid
        shown: list[ImageFeatures] = []
        for even, cut in ((True, Cut()), (False, Cut()), (False, Cut(rows=4, kind="frame"))):
            rows = ImageFeatures.joined([_features(parts.vision, parts.requested, even) for _ in range(cut.rows)])
            rows = behind.rescored(rows, grid, n)
            tokens = (torch.ones if even else torch.randn)(cut.rows, n, width)
            about: dict[str, Any] = {"rows": (cut.rows,), "cuts": (cut,), "row_kind": cut.kind}
            rows = replace(rows, tokens=tokens, grid=grid, **about)
            shown.append(_about(parts, rows, even))
        sizes = {"vision_dim": width, "vision_depth": parts.vision.depth, "num_tokens": n, "grid": grid}

        def run(part: Any, device: str, shown: list[ImageFeatures] = shown) -> list[ImageFeatures]:
            part.eval() if isinstance(part, nn.Module) else None
            return [behind.run(part, image) for image in shown]

        make = partial(registry.build, "pruner", {**nodes[key], "name": key}, **sizes)
        weights = isinstance(pruner, nn.Module) and any(True for _ in (*pruner.parameters(), *pruner.buffers()))
        results = _built(run, make, name, pruner) if weights else _run(run, pruner, name)
        for given, found in zip(shown, results or shown, strict=True):
            _compare(name, found.tokens, n, width, f"num_tokens({n})")
            _check_valid(name, pruner, replace(found, cuts=given.cuts), n)


def _check_projector(parts: Parts, node: Mapping[str, Any], images: list[ImageFeatures], given: dict[str, Any]) -> None:
    name, n = f"projector {node['name']!r}", images[0].tokens.shape[1]
    step = next(s for s in parts.steps if s.kind == "projector")

    def run(part: Any, device: str) -> list[Tensor]:
        part.eval()
        return [part(_on(image, device)) for image in images]

    assert parts.projector is not None, "called for it"
    given = {**given, "text_dim": step.width}
    found = _tried(run, parts.projector, lambda: registry.build("projector", node, **given), name, node)
    for tokens in found or ():
        if not isinstance(tokens, Tensor):
            raise ZooError(f"{name} gives {_named_type(tokens)}, and has to give a Tensor (M, K, {step.width}).")
        _compare(name, tokens, parts.projector.num_tokens(n), step.width, f"num_tokens({n})")


def _check_layout(layout: Layout, size: tuple[int, int], node: Mapping[str, Any]) -> None:
    """Lay out two images of one row each, and compare with `count`."""
    name = f"layout {node['name']!r}"
    rows = layout.given.get("num_tokens")
    if rows is None:
        return
    cuts = [Cut(size=size)] * 2

    def run(part: Any, device: str) -> Tensor:
        return part(torch.randn(2, rows, _KEY), cuts)  # (S, C)

    small = {"text_dim": _KEY, **layout.given}
    laid = _built(run, lambda: registry.build("layout", node, **small), name, layout)
    if laid is not None and laid.shape[0] != (count := sum(layout.count(cut) for cut in cuts)):
        raise ZooError(f"{name} returns {laid.shape[0]} tokens for two images, and its count is {count}.")


def _check_native_layout(layout: Layout, node: Mapping[str, Any]) -> None:
    """Lay out an image and a video of unlike grids, and compare with `count`."""
    name, cuts = f"layout {node['name']!r}", [Cut(patches=_SHAPE), Cut(2, "frame", patches=(1, 2))]
    laid = layout([torch.randn(c.rows, layout.count(c) // c.rows, _KEY) for c in cuts], cuts)  # type: ignore[arg-type]
    if laid.shape[0] != (count := sum(layout.count(cut) for cut in cuts)):
        raise ZooError(f"{name} returns {laid.shape[0]} tokens for two images, and its count is {count}.")


# ---- running ---------------------------------------------------------------------------------------------------------


def _tried(
    run: Callable[[Any, str], Any], part: Any, build: Callable[[], Any], name: str, node: Mapping[str, Any]
) -> Any:
    """Run a part on the meta device; where that fails, build a small one and run it on the CPU."""
    try:
        return run(part, "meta")
    except Exception:  # much fails without data, `item()` say: on the CPU it is either right or a clear error
        return None if node.get("checkpoint") else _built(run, build, name, part)


def _built(run: Callable[[Any, str], Any], build: Callable[[], Any], name: str, part: Any) -> Any:
    """Build a part with random weights and run it; None for a large one, which would take seconds."""
    if sum(p.numel() for p in part.parameters()) > _SMALL:
        return None
    return _run(run, build(), name)


def _run(run: Callable[[Any, str], Any], part: Any, name: str) -> Any:
    try:
        return run(part, "cpu")
    except ZooError as error:
        raise ZooError(f"{name} does not run: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ZooError(f"{name} fails when it is run, with {type(error).__name__}: {reason}") from error


def _on(image: ImageFeatures, device: str) -> ImageFeatures:
    moved: dict[str, Any] = {k: v.to(device) for k, v in vars(image).items() if isinstance(v, Tensor)}
    moved["block_attention"] = {word: scores.to(device) for word, scores in image.block_attention.items()}
    return replace(image, **moved)


def _named_type(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _compare(name: str, tokens: Tensor, count: int, width: int, where: str) -> None:
    if tokens.ndim != 3:
        raise ZooError(f"{name} gives tokens of the shape {list(tokens.shape)}, and has to give (M, K, {width}).")
    if tokens.shape[1] != count:
        raise ZooError(f"{name} returns {tokens.shape[1]} tokens of an image, and its {where} is {count}.")
    if tokens.shape[2] != width:
        raise ZooError(f"{name} returns tokens of width {tokens.shape[2]}, where {width} is expected.")
