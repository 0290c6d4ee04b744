"""`zoo bench fusion` runs on tiny sizes and states its bounds; a method that is not there is refused."""

import json

import pytest

from zoo.benches.fusion import METHODS, Options
from zoo.cli.bench import main, parse
from zoo.registry import ZooError

TINY = ["sizes=tiny", "rounds=1", "steps=1", "device=cpu"]


def measured(tmp_path, only):
    assert main(["fusion", *TINY, f"only={only}", f"json={tmp_path / 'rows.json'}"]) == 0
    return {row["what"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}


def test_vlora_is_bounded_by_its_flops_and_in_decoding(tmp_path):
    rows = measured(tmp_path, "vlora")
    bounds = [row["bound"] for row in rows.values()]
    assert bounds == [None, 1.3, None, 1.08]
    assert all(row["value"]["median"] > 0 for row in rows.values())


def test_pool_falls_with_the_number_of_tokens(tmp_path):
    rows = measured(tmp_path, "pool")
    assert [what for what in rows if "projector and prefill" in what and "mlp" in what] == [
        f"pool, projector and prefill, {n} tokens: against mlp on 576" for n in (144, 64, 36, 16)
    ]
    shares = [float(row["note"].split()[1][:-1]) for what, row in rows.items() if "mlp" in what]
    assert shares == sorted(shares[:4], reverse=True) + sorted(shares[4:], reverse=True) and max(shares) < 1


def test_routed_adapters_are_bounded_in_time_and_activations(tmp_path):
    rows = measured(tmp_path, "mole,moextend")
    bounds = [(row["what"].split(",")[0], row["bound"]) for row in rows.values() if row["bound"]]
    assert bounds == [("mole", 1.10), ("mole", 1.2), ("mole", 1.10), ("mole", 1.2), ("moextend", 1.15)]
    assert all(row["value"]["median"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("only=vlroa", "No method named 'vlroa'. Did you mean 'vlora'"),
        ("sizes=m10", "No sizes named 'm10'"),
        ("dtype=float23", "No dtype named 'float23'. Did you mean 'float32'"),
        ("rows=0", "rows must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(word, message):
    with pytest.raises(ZooError, match=message):
        parse("fusion", Options, [word])


def test_every_method_has_its_file():
    from importlib.util import find_spec

    assert all(find_spec(module) for module in METHODS.values())
