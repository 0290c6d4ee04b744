"""`zoo test`: what `zoo new` writes keeps all rules; each way to break one is found, and said in words."""

import json

import pytest
import torch
from torch import nn

from zoo.cli import new
from zoo.cli.entry import main
from zoo.cli.test_command import options_for
from zoo.contracts.on_device import devices_of_outputs
from zoo.contracts.rules import BrokenRuleError, NotForThisPart
from zoo.registry import plugins

BAD = """
from dataclasses import dataclass

import torch
from torch import nn

from zoo.registry import ImageFeatures, Pruner, register


@dataclass
class Config:
    keep_ratio: float = 0.5


@register("pruner", "bad")
class Bad(Pruner, nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ratio, self.idle = config.keep_ratio, nn.Parameter(torch.ones(3))

    def num_tokens(self, n: int) -> int:
        return int(n * self.ratio) + 1

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        k = round(image.tokens.shape[1] * self.ratio)
        order = image.tokens.sum((0, 2)).argsort()[:k].sort().values  # of the whole batch
        return ImageFeatures((image.tokens[:, order] * torch.ones(1)).float(), image.grid)
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_plugins", {})


@pytest.mark.parametrize("kind", new.TEMPLATES)
def test_what_zoo_new_writes_keeps_every_rule(kind, capsys):
    assert main(["new", kind, f"own_{kind}"]) == 0
    capsys.readouterr()
    assert main(["test", f"plugins=[./own_{kind}.py]", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["parts"]
    assert report["part"] == f"{new.kind_of_template(kind)}/own_{kind}" and report["broken"] == 0
    assert sum(rule["word"] == "ok" for rule in report["rules"]) >= 4
    assert not [rule for rule in report["rules"] if "a rule before it broke" in rule["given"]]


def test_a_part_that_is_wrong_in_many_ways_has_a_line_for_each(tmp_path, capsys):
    (tmp_path / "bad.py").write_text(BAD)
    assert main(["test", "bad", "plugins=[./bad.py]", "keep_ratio=0.25"]) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    said = " ".join(out.split())
    for line in (
        "pruner/bad keep_ratio=0.25 BROKEN counts num_tokens(24) is 7, and forward gives (3, 6, 24) "
        "expected (3, 7, 24) (num_tokens(n) is the number of tokens",
        "BROKEN grid 7 tokens with the grid (4, 6) expected h * w tokens, or destroys 'grid'",
        "BROKEN in step rows of crops became None expected (2, 1)",
        "BROKEN alone image 0 alone differs by",
        "BROKEN keeps all num_tokens(24) is 25 expected 24",
        "BROKEN gradient no gradient reaches idle expected one for every parameter",
        "BROKEN dtype it gives torch.float32 expected torch.bfloat16",
        "BROKEN device Expected all tensors to be on the same device",
        "BROKEN options option 'keep_ratio' has no comment",
        "BROKEN fits pruner 'bad' returns 4 tokens of an image, and its num_tokens(16) is 5.",
        "- learns a rule before it broke: there is no model",
    ):
        assert line in said, out
    assert "10 broken" in out


def test_what_the_part_itself_raises_has_its_line(tmp_path, capsys):
    text = BAD.replace('"bad"', '"raises"').replace("        k = round", "        k = 1 // 0\n        k = round")
    (tmp_path / "raises.py").write_text(text)
    line = text.splitlines().index("        k = 1 // 0") + 1
    assert main(["test", "pruner/raises", "plugins=[./raises.py]"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"BROKEN counts ZeroDivisionError: integer division or modulo by zero (raises.py, line {line})" in said


OWN = ["pruner/fastv", "layout/native", "vision/qwen_vision", "pruner/fastervlm pruner.fastervlm.keep_ratio=0.5"]


@pytest.mark.parametrize("part", OWN)
def test_parts_of_the_zoo_are_tried_at_a_tiny_size(part, capsys):
    assert main(["test", *part.split(), "--json"]) == 0, capsys.readouterr().out
    rules = {rule["rule"]: rule for rule in json.loads(capsys.readouterr().out)["parts"][0]["rules"]}
    assert rules["fits"]["word"] == rules["saved"]["word"] == "ok"
    if part == "pruner/fastv":
        assert rules["layers"]["given"] == "16 16 8 8" and rules["without it"]["word"] == "ok"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["pruner/rndom"], "No pruner named 'rndom'. Did you mean 'random'?"),
        (["fastervml"], "No part is called 'fastervml'. Did you mean 'pruner/fastervlm'?"),
        (["prunr/random"], "No kind named 'prunr'. Did you mean 'pruner'?"),
        (["frames"], "'frames' is ambiguous: pruner/frames, layout/frames."),
        (["random", "kep_ratio=1"], "No option of pruner 'random' named 'kep_ratio'. Did you mean 'keep_ratio'"),
        (["random", "pool", "keep_ratio=1"], "'pool' is ambiguous: "),
        (["pruner/random", "projector/mlp", "keep_ratio=1"], "options are of one part, and 2 parts are to be tried"),
        (["mine", "plugins=[./mine.py]"], "Plugin './mine.py' does not load: FileNotFoundError"),
        (["--json"], "zoo test takes a part, such as pruner/my_pruner, or plugins=[...] that add one."),
        (["dataset/chat_json"], "file"),
    ],
)
def test_mistakes(words, error, capsys):
    assert main(["test", *words]) == 2
    assert error in capsys.readouterr().err


def test_fake_tensors_know_devices():
    class Part(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.make, self.weight = make, nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.make(x * self.weight)

    def found(make):
        return devices_of_outputs(Part(make), lambda part, x: part(x), torch.ones(2, 4))

    assert found(lambda x: x[:, torch.arange(2, device=x.device)]) == {"cuda"}
    assert found(lambda x: torch.ones(3)) == {"cpu"}
    with pytest.raises(BrokenRuleError, match="same device"):
        found(lambda x: x.gather(1, torch.zeros(2, 1, dtype=torch.long)))
    with pytest.raises(NotForThisPart, match="reads numbers"):
        found(lambda x: x * float(x.sum()))


def test_options_of_a_part_are_read_as_those_of_a_run():
    """A text stays what was typed, though YAML would read a number, a mapping or a comment."""
    found = options_for("dataset", "chat_json", ["file=0012", "data.prompt=1e5", "data.chat_json.system=a: b's #c"])
    assert found == {"file": "0012", "prompt": "1e5", "system": "a: b's #c"}
    assert options_for("pruner", "random", ["keep_ratio=0.5", "pruner.seed=3"]) == {"keep_ratio": 0.5, "seed": 3}
    assert options_for("dataset", "chat_json", ["file='a b'"]) == {"file": "a b"}
