"""`zoo inspect`: compare which patches of an image pruners keep, in a picture and a self-contained HTML page.

The page uses only the interface of pruners: `keep` and `groups` of the features that they return, `kept(passed)` for
the tokens in each layer of the LLM, `scores(image)` if they rank tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import registry
from zoo.composed import behind
from zoo.inspection.views import NONE, View, Xray
from zoo.registry import Dialog, ImageFeatures, Sample, UnlikeRows, ZooError, plugins, unknown
from zoo.registry.forward_pass import Pass
from zoo.storage.atomic import writing
from zoo.text.command_line import Parser
from zoo.text.stops import reader_for

EXAMPLES = """zoo inspect scenes_tiny --image cat.jpg --pruner fastervlm,aim
zoo inspect last --image cat.jpg --question "A cat?"
zoo inspect vision=hf llm=hf projector=mlp --image cat.jpg    random weights"""
_NEW = 32  # tokens of an answer
_SHOWN = 560  # minimum side of the shown image, in pixels


def main(words: Sequence[str]) -> int:
    """Write the picture and the page."""
    args = _parsed(words)
    asked = [name.strip() for name in args.names.strip("[]").split(",") if name.strip()]
    found = inspect(args.model, args.options, args.image, asked, args.question)
    from zoo.inspection.xray_page import write_page
    from zoo.inspection.xray_picture import write_picture

    folder = Path(args.out).expanduser()
    with writing(f"the picture to {str(folder)!r}", "Choose another place with --out."):
        folder.mkdir(parents=True, exist_ok=True)
        write_picture(found, folder / "xray.png")
        write_page(found, folder / "xray.html")
    for view in found.views:
        kept = sum(t >= 0 for t in view.layers[0])
        later = "".join(f", {view.tokens[i]} from layer {i}" for i in view.moments[1:])  # dropped inside the LLM
        patches = f"{kept} of {len(view.layers[0])} patches in {view.tokens[0]} tokens"
        print(f"{view.name}: {patches}{later}; {view.answer!r}")
    for name, why in found.refused.items():
        print(f"{name} does not fit: {why}")
    print(f"Open {folder / 'xray.html'}; the picture is {folder / 'xray.png'}")
    return 0


def _parsed(words: Sequence[str]) -> Any:
    parser = Parser(
        "inspect",
        "Compare which patches of an image pruners keep, in a picture and a page.",
        EXAMPLES,
        usage="[model] --image file [key=value ...] [flags]",
        options="of the model; those of a pruner go to that one alone: pruner.aim.keep_ratio=0.1",
        more="plugins=[./mine.py] loads a pruner of your own.",
    )
    parser.add_argument(
        "model", nargs="?", default="", help="a preset, dir:<folder>, last, ...; none: parts by options"
    )
    parser.add_argument("--image", required=True, metavar="file", help="what the model is shown")
    parser.add_argument(
        "--pruner",
        dest="names",
        default="",
        metavar="a,b",
        help="which ones, random+aim is a chain; default: all that fit",
    )
    parser.add_argument("--question", default="What is in the picture?", metavar="text", help="of the prompt")
    parser.add_argument("--out", default="xray", metavar="folder", help="for xray.png and xray.html; default: xray")
    args = parser.read(words)
    if ":" not in args.image:
        if not Path(args.image).expanduser().is_file():
            raise ZooError(f"There is no file {args.image!r}.")
        args.image = str(Path(args.image).expanduser())
    return args


def inspect(
    model: str, overrides: Sequence[str], image: Any, pruners: Sequence[str] = (), question: str = "", seed: int = 0
) -> Xray:
    """Run one image through a model with each of several pruners, and without one.

    Args:
        model: name as for `zoo.load`; empty: parts from `overrides`, with random weights.
        overrides: options; those of a pruner are passed to that one only.
        image: a source for `open_image`.
        pruners: names, `a+b` for a chain; empty: every registered one, with a list of those that do not fit.
        question: text of the prompt.
        seed: of random weights.

    Raises:
        ZooError: a named pruner does not exist or does not fit, or a plugin does not load.
    """
    plugins.load_installed()
    plugins.load_words(overrides)
    known = registry.names("pruner")
    for name in (part for chain in pruners for part in chain.split("+")):
        if name not in known:
            raise unknown("pruner", name, known)
    chains = [NONE, *(pruners or known)]
    of_others = [o for o in overrides if not o.startswith("pruner.")]
    for word in overrides:
        if word.startswith("pruner.") and not any(_is_of(word, chain.split("+"), known) for chain in chains[1:]):
            raise ZooError(f"{word!r} is of none of these pruners: {', '.join(chains[1:])}.")
    views, refused, shown = [], {}, None
    for chain in chains:
        names = [] if chain == NONE else chain.split("+")
        slot = f"pruner=[{','.join(names)}]" if names else "pruner=null"
        own = [o for o in overrides if o.startswith("pruner.") and _is_of(o, names, known)]
        try:
            built, processor = _load(model, [*of_others, slot, *own], question, seed)
        except ZooError as error:
            if pruners or chain == NONE:
                raise  # without names, pruners that do not fit the model are only listed
            refused[chain] = str(error).splitlines()[0]
            continue
        view, shown = look(built, processor, image, question, chain)
        view.options = {o.removeprefix("pruner.").partition("=")[0]: o.partition("=")[2] for o in own}
        views.append(view)
    return Xray(shown, question, model or "parts with random weights", views, refused)


def _is_of(word: str, names: Sequence[str], known: Sequence[str]) -> bool:
    """Return whether `pruner.<name>.<option>=`, or `pruner.<option>=` of all that have it, is of one of these."""
    head = word.partition("=")[0].split(".")[1]
    if head in known:
        return head in names
    return any(option.name == head for name in names for option in registry.source_options("pruner", name))


def _load(model: str, overrides: list[str], question: str, seed: int) -> tuple[Any, Any]:
    from zoo.loading.build import compose, load

    torch.manual_seed(seed)  # new weights are the same with every pruner
    return load(model, *overrides) if model else compose(*overrides, texts=[question])


@torch.no_grad()
def look(
    model: Any, processor: Any, image: Any, question: str, name: str = "", answer: str | None = None
) -> tuple[View, Any]:
    """Run one question about one image, and follow its patches through the model.

    Args:
        model: composed.
        processor: of the model.
        image: a source for `open_image`.
        question: text of the prompt.
        name: of the view.
        answer: of the view; None: it is generated.

    Returns:
        The view, and the image after preprocessing, enlarged for small encoders.
    """
    if not model.num_image_tokens:
        raise ZooError("zoo inspect shows image tokens, and this model has none in the LLM's sequence.")
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    sample = Sample("picture", [image], [Dialog(ask)])
    batch = processor.collate([processor.encode_prompt(sample, sample.dialogs[0])], padding_side="left")
    inputs = {k: batch[k].to(model.device) for k in ("input_ids", "attention_mask", "pixel_values")}
    inputs |= {key: batch[key] for key in ("cuts", "questions") if key in batch}
    out = model(**inputs)
    if answer is None:
        written = model.generate(**inputs, max_new_tokens=_NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answer = reader_for(model, processor.template).read(written.tolist())
    # An image that keeps its shape is a group of its own.
    before, kept = (x.groups[0] if isinstance(x, UnlikeRows) else x for x in (out.image, out.image_kept))
    grid = before.grid if model.vision.native and before.grid is not None else tuple(model.vision.grid)
    row = model.layout.overview if model.layout is not None else 0  # of crops, the one that shows all
    patches = _patches(kept, before.tokens.shape[1], row)
    places = out.sequence.image_mask[0].nonzero().flatten()  # (K,) columns of image tokens in the LLM
    k = kept.tokens.shape[1]
    mixed = model.projector.num_tokens(k) != k  # a pooling projector
    if kept.valid is not None:  # columns of other tokens were left out
        stays = kept.valid[row].cpu()
        patches = torch.where((patches >= 0) & stays[patches], (stays.cumsum(0) - 1)[patches], -1)
        k = int(stays.sum())
    own = slice(k) if row == 0 else slice(len(places) - k, None)  # of the row, among the image's tokens
    alive = _alive(model, places, out.passed)
    if model.vision.members and "grid" not in model.vision.provides:
        raise ZooError("zoo inspect draws one grid, and with vision.join=tokens each encoder has its own tokens.")
    view = View(
        name=name,
        grid=grid,
        layers=[patches.tolist() if mixed else _hide(patches, kept_now[own]).tolist() for kept_now in alive],
        tokens=[int(kept_now.sum()) for kept_now in alive],
        answer=answer,
        scores=_scores(model, replace(before, question=kept.question), row),
        mixed=mixed,
    )
    if not mixed:
        view.layer_scores = {i: _at(patches, scores) for i, scores in _layer_scores(places[own], out.passed).items()}
    if model.vision.native:
        return view, _whole(image, processor, grid)
    return view, _picture(image, processor, inputs["pixel_values"][row])


def _patches(kept: ImageFeatures, n: int, row: int) -> Tensor:
    """Return for each of the encoder's `n` patches of a row the index of its token, -1 if it was dropped: (N0,)."""
    if kept.groups is not None:
        return kept.groups[row].cpu()
    if kept.keep is None:
        return torch.arange(n)
    index = torch.arange(kept.keep.shape[1])
    return torch.full((n,), -1).scatter(0, kept.keep[row].cpu(), index)


