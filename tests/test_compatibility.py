"""docs/compatibility.md is true: it names every part, and a sample of its cells comes out the same when it is run."""

import random
import re
from pathlib import Path

import pytest

from zoo.benches.compatibility import Options, libraries, pairs, triples
from zoo.cli.bench import main, parse
from zoo.cli.entry import main as zoo
from zoo.contracts.trial import Trial
from zoo.fusion.projectors.mlp import MLPProjector
from zoo.registry import ZooError

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
MAKE = "zoo bench compatibility markdown=docs/compatibility.md"


def read_page() -> dict:
    """Parts -> (word, reason)."""
    text = PAGE.read_text()
    reasons = re.findall(r"^\d+\. (.*?)\.(?: Fix of .*)?$", text.split("## Reasons")[1], re.MULTILINE)

    def read(cell):
        word, number = re.fullmatch(r"(yes|no|BROKEN|)(?: \((\d+)\))?", cell.strip()).groups()
        return word, reasons[int(number) - 1] if number else ""

    found = {}
    for title, body in re.findall(r"^## (\w+ and \w+)\n\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL):
        first, second = title.replace("another", title.split()[0]).split(" and ")
        columns, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines()]
        for row, *cells in lines:
            for column, cell in zip(columns[1:], cells, strict=True):
                if cell:
                    found[(first, row), (second, column)] = read(cell)
    for line, cell in re.findall(r"^\| (\w+ .* \+ .*) \| (.*) \|$", text, re.MULTILINE):
        found[tuple(tuple(part.split(" ", 1)) for part in line.split(" + "))] = read(cell)
    return found


def test_it_has_a_cell_for_every_pair_and_no_broken_one():
    found = read_page()
    assert {parts for parts in found if len(parts) == 2} == set(pairs()), f"parts came or went: {MAKE}"
    assert {parts for parts in found if len(parts) == 3} <= set(triples())
    assert not [parts for parts, (word, _) in found.items() if word not in ("yes", "no")]
    assert sum(word == "yes" for word, _ in found.values()) > len(found) / 2


def test_versions_of_libraries_on_it_are_those_that_were_run():
    assert PAGE.read_text().endswith(f"\n\n{libraries()}"), MAKE


@pytest.mark.parametrize("word", ["yes", "no"])
def test_a_sample_of_it_is_what_comes_out(word, tmp_path):
    found = {parts: cell for parts, cell in read_page().items() if cell[0] == word}
    trial = Trial(tmp_path)
    for parts in random.Random(0).sample(sorted(found), 10):
        verdict = trial.run(parts)
        assert (verdict.word, verdict.reason) == found[parts], f"{parts}: {MAKE}"


def test_what_the_check_lets_through_and_fails_is_called_broken(tmp_path, monkeypatch):
    whole = MLPProjector.forward

    def fails_on_numbers(self, image):
        return whole(self, image) if image.tokens.is_meta else 1 / 0

    monkeypatch.setattr(MLPProjector, "forward", fails_on_numbers)
    verdict = Trial(tmp_path).run([("vision", "timm"), ("projector", "mlp")])
    assert verdict.word == "broken" and verdict.reason.startswith("forward: ZeroDivisionError")


def test_the_bench_writes_the_page(tmp_path):
    file = tmp_path / "page.md"
    assert main(["compatibility", "pairs=2", "triples=1", f"markdown={file}"]) == 0
    text = file.read_text()
    assert f"    {MAKE}" in text.replace(" pairs=2 triples=1", "") and "1 compositions" in text


def test_a_part_from_outside_is_tried_with_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert zoo(["new", "pruner", "mine"]) == 0
    file = tmp_path / "page.md"
    assert main(["compatibility", "plugins=[./mine.py]", "pairs=3", "triples=0", "seed=1", f"markdown={file}"]) == 0
    assert "of 3 compositions" in capsys.readouterr().out
    text = file.read_text()
    assert len(re.findall(r"yes|no \(|BROKEN", text.split("## Reasons")[0].split("made by", 1)[-1])) >= 3
    assert "mine" in text and "BROKEN (" not in text


def test_parts_that_are_not_there_are_refused():
    for parts, error in (("prunr/x", "No kind of the bench named 'prunr'"), ("pruner/rndom", "Did you mean 'random'")):
        with pytest.raises(ZooError, match=error):
            Options(parts=parts)


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ZooError, match="at least 0 and threads at least 1"):
        parse("compatibility", Options, ["pairs=-1"])
