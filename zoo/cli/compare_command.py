"""`zoo eval model=[a,b]` and `zoo eval runs/a runs/b`: two models on the same samples."""

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from zoo.cli import launch
from zoo.registry import ZooError
from zoo.settings import model_names
from zoo.text.command_line import REMOVAL, Parser

FLIPS = 5  # printed of each direction


def names_two(words: Sequence[str]) -> bool:
    """Return whether the words behind `zoo eval` name two models, or folders of evaluations."""
    valued = {"--flips", *launch.parser_of("eval", "").valued}
    named = [word for before, word in zip(["", *words], words, strict=False) if before not in valued]
    options = [word for word in named if "=" in word or word.startswith("-") or REMOVAL.fullmatch(word)]
    return len(options) < len(named) or any(word.startswith("model=[") for word in options)


def main(words: Sequence[str], evaluate: Any) -> Any:
    """Compare two models.

    Args:
        words: behind `zoo eval`.
        evaluate: runs `zoo eval` with words, and returns its result; notes on these words are printed here.

    Raises:
        ZooError: not two are named, or they answered other questions.
    """
    form = "model=[a,b] [key=value ...] [flags]"
    parser = Parser("eval", "Compare two models on the same samples.", json=True, usage=form, options="of a run")
    parser.add_argument("folder", nargs="*")
    parser.add_argument("--flips", type=int, default=FLIPS)
    parser.add_argument("--config-dir", "-cd")
    args = parser.read(words)
    if args.folder:
        return _folders([Path(word) for word in args.folder], args)
    from zoo.evaluation.compared import by_question, compared, show
    from zoo.settings.component_presets import written_value
    from zoo.settings.overrides import typed_values

    names = _models(next(word for word in args.options if word.startswith("model=[")))
    rest = [word for word in args.options if not word.startswith("model=[")]
    given = typed_values([word for word in rest if word.startswith(("run.folder=", "run.dir=", "model.revision="))])
    for name in names:  # the second one, too, before the first is scored
        model_names.require(name, given, args.config_dir)
    root = given.get("run.folder") or str(
        Path(str(given.get("run.dir", "runs"))) / f"{datetime.now():%Y-%m-%d/%H-%M-%S}-compare"
    )
    more = ["--config-dir", args.config_dir] if args.config_dir else []
    results = []
    for number, name in enumerate(names, 1):
        print(f"zoo: {number} of 2: {name}", file=sys.stderr)
        others = [word for word in rest if not word.startswith("run.folder=")]
        results.append(evaluate([f"model={name}", *others, f"run.folder={written_value(f'{root}/{number}')}", *more]))
    if not all(result.predictions for result in results):  # of several processes, the first one has the answers
        return results[0]
    found = compared((names[0], names[1]), *(by_question(result.predictions) for result in results))
    show(found, args.flips)
    return found


def _folders(folders: Sequence[Path], args: Any) -> Any:
    """Compare two finished evaluations, without running a model."""
    from zoo.evaluation.compared import answers_of, compared, show

    given = args.options
    if len(folders) != 2 or given:
        shown = ", ".join(map(repr, [*map(str, folders), *given]))
        raise ZooError(
            f"zoo eval compares two folders of evaluations, got {shown}. To score one model: zoo eval model=<name>."
        )
    found = compared((str(folders[0]), str(folders[1])), *map(answers_of, folders))
    show(found, args.flips)
    return found


def _models(word: str) -> list[str]:
    """Return the two models of `model=[a,b]`."""
    value = word.removeprefix("model=")
    names = [name.strip().strip("'\"") for name in value.strip("[]").split(",")]
    if len(names) != 2 or not all(names) or not value.endswith("]"):
        raise ZooError(
            f"zoo eval compares two models, model=[a,b]; got {word!r}. More: one after the other, and zoo report."
        )
    return names