def _alive(model: Any, places: Tensor, passed: Pass) -> list[Tensor]:
    """Return for each layer of the LLM which image tokens it had in a pass: (K,) bool."""
    layers = [torch.ones(len(places), dtype=torch.bool) for _ in range(model.llm.num_layers)]
    for pruner in model.pruner.values():
        for i, columns in enumerate(pruner.kept(passed)):
            layers[i] &= columns[0, places].cpu()
    return layers


def _hide(patches: Tensor, alive: Tensor) -> Tensor:
    return torch.where((patches >= 0) & alive[patches.clamp(min=0)], patches, -1)


def _scores(model: Any, image: ImageFeatures, row: int) -> list[float] | None:
    """Return the scores of the first pruner before the LLM that ranks tokens, for each patch."""
    n = image.tokens.shape[1]
    for pruner in model.pruner.values():
        if pruner.behind:
            continue
        image = model._projected(pruner, image)
        if (ranked := pruner.scores(image)) is not None:
            scores = _at(_patches(image, n, row), ranked[row].cpu())
            return [0.0 if s is None else s for s in scores]
        image = behind.run(pruner, image)  # a later pruner of the chain scores what is left
    return None


def _at(patches: Tensor, scores: Tensor) -> list[float | None]:
    """Convert scores of tokens to scores of patches; None for patches without a token or a score."""
    values = [None if s != s else float(s) for s in scores.tolist()]  # NaN: no score
    return [values[t] if t >= 0 else None for t in patches.tolist()]


