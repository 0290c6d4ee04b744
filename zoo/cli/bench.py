"""`zoo bench <name> [option=value ...]`: measure on this machine, each number beside a reference.

A bench is a module of `zoo.benches` with a dataclass `Options` and a function `run(options, show) -> Report`. Benches
and claims are in the repository (`benches/`, `claims/`) and not in the installed package.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from zoo.registry import ZooError, plugins, unknown
from zoo.registry.devices import require_device
from zoo.text.command_line import HELP, Parser
from zoo.text.terminal import columns


@dataclass(frozen=True)
class Bench:
    """Module and one-line description of a bench."""

    module: str
    summary: str


BENCHES = {
    "check": Bench("zoo.benches.check", "mistakes that zoo check finds before weights load, and false alarms"),
    "checkpoint": Bench(
        "zoo.benches.checkpoint", "saving, loading and resuming what processes share, against DCP alone"
    ),
    "claims": Bench("zoo.claims.command", "what papers claim, as small experiments over several seeds"),
    "compatibility": Bench("zoo.benches.compatibility", "which parts go together, from real runs of tiny models"),
    "device": Bench("zoo.benches.device", "what ten minutes on one GPU tell: training, pruned prompts, kernels"),
    "features": Bench("zoo.benches.features", "steps on kept features of a frozen encoder against steps that encode"),
    "frozen": Bench("zoo.benches.frozen", "a frozen LLM with LoRA against transformers' Llava, PEFT and Trainer"),
    "fusion": Bench("zoo.benches.fusion", "what projectors and adapters cost, against what they replace"),
    "generate": Bench("zoo.benches.generate", "prefill and decode speed against transformers on the same checkpoint"),
    "load": Bench("zoo.benches.load", "memory and seconds of loading a checkpoint against transformers"),
    "processes": Bench("zoo.benches.processes", "training on several processes against one: losses, weights, bytes"),
    "memory": Bench("zoo.benches.memory", "the memory that zoo check states for training, against what training takes"),
    "roundtrip": Bench("zoo.benches.roundtrip", "what a saved folder gives back, over sources, optimisers, processes"),
    "scale": Bench("zoo.benches.scale", "what recipes hold and send on 8 to 512 devices, beside torch's own estimate"),
    "save": Bench("zoo.benches.save", "what it costs to find out at the end which weights changed"),
    "threads": Bench("zoo.benches.threads", "people who chat with one model at once, in turns, and as a batch"),
    "train": Bench("zoo.benches.train", "our training step against transformers' Llava and Trainer, and the floor"),
    "prune": Bench("zoo.benches.prune", "one card for all pruners: tokens, FLOPs, time, memory, answers by ability"),
    "positions": Bench("zoo.benches.positions", "scores with fewer image tokens, by whether they keep their places"),
    "native": Bench(
        "zoo.benches.native", "images that keep their shapes: attention inside windows, unlike images in batches"
    ),
    "video": Bench("zoo.benches.video", "what a few frames of a clip cost, against decoding all of it"),
    "distill": Bench("zoo.benches.distill", "learning from a teacher against the plain way: memory, and time of steps"),
}

FORM = "<name> [key=value ...] [flags]"
OUTPUTS = {
    "json": "for the rows and the machine as JSON",
    "markdown": "for the rows as a Markdown table",
    "png": "for a picture, of benches that draw one",
}


def main(words: Sequence[str]) -> int:
    """Run a bench and print its rows. Returns 0 even if a bound is missed, which the rows show."""
    named = [word for word in words if word[:1] != "-" and word not in HELP and "=" not in word]
    if not named:
        _parser().read(words or ["--help"])
    plugins.load_installed()
    words = plugins.load_words(words)
    name = next((word for word in named if word in BENCHES), named[0])
    if name not in BENCHES:
        raise unknown("bench", name, BENCHES)
    module = _module(name)
    args = _parser(name, module.Options).read(words)
    files = {key: Path(value) for key in OUTPUTS if (value := getattr(args, key))}
    options = parse(name, module.Options, module.words(args.given) if hasattr(module, "words") else args.given)
    report = module.run(options, lambda line: print(line, flush=True))
    report.command = " ".join(["zoo bench", name, *args.given])
    report.print()
    if "json" in files:
        report.write_json(files["json"])
    if "markdown" in files:
        report.write_markdown(files["markdown"])
    if "png" in files:
        if not hasattr(report, "write_png"):
            raise ZooError(f"bench {name!r} does not draw a picture: omit png=.")
        report.write_png(files["png"])
    return 0


def _module(name: str) -> Any:
    try:
        return import_module(BENCHES[name].module)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(("zoo.benches", "zoo.claims")):
            raise
        raise ZooError(
            f"zoo bench {name} runs from a checkout of the repository: benches/ and claims/ are not in the package."
        ) from error


def parse(name: str, schema: type, words: Sequence[str], owner: str = "") -> Any:
    """Make the options of a bench from `option=value` words.

    Args:
        name: of the bench.
        schema: dataclass of the options.
        words: as typed.
        owner: of the options in messages, if it is not a bench.

    Raises:
        ZooError: the option does not exist, or its value has another type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from zoo.registry import options_of
    from zoo.settings.text_options import text_of

    outputs = set() if owner else set(OUTPUTS)
    owner = owner or f"bench {name!r}"
    known = {f.name for f in dataclasses.fields(schema)}
    for word in words:
        if word.startswith("device="):
            require_device(None if word == "device=null" else word.removeprefix("device="))
    texts = {o.name: text for o in options_of(schema) if (text := text_of(o.type)) and not text.inside}
    for word in words:
        option, equals, _ = word.partition("=")
        if not equals:
            raise ZooError(f"{owner} takes option=value, got {word!r}. Options: {', '.join(sorted(known))}.")
        if option.partition(".")[0] not in known:
            raise unknown(f"option of {owner}", option, known | outputs)
    lists = {o.name for o in options_of(schema) if o.type.startswith("list[")}
    words = [_as_list(word) if word.partition("=")[0] in lists else word for word in words]
    # Options of type str take the word as it is: YAML would read 1e3 or [a] as something else.
    typed = {key: value for key, _, value in (word.partition("=") for word in words) if key in texts}
    kept = {key: None if value == "null" and texts[key].optional else value for key, value in typed.items()}
    try:
        given = OmegaConf.from_dotlist([word for word in words if word.partition("=")[0] not in texts])
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given, kept))
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        found = next((o for o in options_of(schema) if o.name == key.partition(".")[0]), None)
        value = next((word.partition("=")[2] for word in words if word.partition("=")[0] == key), None)
        if found is None or value is None:
            raise ZooError(f"{owner}: {str(error).splitlines()[0]}") from error
        raise ZooError(
            f"Option {key!r} of {owner} takes {found.type} (default {found.default}), got {value!r}."
        ) from error


