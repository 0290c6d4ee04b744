"""`zoo test`: try the rules of a kind on a part, and say of each what was given and what was expected."""

import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zoo.registry import KINDS, ZooError, names, nearest, plugins, source_options, unknown
from zoo.registry.errors import unknown_kind
from zoo.registry.table import config_of, group_of
from zoo.text.command_line import Parser
from zoo.text.terminal import Answer, is_json, width

_WORDS = {"ok": "ok", "broken": "BROKEN", "none": "-"}


def main(words: Sequence[str]) -> Answer:
    """Try parts: `zoo test PART [plugins=...] [option=value]`. The status is 1 where a rule is broken."""
    parser = Parser(
        "test",
        "Try a part as the zoo uses it: counts against real tensors, dtype, device, gradients, a batch against each "
        "alone, two images of unlike size, torch.compile, and a whole model that learns, answers, is saved and loaded.",
        """zoo test pruner/my_pruner plugins=[./my_pruner.py]
        zoo test my_pruner plugins=[./my_pruner.py] keep_ratio=0.25
        zoo test plugins=[./my_pruner.py]       all that a plugin adds
        zoo test pruner/random                  one of the zoo's own, of tiny size""",
        json=True,
        options="of the part: zoo info PART lists them; plugins=[...] loads yours",
        more="Exit code: 0 all rules are kept, 1 one is broken, 2 a mistake.",
    )
    parser.add_argument("part", nargs="*", help="kind/name, or a name that one kind has")
    args = parser.read(words or ["--help"])
    plugins.load_installed()
    options = plugins.load_words(args.options)
    parts = [found_part(word) for word in args.part]
    if not parts:
        parts = [_pair(word) for word in plugins.added()]
    if not parts:
        raise ZooError("zoo test takes a part, such as pruner/my_pruner, or plugins=[...] that add one.")
    if options and len(parts) > 1:
        raise ZooError(f"{' '.join(options)}: options are of one part, and {len(parts)} parts are to be tried.")
    from zoo.contracts.battery import usual_node

    nodes = [(kind, {**usual_node(kind, name), **options_for(kind, name, options)}) for kind, name in parts]
    for kind, node in nodes:
        config_of(kind, node)  # a mistake in an option is reported before anything runs
    reports = [_tried(kind, node, quiet=is_json()) for kind, node in nodes]
    return Answer({"parts": reports}, status=1 if any(report["broken"] for report in reports) else 0)


def found_part(word: str) -> tuple[str, str]:
    """Return kind and name of a part: of `kind/name`, or of a name that one kind has.

    Raises:
        ZooError: there is none, or several kinds have one of that name.
    """
    kind, slash, name = word.rpartition("/")
    kind = "dataset" if kind == "data" else kind
    if slash:
        if kind not in KINDS:
            raise unknown_kind("kind", kind, KINDS)
        if name not in names(kind):
            raise unknown(kind, name, names(kind))
        return kind, name
    found = [kind for kind in KINDS if word in names(kind)]
    if len(found) == 1:
        return found[0], word
    if found:
        raise ZooError(f"{word!r} is ambiguous: {', '.join(f'{kind}/{word}' for kind in found)}.")
    everything = [f"{kind}/{name}" for kind in KINDS for name in names(kind)]
    near = nearest(word, [full.partition("/")[2] for full in everything])
    meant = [full for full in everything if near and full.endswith(f"/{near[0]}")]
    hint = f" Did you mean {' or '.join(map(repr, meant))}?" if meant else ""
    raise ZooError(f"No part is called {word!r}.{hint} One of your own needs plugins=[./{word}.py] beside it.")


def _pair(word: str) -> tuple[str, str]:
    kind, _, name = word.partition("/")
    return kind, name


def options_for(kind: str, name: str, words: Sequence[str]) -> dict[str, Any]:
    """Read options of a part: `keep_ratio=0.5`, or as a run has them, `pruner.random.keep_ratio=0.5`."""
    from omegaconf import OmegaConf

    from zoo.settings.text_options import text_of

    held = {o.name: text for o in source_options(kind, name) if (text := text_of(o.type)) and not text.inside}
    plain = []
    for word in words:
        key, _, value = word.partition("=")
        for start in (f"{group_of(kind)}.{name}.", f"{group_of(kind)}."):
            key = key.removeprefix(start)
        if (text := held.get(key)) and value[:1] not in ("'", '"') and not (value == "null" and text.optional):
            value = "'" + value.replace("'", "''") + "'"  # YAML would read 0012 as 10
        plain.append(f"{key}={value}")
    found = OmegaConf.to_container(OmegaConf.from_dotlist(plain), resolve=False)
    return {str(key): value for key, value in found.items()} if isinstance(found, Mapping) else {}


def _tried(kind: str, node: Mapping[str, Any], quiet: bool) -> dict[str, Any]:
    from zoo.contracts.battery import battery

    options = {k: v for k, v in node.items() if k != "name"}
    begin, verdicts = time.perf_counter(), []
    if not quiet:
        print(f"{kind}/{node['name']}" + "".join(f"  {k}={v}" for k, v in options.items()))
    with tempfile.TemporaryDirectory() as folder:
        for verdict in battery(kind, node, Path(folder)):
            verdicts.append(verdict)
            if not quiet:
                print(_line(_WORDS[verdict.word], verdict.rule, verdict.given), flush=True)
                if verdict.expected:
                    print(_line("", "expected", verdict.expected), flush=True)
    counts = {word: sum(v.word == word for v in verdicts) for word in _WORDS}
    if not quiet:
        seconds = time.perf_counter() - begin
        aside = f", {counts['none']} do not concern it" if counts["none"] else ""
        print(f"\n{counts['ok']} rules kept, {counts['broken']} broken{aside}, in {seconds:.1f} s")
    rows = [{k: v for k, v in asdict(verdict).items() if k != "seconds"} for verdict in verdicts]
    return {"part": f"{kind}/{node['name']}", "options": options, "broken": counts["broken"], "rules": rows}


def _line(word: str, rule: str, text: str) -> str:
    """A verdict, with what does not fit in lines below."""
    head = f"  {word:<8}{rule:<17}"
    if not text:
        return head.rstrip()
    return textwrap.fill(text, width(), initial_indent=head, subsequent_indent=" " * len(head))