def _layer_scores(places: Tensor, passed: Pass) -> dict[int, Tensor]:
    """Return the scores of image tokens by pruners inside the LLM, by layer: (K,), NaN for dropped tokens."""
    found = {}
    for layer, (columns, scores) in (passed.dropped.scored() if passed.dropped is not None else {}).items():
        whole = torch.full((int(max(columns.max(), places.max())) + 1,), torch.nan)
        found[layer] = whole.scatter(0, columns[0].cpu(), scores[0].float().cpu())[places.cpu()]
    return found


def _whole(image: Any, processor: Any, grid: tuple[int, int]) -> Any:
    """Return an image that keeps its shape as it is divided in a grid, enlarged to `_SHOWN` pixels."""
    from zoo.vision.images.decode import open_image
    from zoo.vision.images.transform import fit

    side = -(-_SHOWN // max(grid))
    return fit(open_image(image), replace(processor.transform, size=(grid[0] * side, grid[1] * side), fit="squash"))


def _picture(image: Any, processor: Any, pixels: Tensor) -> Any:
    """Return the part of the image that the encoder receives, enlarged to `_SHOWN` pixels."""
    from zoo.vision.images.decode import open_image
    from zoo.vision.images.transform import fit, split_row

    transform = processor.transform
    times = max(1, -(-_SHOWN // max(transform.size)))
    large = replace(transform, size=(transform.size[0] * times, transform.size[1] * times))
    if processor.pictures is None:
        return fit(open_image(image), large)
    pixels = split_row(pixels, transform)[0]
    shape = (3, 1, 1)  # a published processor crops in its own way, so the encoder's input is converted back
    shown = pixels.cpu().float() * torch.tensor(transform.std).view(shape) + torch.tensor(transform.mean).view(shape)
    shown = (shown.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)  # (h, w, 3)
    return fit(open_image(shown.numpy()), replace(large, fit="squash"))
