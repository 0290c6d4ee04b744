"""What the documents show runs, and every named model has its card."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import zoo
from tests.data_places import shared
from zoo.cli.entry import main

ROOT = Path(__file__).resolve().parents[1]
MODELS = sorted(p.stem for p in (ROOT / "conf" / "model").glob("*.yaml"))


def test_the_lines_of_the_readme_answer_rightly(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "red"


def test_quickstart_prints_what_a_person_wants_to_read(tmp_path):
    """The commands of the Makefile, with a step for each stage: lines of progress and tables, no library's warnings.

    On 200 pictures: the tokenizer and the commonest answers are made of all of them.
    """
    recipe = re.search(r"^quickstart:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    commands = [line.split()[1:] for line in recipe.splitlines()]
    assert [c[0] for c in commands] == ["train", "eval"]
    commands[0] += [f"stages.{stage}.steps=1" for stage in ("look", "name", "relate")]
    commands[0] += [f"data.{name}.scenes=200" for name in ("scenes", "scenes_basics", "scenes_relations")]
    # In one process: a third of the time went into importing the same once more.
    code = "import json, sys; from zoo.cli.entry import main\nfor words in json.loads(sys.argv[1]):\n"
    code += "    code = main(words); print('ENDED', code, flush=True); code and sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([[*command, "limit=1"] for command in commands])],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    progress = r"stage \w+, \d of 3: .*|\w+, \w+ [\d,]+ of [\d,]+ \| .*|  [^ ].*"  # a long line goes on indented
    assert [line for line in done.stderr.splitlines() if not re.fullmatch(progress, line)] == []
    assert done.returncode == 0
    *shown, rest = done.stdout.split("ENDED 0\n")
    assert len(shown) == len(commands) and not rest
    for out in shown:
        assert not re.search("warn|deprecat|traceback", out, re.IGNORECASE), out
        assert 10 <= len(out.splitlines()) <= 50


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("name", MODELS)
def test_every_named_model_has_a_card(name):
    card = (ROOT / "model_cards" / f"{name}.md").read_text()
    assert re.match(r"---\nlicense: ", card) and f"# {name}\n" in card
    for words in ("library_name: zoo", "pipeline_tag: image-text-to-text", "**Limits.**", "**Licence.**"):
        assert words in card


@pytest.mark.parametrize("name", [name for name in MODELS if not (ROOT / "model_cards" / name).is_dir()])
def test_the_checks_that_cards_print_pass(name, monkeypatch):
    """As typed, but for a smaller language model; the sizes are those that they give of the whole."""
    from zoo.inspection.model_facts import stored

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    card = (ROOT / "model_cards" / f"{name}.md").read_text()
    for line in {*re.findall(r"`zoo (check .*?)`", card)}:
        assert main([*line.split(), "llm.num_layers=4"]) == 0, line
    if found := re.search(r"\| image tokens \| (?:up to )?(\d+)(?: \||;)", card):
        assert int(found[1]) == stored(name).image_tokens
    if found := re.search(r"\| parameters \| (\S+) B \|", card):
        assert found[1] == f"{stored(name).parameters / 1e9:.2f}"


@pytest.mark.parametrize("name", ["scenes_tiny", "llava_kd_tiny", "llava_mod_tiny"])
def test_models_that_ship_answer_offline_right_after_installation(name):
    from zoo import registry

    model, processor = zoo.load(name)
    assert sum(f.stat().st_size for f in (ROOT / "model_cards" / name).iterdir()) < 8 * 2**20
    scenes = registry.build("dataset", {"name": "scenes", "split": "eval"})
    from zoo.evaluation.evaluate import evaluate

    scores = evaluate(model, processor, {"scenes": scenes}, limit=20, baselines=False).summary()
    assert scores["scenes/exist/accuracy"] > 0.9
    assert scores["scenes/color/accuracy"] > 0.9
    assert scores["scenes/box/iou"] > 0.6


@pytest.mark.parametrize("name", ["abilities_tiny", "abilities_uptrained"])
def test_models_to_compare_pruners_on_read_signs_and_have_cls(name):
    from zoo.evaluation.evaluate import evaluate
    from zoo.runs.data import RunData
    from zoo.settings.config import compose

    model, processor = zoo.load(name)
    assert model.num_image_tokens == 256 and "cls_attention" in model.vision.provides and not model.pruner
    assert sum(f.stat().st_size for f in (ROOT / "model_cards" / name).iterdir()) < 8 * 2**20
    data = RunData(compose("eval", [f"model={name}", "data=[abilities]", "recipe=null"]).data).all
    scores = evaluate(model, processor, data, limit=20, baselines=False).summary()
    assert scores["abilities/word/accuracy"] > 0.9
    assert scores["abilities/color/accuracy"] > 0.8


CLOTHES = ["fashion_tiny", "llava_kd_fashion", "llava_mod_fashion"]


@pytest.mark.parametrize("name", CLOTHES)
def test_models_of_clothes_answer_offline_right_after_installation(name):
    """About drawn silhouettes, for want of photos."""
    model, _ = zoo.load(name)
    assert sum(f.stat().st_size for f in (ROOT / "model_cards" / name).iterdir()) < 8 * 2**20
    trousers, bag = np.zeros((2, 28, 28, 3), np.uint8)
    trousers[1:27, 8:13] = trousers[1:27, 15:20] = trousers[1:6, 8:20] = 170
    bag[10:26, 3:25] = bag[4:10, 9:11] = bag[4:10, 17:19] = bag[4:6, 9:19] = 170
    for image, right, wrong in ((trousers, "Trouser", "Bag"), (bag, "Bag", "Trouser")):
        said = [
            model.chat(question, image) for question in ("What is shown?", f"Is this a {right}?", f"Is this a {wrong}?")
        ]
        assert said == [right, "yes", "no"]


@pytest.mark.parametrize("name", CLOTHES)
def test_models_of_clothes_know_photos_they_never_saw(name, monkeypatch):
    monkeypatch.setenv("ZOO_DATA", str(shared("fashion_mnist").parent))
    from zoo.evaluation.evaluate import evaluate
    from zoo.runs.data import RunData
    from zoo.settings.config import compose

    data = RunData(compose("train", ["recipe=fashion_mnist"]).data).evaluation
    scores = evaluate(*zoo.load(name), data, limit=200, baselines=False).summary()
    assert scores["fashion_mnist/name/accuracy"] > 0.8  # guessing: 0.1; four standard errors below what the cards say
    assert scores["fashion_mnist/yes_no/accuracy"] > 0.88


def test_the_readme_names_the_commands_and_the_table_of_names():
    from zoo.registry import KINDS, names

    text = (ROOT / "README.md").read_text()
    assert "make quickstart" in text and "make test" in text
    missing = [f"{kind} {name}" for kind in KINDS for name in names(kind) if f"`{name}`" not in text]
    assert not missing


def test_paths_modules_and_links_that_documents_name_are_there():
    """Of *.md and *.py: `fusion/pruners/pool.py`, `zoo.fusion.pruners.pool`, [text](docs/runs.md)."""
    rooms = "registry|vision|fusion|distill|zoo|benches|claims|docs|tests|requirements"
    mapped = (
        "registry",
        "vision",
        "fusion",
        "distill",
        "conf",
        "model_cards",
        "benches",
        "claims",
    )  # folders below the name zoo
    ours = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "model_cards").glob("*.md")]
    ours += [f for room in rooms.split("|") if room != "docs" for f in (ROOT / room).rglob("*.py")]
    wrong = []
    for file in ours:
        text = file.read_text()
        plain = re.sub(r"\]\([^)]*\)|```\{toctree\}[^`]*```", "", text)  # their paths begin at the page
        paths = re.findall(rf"(?<![\w/.])(?:{rooms})/[\w/]+\.(?:py|md|txt)\b", plain)
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        links = re.findall(r"\]\((?!https?:|mailto:)([^)#\s]+)", prose) if file.suffix == ".md" else []
        wrong += [f"{file.name}: {p}" for p in paths if not (ROOT / p).exists()]
        made = "reference/"  # pages made from the code: tests/test_site.py
        links = [p for p in links if not p.removeprefix("../").startswith(made)]
        wrong += [f"{file.name}: {p}" for p in links if not (file.parent / p).exists()]
        for name in set(re.findall(r"(?<![\w.])zoo\.([a-z]\w*(?:\.[a-z]\w*)+)", text)):
            top = ROOT if name.split(".")[0] in mapped else ROOT / "zoo"
            *folders, last = name.split(".")
            places = [top.joinpath(*folders, last), top.joinpath(*folders, f"{last}.py")]
            defines = [top.joinpath(*folders[:-1], f"{folders[-1]}.py"), top.joinpath(*folders, "__init__.py")]
            known = any(re.search(rf"\b{last}\b", d.read_text()) for d in defines if d.is_file())
            if not known and not any(place.exists() for place in places):
                wrong.append(f"{file.name}: zoo.{name}")
    examples = {"fusion/pruners/mine.py", "zoo.fusion.pruners.mine", "tests/test_mine.py"}  # a contributor's own
    planted = {"fusion/planted.py", "zoo.vision.video"}  # of the test of imports
    assert [w for w in wrong if w.split(": ")[1] not in examples | planted] == []


@pytest.mark.fixes
def test_the_refusal_in_the_readme_is_what_is_printed(capsys):
    command, lines = re.search(r"    \$ zoo (check .*)\n((?:    .+\n)+)", (ROOT / "README.md").read_text()).groups()
    assert main(command.split()) == 2
    printed = capsys.readouterr().err.splitlines()
    assert [line.removeprefix("    ") for line in lines.splitlines()] == printed[-len(lines.splitlines()) :]