def _as_list(word: str) -> str:
    """Write `fetch=a.org` as `fetch=[a.org]`."""
    option, _, value = word.partition("=")
    return word if value.startswith("[") or value in ("", "null") else f"{option}=[{value}]"


def _parser(name: str = "", schema: type | None = None) -> Parser:
    """Return the parser of a bench; without one, that of the command."""
    if schema is None:
        more = "zoo bench <name> --help lists its options. plugins=[./mine.py] loads parts of your own."
        parser = Parser("bench", "Measure on this machine, each number beside a reference.", usage=FORM, more=more)
        parser.epilog = f"benches:\n{columns([(n, b.summary) for n, b in BENCHES.items()])}\n\n{parser.epilog}"
        parser.add_argument("name", help="which bench")
        return parser
    about, form = BENCHES[name].summary, FORM.replace("<name>", name)
    parser = Parser("bench", f"{about[:1].upper()}{about[1:]}.", schema=schema, usage=form)
    parser.add_argument("name", help=argparse.SUPPRESS)
    for key, written in OUTPUTS.items():
        parser.add_argument(f"--{key}", metavar="file", help=written)
    return parser


def overview() -> str:
    """Return the text of `zoo bench --help`."""
    return _parser().format_help()


def describe(name: str, schema: type) -> str:
    """Return the options of a bench with their defaults and comments, read from the source of its dataclass."""
    return _parser(name, schema).format_help()
