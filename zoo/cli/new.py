"""`zoo new`: write a working component to start from, with a test, and print the commands that try it."""

import keyword
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from zoo.cli import template_tests, templates
from zoo.registry import ZooError, names
from zoo.registry.errors import unknown_kind
from zoo.registry.table import NAMED_CHILDREN, group_of, require_child_name, require_word
from zoo.text.command_line import Parser
from zoo.text.terminal import say

TEMPLATES = {
    "pruner": templates.PRUNER,
    "inside_pruner": templates.INSIDE_PRUNER,
    "projector": templates.PROJECTOR,
    "adapter": templates.ADAPTER,
    "dataset": templates.DATASET,
    "task": templates.TASK,
    "vision": templates.VISION,
    "layout": templates.LAYOUT,
    "llm": templates.LLM,
    "distiller": templates.DISTILLER,
}
# Imports of a kind's test: from the standard library, whether torch, from zoo.registry.
_STANDARD = {"distiller": ["from types import SimpleNamespace"]}
_NO_TORCH = {"dataset", "task"}
_CONTRACTS = {"pruner": "ImageFeatures, ", "projector": "ImageFeatures, ", "task": "Dialog, ", "layout": "Cut, "}
_YAML = {  # what has no template -> where to begin
    "model": "`zoo info model/scenes_tiny` shows one, and my_conf/model/NAME.yaml is found by `zoo check --config-dir "
    "my_conf model=NAME`",
    "recipe": "`zoo info recipe/scenes_tiny` shows one, and my_conf/recipe/NAME.yaml is found by `zoo train "
    "--config-dir my_conf recipe=NAME`",
}


def main(words: Sequence[str]) -> int:
    """Write a component: `zoo new <kind> <name>`."""
    parser = Parser("new", "Write a component of your own to start from, with a test.", "zoo new pruner my_pruner")
    parser.add_argument("kind", help=", ".join(TEMPLATES))
    parser.add_argument("name", help="of the component and its file: lower case letters, digits and underscores")
    args = parser.read(words)
    args.kind = "dataset" if args.kind == "data" else args.kind  # as elsewhere on the command line
    files = write(args.kind, args.name, Path.cwd())
    *first, last = [file.name for file in files]
    say(f"wrote {', '.join(first)} and {last}\n\nnext:")
    for command in next_commands(args.kind, args.name):
        say(f"  {command}", None)
    return 0


def write(template: str, name: str, folder: Path) -> list[Path]:
    """Write the component and its test into `folder`.

    Args:
        template: of `TEMPLATES`.
        name: of the component and of its file.
        folder: that exists.

    Raises:
        ZooError: there is no such template, the name is not an identifier in lower case, or a component, file or module
            has that name.
    """
    if template in _YAML:
        raise ZooError(f"A {template} is a file of YAML, not a component: {_YAML[template]}.")
    if template not in TEMPLATES:
        raise unknown_kind("kind", template, TEMPLATES)
    kind = kind_of_template(template)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ZooError(f"A component's name is lower case letters, digits and underscores, got {name!r}.")
    require_word(kind, name)
    if keyword.iskeyword(name) or keyword.iskeyword(_class_name(name)):
        raise ZooError(f"{name!r} is a word of Python, which no module or class can be called: choose another name.")
    if kind in NAMED_CHILDREN:
        require_child_name(kind, name)
    if name in names(kind):
        raise ZooError(f"{kind} {name!r} exists already: `zoo info {kind}/{name}` shows it.")
    files = {
        folder / f"{name}.py": _filled(TEMPLATES[template], name),
        folder / f"test_{name}.py": _test(template, name),
    }
    if kind == "task":
        files[folder / f"{name}.jsonl"] = templates.QUESTIONS  # data sets of the zoo name tasks of their own
    for file in files:
        if file.exists():
            raise ZooError(f"{file.name!r} exists and is not overwritten.")
    if find_spec(name):
        raise ZooError(
            f"{name}.py would hide the module {name!r} from scripts and tests in its folder: choose another name."
        )
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")
    return list(files)


def kind_of_template(template: str) -> str:
    """Return the kind of the component that a template makes."""
    return "pruner" if template == "inside_pruner" else template


def next_commands(template: str, name: str) -> list[str]:
    """Return the commands to run after `zoo new`."""
    kind, plugin = kind_of_template(template), f"plugins=[./{name}.py]"
    first = [
        f"zoo test {name} {plugin}",
        f"python -m pytest test_{name}.py",
        f"zoo info {kind}/{name} {plugin}",
    ]
    if kind == "task":
        asked = f"data=chat_json data.chat_json.file={name}.jsonl"
        return [*first, f"zoo eval model=scenes_tiny {plugin} task={name} {asked}"]
    run = f"{plugin} {_chosen(template, name)}"
    return [*first, f"zoo check {run}", f"zoo train {run}", f"zoo eval model=last {plugin}"]


def _chosen(template: str, name: str) -> str:
    """Return how a run gets the component."""
    kind = kind_of_template(template)
    if kind == "distiller":
        return f"recipe=llava_kd_tiny stages.dft.distiller={name}"  # whose stage dft has a teacher
    more = {
        "dataset": " recipe=fashion_mnist",  # the default recipe needs the labels of scenes
        "inside_pruner": " stages.name.pack=none stages.relate.pack=none",  # it keeps other tokens for each question
    }
    return f"{group_of(kind)}={name}{more.get(template, '')}"


def _filled(text: str, name: str) -> str:
    return text.replace("CLASS", _class_name(name)).replace("NAME", name)


def _class_name(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def _test(kind: str, name: str) -> str:
    """Return the text of a test that loads the component as a plugin, as a run does."""
    standard = ["from pathlib import Path", *_STANDARD.get(kind, [])]
    others = [] if kind in _NO_TORCH else ["import torch"]
    others += ["from zoo import registry", f"from zoo.registry import {_CONTRACTS.get(kind, '')}plugins"]
    imports = "\n".join([*standard, "", *others])
    load = f'plugins.load([str(Path(__file__).with_name("{name}.py"))])'
    return f"{imports}\n\n{load}\n\n\ndef test_{name}():\n{_filled(template_tests.TESTS[kind], name)}"
