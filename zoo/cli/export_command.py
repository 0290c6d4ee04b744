"""`zoo export MODEL [OUT]`: write a model for other programs, or whole for zoo on another machine."""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from zoo.composed.licences import licence_given
from zoo.published import FAMILIES
from zoo.registry import ZooError, unknown
from zoo.storage.atomic import writing, written_beside
from zoo.text.command_line import Parser
from zoo.text.sizes import bytes_text

FORMATS = {
    "hf": "the layout of a published family, which transformers loads without zoo",
    "safetensors": "zoo's own layout with all weights, independent of the checkpoints that they came from",
    "gguf": "files of llama.cpp: the language model, and CLIP or SigLIP with the projector (mmproj)",
}
SPELLINGS = {"gguf-parts": "gguf", "transformers": "hf", "zoo": "safetensors"}
# Formats that have an option; the others are of all.
FORMATS_WITH = {"family": ("hf",), "type": ("gguf",), "max-shard-size": ("hf", "safetensors")}
SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)


def main(words: Sequence[str]) -> int:
    """Load the model, write it beside the folder of that name, rename it, and print what was written."""
    args, overrides = _parsed(words)
    _check(args)
    name = model_word(args.model)
    out = Path(args.out or f"{label_of(name)}-{args.format}").expanduser()
    out = Path(os.path.realpath(out)) if out.is_symlink() else out  # a link stays, and is written to where it points
    require_free(out)
    from zoo.loading.build import load  # after the checks above, which need no torch

    model, processor = load(name, *overrides, device="cpu", dtype=args.dtype)
    with _no_new_parents(out), writing(f"the export to {str(out)!r}"), written_beside(out, folder=True) as beside:
        _write(model, processor, beside, args, _facts(model, overrides, args))
    print(report(out, args.format))
    return 0


def _check(args: Any) -> None:
    """Refuse what no export could have, and options that the format would ignore."""
    if args.format not in FORMATS:
        raise unknown("format of zoo export", args.format, FORMATS)
    for option, formats in FORMATS_WITH.items():
        if getattr(args, option.replace("-", "_")) and args.format not in formats:
            raise ZooError(f"--{option} is of --format {' or '.join(formats)}, and this export is {args.format}.")
    if args.family and args.family not in FAMILIES:  # before weights are loaded
        raise unknown("published family", args.family, FAMILIES)
    if args.type:
        from zoo.published.gguf_export import TYPES

        if args.type.lower() not in TYPES:
            raise unknown("type of GGUF weights", args.type, TYPES)
    args.license = licence_given(args.license, "--license")
    if args.max_shard_size and not SIZE.fullmatch(args.max_shard_size):
        raise ZooError(f"--max-shard-size is a size such as 500MB or 5GB, got {args.max_shard_size!r}.")


@contextmanager
def _no_new_parents(out: Path) -> Iterator[None]:
    """Remove the folders above `out` that were made for it, where it could not be written."""
    missing = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):  # not made, or with files of others
                folder.rmdir()
        raise


def _facts(model: Any, overrides: Sequence[str], args: Any) -> Any:
    """Return what the card states: what the model's own card does, and what was given."""
    from zoo.composed.card_facts import facts_in, scores_in

    facts = facts_in(model.described)
    if any(not word.startswith("plugins=") for word in overrides):  # scores are of the parts that it was saved with
        facts = facts.without_scores()
    scores = scores_in(Path(args.scores).expanduser()) if args.scores else facts.scores
    return replace(facts, scores=scores, license=args.license or facts.license)


def _write(model: Any, processor: Any, folder: Path, args: Any, facts: Any) -> None:
    from zoo.published.export import export, merge_adapters
    from zoo.published.gguf_export import export_gguf

    merged, size = list(model.adapter), args.max_shard_size or "5GB"
    if args.format == "safetensors":
        if args.merge:
            merge_adapters(model)
        model.save_pretrained(folder, include_base=True, max_shard_size=size)
        model.write_card(folder, facts)
        processor.save_pretrained(folder)
    else:
        try:
            if args.format == "gguf":
                export_gguf(model, processor, folder, name=label_of(model_word(args.model)), type=args.type, card=facts)
            else:
                export(model, processor, folder, family=args.family, max_shard_size=size, card=facts)
        except ZooError as error:
            hint = f"As it is, for zoo on another machine: zoo export {shlex.quote(args.model)} --format safetensors"
            raise ZooError(f"{error}\n{hint}") from error
    if gone := [adapter for adapter in merged if adapter not in model.adapter]:
        print(f"Merged into the language model: {', '.join(gone)}.")


