"""Presets of components: written out before Hydra composes, weaker than what is given beside them, and checked."""

import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from zoo import registry
from zoo.checking.checker import check
from zoo.checking.plan import plan_from
from zoo.cli.complete import complete
from zoo.cli.entry import main
from zoo.cli.sweep import plan
from zoo.registry import KINDS, Preset, ZooError, completed, register, source_presets
from zoo.registry import table as core
from zoo.registry.source_text import presets_in
from zoo.settings.config import compose

HAVE = [(kind, name) for kind in KINDS for name in core.names(kind) if source_presets(kind, name)]
FASTERVLM = ["model=scenes_tiny", "pruner=[fastervlm]", "pruner.fastervlm.score=column_mean"]


@pytest.fixture
def styled():
    """A projector whose presets have values of all types."""
    from torch import nn

    from zoo.registry import Projector

    @dataclass
    class StyledConfig:
        depth: int = 1
        share: float = 0.5
        style: str = "plain"
        on: bool = False
        after: int | None = 3
        layers: list[int] = field(default_factory=list)
        words: list[str] = field(default_factory=list)

    @register("projector", "styled")
    class Styled(Projector, nn.Module):
        presets = {
            "odd": Preset(
                {"style": "it's ${a}, b=c", "on": True, "after": None, "layers": [1, 2], "words": ["1e5", "no"]},
                "nowhere",
            ),
            "1e5": Preset({"style": "null", "share": 1e-5}, "nowhere"),
        }

        def __init__(self, config: StyledConfig) -> None:
            super().__init__()

        def num_tokens(self, n: int) -> int:
            return n

        def forward(self, image):
            return image.tokens

    return Styled


@pytest.mark.parametrize(("kind", "name"), HAVE)
def test_presets_are_valid_and_shown_without_an_import(kind, name):
    entry = registry.get(kind, name)
    assert presets_in(core.source_of(kind, name), kind, name) == entry.presets
    for preset, values in entry.presets.items():
        whole = completed(kind, {"name": name, "preset": preset})
        assert "preset" not in whole and values.source and values.options.items() <= whole.items()


def test_the_methods_have_presets():
    known = {name for kind, name in HAVE if kind == "pruner"}
    assert known >= {"aim", "divprune", "fastervlm", "fastv", "hiprune", "holov", "visionzip", "vispruner"}


def test_counts_of_presets_are_those_of_their_names():
    """The number in a name is that of the tokens of an image, of five crops or of eight frames."""
    per = {"llava15": (1, 576), "llava_next": (5, 576), "video_llava": (8, 256)}
    for name in ("fastervlm", "vispruner", "hiprune", "visionzip", "divprune", "aim"):
        for preset in source_presets("pruner", name):
            model, _, total = preset.rpartition("_")
            if model in per:
                rows, n = per[model]
                part = registry.build("pruner", {"name": name, "preset": preset}, vision_depth=24)
                assert part.tokens_of_image(n, registry.Cut(rows)) == int(total), (name, preset)


def test_what_is_given_beside_a_preset_wins_wherever_it_stands():
    for words in (
        ["pruner.fastervlm.preset=llava15_29", "pruner.fastervlm.keep_ratio=0.5"],
        ["pruner.fastervlm.keep_ratio=0.5", "pruner.fastervlm.preset=llava15_29"],
        ["pruner.preset=llava15_29", "pruner.keep_ratio=0.5"],
    ):
        node = compose("load", [*FASTERVLM, *words]).pruner.fastervlm
        assert dict(node) == {"name": "fastervlm", "num_keep": 29, "keep_ratio": 0.5, "score": "column_mean"}
    node = compose("load", [*FASTERVLM, "pruner.fastervlm.preset=llava15_29", "pruner.fastervlm.num_keep=0"])
    assert node.pruner.fastervlm.num_keep == 0
    assert compose("load", [*FASTERVLM, "pruner.fastervlm.preset=null"]).pruner.fastervlm.num_keep == 0


