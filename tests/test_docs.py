"""What the documents show runs, and every named model has its card."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import zoo

ROOT = Path(__file__).resolve().parents[1]
MODELS = sorted(p.stem for p in (ROOT / "conf" / "model").glob("*.yaml"))


def test_the_ten_lines_of_the_readme_run(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment()
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.strip().splitlines()
    assert len(shown) >= 10 and all(" " in line for line in shown)


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("name", MODELS)
def test_every_named_model_has_a_card(name):
    card = (ROOT / "model_cards" / f"{name}.md").read_text()
    assert re.match(r"---\nlicense: ", card) and f"# {name}\n" in card
    for words in ("library_name: zoo", "pipeline_tag: image-text-to-text", "**Limits.**", "**Licence.**"):
        assert words in card


@pytest.mark.parametrize("name", ["scenes_tiny", "llava_kd_tiny", "llava_mod_tiny"])
def test_models_that_ship_answer_offline_right_after_installation(name):
    from zoo import registry

    model, processor = zoo.load(name)
    assert sum(f.stat().st_size for f in (ROOT / "model_cards" / name).iterdir()) < 8 * 2**20
    scenes = registry.build("dataset", {"name": "scenes", "split": "eval"})
    from zoo.evaluate import evaluate

    scores = evaluate(model, processor, {"scenes": scenes}, limit=20, baselines=False).summary()
    assert scores["scenes/exist/accuracy"] > 0.9
    assert scores["scenes/color/accuracy"] > 0.9
    assert scores["scenes/box/iou"] > 0.6


def test_the_readme_names_the_commands_and_the_table_of_names():
    from zoo.registry import KINDS, names

    text = (ROOT / "README.md").read_text()
    assert "make quickstart" in text and "make test" in text
    missing = [f"{kind} {name}" for kind in KINDS for name in names(kind) if f"`{name}`" not in text]
    assert not missing