def report(folder: Path, format: str) -> str:
    """List the files of a folder with their sizes, and the lines that load it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    width = max(map(len, names))
    sizes = [path.stat().st_size for path in files]
    lines = [f"  {name:<{width}}  {bytes_text(size):>7}" for name, size in zip(names, sizes, strict=True)]
    head = f"Wrote {folder}, {len(files)} files, {bytes_text(sum(sizes))}:"
    return "\n".join([head, *lines, "Load it with:", *(f"    {line}" for line in load_lines(str(folder), format))])


def load_lines(place: str, format: str) -> list[str]:
    """Return lines of Python that load an export from a folder or a repository."""
    if format == "hf":
        return [
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            f'model = AutoModelForImageTextToText.from_pretrained("{place}")',
            f'processor = AutoProcessor.from_pretrained("{place}")',
        ]
    if format == "gguf":
        files = sorted(Path(place).glob("*.gguf"), key=lambda file: file.name.startswith("mmproj-"))
        llm, clip = (shlex.quote(str(file)) for file in files)
        return [f"llama-mtmd-cli -m {llm} --mmproj {clip} --image photo.jpg -p 'What is this?'"]
    return ["import zoo", f'model, processor = zoo.load("dir:{place}")']


def model_word(word: str) -> str:
    """Return the name of a model for `zoo.load`; a folder may be written without `dir:`."""
    is_folder = ":" not in word and word != "last" and Path(word).expanduser().is_dir()
    return f"dir:{word}" if is_folder else word


def label_of(name: str) -> str:
    """Return a short name of a model for files: of a run's model that of the run."""
    place = Path(name.partition(":")[2] or name)
    place = place.resolve() if place.exists() else place
    place = place.parent if place.name == "model" and (place.parent / "config.yaml").is_file() else place
    return re.sub(r"[^\w.+-]+", "_", place.name).strip("._") or "model"


def require_free(out: Path) -> None:
    """Refuse to write over anything.

    Raises:
        ZooError: `out` is a file, a folder that is not empty, or the working folder.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ZooError(f"{str(out)!r} exists and is not empty: name another folder, or remove it first.")
    if not out.name:
        raise ZooError(f"{str(out)!r} is the working folder, which is in use: name a new one in it.")


def _parsed(words: Sequence[str]) -> tuple[Any, list[str]]:
    """Separate the options of the command from those of the model (`pruner=[]`)."""
    parser = Parser(
        "export",
        "Write a model for other programs, or whole for zoo on another machine.",
        """zoo export last
        zoo export dir:runs/x/model out --format gguf --type q8_0""",
        options="of the model, as for zoo.load: pruner=[]",
        more="\n\n".join(f"{name}: {about}." for name, about in FORMATS.items()),
    )
    parser.add_argument("model", help="a preset, a folder, a run, last, or hub:<org>/<name>")
    parser.add_argument("out", nargs="?", default="", help="the new folder; default: MODEL-FORMAT here")
    parser.add_argument("--format", default="hf", metavar="name", help=f"{', '.join(FORMATS)}, see below; default: hf")
    parser.add_argument("--merge", action="store_true", help="merge adapters; always done where a layout has none")
    parser.add_argument("--family", default="", metavar="name", help="of hf: llava, ...; default: the first that fits")
    parser.add_argument("--dtype", metavar="name", help="of the weights: bfloat16; default: as they are")
    parser.add_argument(
        "--type", default="", metavar="name", help="of gguf: f32, f16, bf16, q8_0; default: as they are"
    )
    parser.add_argument("--max-shard-size", default="", metavar="size", help="of a file of weights; default: 5GB")
    parser.add_argument(
        "--license", default="", metavar="id", help="of the weights, for the card: apache-2.0, other:<name>"
    )
    parser.add_argument("--scores", default="", metavar="file", help="scores.json of zoo eval; default: of the run")
    args = parser.read(words)
    args.format = SPELLINGS.get(args.format, args.format)
    return args, args.options