def test_values_of_all_types_arrive(styled):
    words = ["model=scenes_tiny", "projector=styled", "projector.preset=odd"]
    with pytest.raises(ZooError, match=r"(?i)interpolation"):  # as for any text that holds one
        compose("load", words)
    styled.presets["odd"].options["style"] = "it's a, b=c"
    node = compose("load", words).projector
    assert (node.style, node.on, node.after, list(node.layers), list(node.words)) == (
        "it's a, b=c",
        True,
        None,
        [1, 2],
        ["1e5", "no"],
    )
    node = compose("load", [*words[:2], "projector.preset=1e5"]).projector
    assert (node.style, node.share) == ("null", 1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pruner.fastervlm.preset=lava15_29"], "No preset of pruner 'fastervlm' named 'lava15_29'. Did you mean"),
        (["pruner=[random]", "pruner.random.preset=llava15_29"], "No preset of pruner 'random' .* Available: none"),
        (["pruner=[random]", "pruner.fastervlm.preset=llava15_29"], "is not chosen in this run"),
        (["pruner=[random]", "pruner.preset=llava15_29"], "None of the chosen pruners has presets: random"),
        (["pruner.fastervlm.perset=llava15_29"], "No option of pruner 'fastervlm' named 'perset'"),
        (["layout.preset=x"], "'layout' holds no component"),
        (["vision.preset=x"], "No preset of vision 'timm' named 'x'. Available: efficientnet_lite0"),
        (["pruner=fastervlm@144"], "No pruner named 'fastervlm@144'. Did you mean 'fastervlm'"),
    ],
)
def test_mistakes_are_named(words, message):
    start = FASTERVLM[:1] if any(word.startswith("pruner=") for word in words) else FASTERVLM
    with pytest.raises(ZooError, match=message):
        compose("load", [*start, *words])


def test_files_and_nodes_take_presets(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "few.yaml").write_text(
        "# @package _global_\ndefaults:\n  - scenes_tiny\n  - override /pruner: [fastervlm]\n  - _self_\n"
        "pruner: {fastervlm: {preset: llava15_29, score: column_mean}}\n"
    )
    cfg = compose("load", ["model=few"], config_dir=tmp_path)
    assert (cfg.pruner.fastervlm.num_keep, cfg.pruner.fastervlm.score) == (29, "column_mean")
    cfg = compose("load", ["model=few", "pruner.fastervlm.num_keep=7"], config_dir=tmp_path)
    assert cfg.pruner.fastervlm.num_keep == 7
    part = registry.build("pruner", {"name": "fastervlm", "preset": "llava15_58", "score": "column_mean"})
    assert (part.config.num_keep, part.config.score) == (58, "column_mean")
    with pytest.raises(ZooError, match="Did you mean 'llava15_58'"):
        completed("pruner", {"name": "fastervlm", "preset": "llava15-58"})


def test_a_sweep_goes_through_presets():
    words = [*FASTERVLM[:1], "pruner=[fastervlm],[random]", "pruner.fastervlm.score=column_mean"]
    jobs = plan("train", [*words, "pruner.fastervlm.preset=llava15_29,null"]).jobs
    assert sorted(sum("pruner.fastervlm.num_keep=29" in line for line in job) for job in jobs) == [0, 0, 1]


def test_the_check_shows_what_was_resolved(capsys):
    words = [*FASTERVLM, "pruner.fastervlm.preset=llava15_29"]
    (note,) = [n for n in check(plan_from(compose("load", words))).notes if "preset" in n]
    assert "llava15_29 of pruner.fastervlm (the paper's LLaVA-1.5" in note and "num_keep=29" in note
    assert note.endswith("score=column_mean given beside it")
    assert main(["info", "pruner/fastervlm"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "pruner=[fastervlm] pruner.fastervlm.preset=..." in shown
    assert "llava15_144 num_keep=144 score=cls the paper's LLaVA-1.5: 75 % fewer of 576" in shown


def test_presets_are_completed():
    commands = {"train": True}
    assert "pruner.fastervlm.preset=" in complete("zoo train pruner=[fastervlm] pruner.fastervlm.", commands)
    assert "pruner.random.preset=" not in complete("zoo train pruner=[random] pruner.random.", commands)
    found = complete("zoo train pruner=[fastervlm] pruner.fastervlm.preset=llava15_1", commands)
    assert found == ["pruner.fastervlm.preset=llava15_144"]


def test_what_a_class_states_is_checked_when_it_registers(styled):
    @dataclass
    class TakesPreset(styled.__init__.__annotations__["config"]):
        preset: str = ""

    def of(presets, config=styled.__init__.__annotations__["config"]):
        def init(self, config) -> None:
            super(made, self).__init__(config)

        init.__annotations__["config"] = config
        made = type("Made", (styled,), {"presets": presets, "__init__": init})
        return register("projector", "made")(made)

    for presets, message in (
        (
            {"a": Preset({"dept": 2}, "")},
            "Preset 'a': No option of projector 'made' named 'dept'. Did you mean 'depth'",
        ),
        ({"a": {"depth": 2}}, "`presets` is a dict such as"),
        ([Preset({}, "")], "`presets` is a dict such as"),
    ):
        with pytest.raises(ZooError, match=message):
            of(presets)
    with pytest.raises(ZooError, match="cannot be called 'preset'"):
        of({"a": Preset({"depth": 2}, "")}, TakesPreset)


def test_reading_presets_imports_no_torch():
    code = (
        "import sys; from zoo.settings.overrides import prepare;"
        "prepare('load', ['model=scenes_tiny', 'pruner=[fastervlm]', 'pruner.fastervlm.preset=llava15_29']);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
