"""What cannot be taught is refused before a weight is loaded, with the reason and a fix that fits."""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

from tests.conftest import tiny_slots
from tests.teacher_builders import save_teacher
from zoo import registry
from zoo.checking import checker
from zoo.checking.checker import RefusedError, check
from zoo.checking.plan import Plan
from zoo.loading.build import load_teacher
from zoo.registry import ImageFeatures, ZooError
from zoo.settings.stage import Stage
from zoo.text.tokenizer import OF_MODEL

VISION, LLM = tiny_slots()["vision"], tiny_slots()["llm"]
EXPERTS = {"model_type": "mixtral", "num_experts": 2, "top_k": 1}
TILES = {"name": "tiles", "style": "joined"}
JOINED = {"name": "anyres", "pinpoints": [[64, 32]]}


@dataclass
class SeesConfig:
    size: int = 1


@pytest.fixture(scope="module", autouse=True)
def sees():
    """An adapter that takes images without putting tokens into the sequence; gone again after this file."""

    @registry.register("adapter", "sees")
    class Sees(nn.Module):
        needs, provides, destroys = frozenset({"image"}), frozenset(), frozenset()

        def __init__(self, config: SeesConfig, *, llm) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(config.size))

        def attach(self) -> None: ...

        def detach(self) -> None: ...

        def owns(self, name: str) -> bool:
            return False

        def condition(self, image: ImageFeatures | None, images_per_row, expand: int = 1) -> None: ...

        def aux_losses(self) -> dict:
            return {}

    yield
    registry.table._entries["adapter"].pop("sees")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, tokenizer):
    """Name -> teacher: plain, pooling, pruning, without a projector, of another grid."""
    place = tmp_path_factory.mktemp("teachers")
    slots = {
        "plain": {"llm": {**LLM, "hidden_size": 48}},
        "pooled": {"pruner": {"pool": {"name": "pool"}}},
        "pruned": {"pruner": {"random": {"name": "random", "keep_ratio": 0.5}}},
        "resampled": {"projector": {"name": "resampler", "num_queries": 8, "num_heads": 2}},
        "coarse": {"vision": {**VISION, "patch_size": 16}},
        "tiled": {"layout": TILES},
        "joined": {"layout": JOINED},
        "drops inside": {"pruner": {"fastv": {"name": "fastv", "layer": 1}}},
        "guarded": {"llm": {**LLM, **EXPERTS}, "adapter": {"moextend": {"name": "moextend", "guard": True}}},
        "adapted": {"adapter": {"lora": {"name": "lora", "rank": 4}}},
    }
    return {name: save_teacher(place / name, tokenizer, **more) for name, more in slots.items()}


def plan(teacher, distiller="llava_kd", tokenizer=True, **slots):
    stage = Stage(steps=1, distiller=distiller, teacher=teacher)
    made = {"tokenizer": f"{OF_MODEL}{teacher}"} if tokenizer else {"vocab_size": 360}
    return Plan(tiny_slots(**slots), stages={"dft": stage}, data=("scenes",), **made)


TEXT = {"name": "llava_kd", "visual_weight": 0.0, "relation_weight": 0.0}


@dataclass
class Case:
    teacher: str
    slots: dict = field(default_factory=dict)
    distiller: object = "llava_kd"
    reason: str = ""
    fix: str = ""
    tokenizer: bool = True


FITS = {
    "another width": Case("plain"),
    "pruned student, whole teacher": Case("plain", {"pruner": {"random": {}}}),
    "the same pooling": Case("pooled", {"pruner": {"pool": {}}}),
    "the same pooling, then pruned": Case("pooled", {"pruner": {"pool": {}, "random": {}}}),
    "the same pruning": Case("pruned", {"pruner": {"random": {"keep_ratio": 0.5}}}),
    "the same resampler": Case("resampled", {"projector": {"name": "resampler", "num_queries": 8, "num_heads": 2}}),
    "another encoder with the same grid": Case("plain", {"vision": {**VISION, "image_size": 64, "patch_size": 16}}),
    "the same tiles, fewer tokens": Case("tiled", {"layout": TILES, "pruner": {"random": {}}}),
    "crops that are joined, text only": Case("joined", {"layout": JOINED}, TEXT),
    "another grid, text only": Case("coarse", distiller=TEXT),
    "no image tokens, text only": Case("plain", {"projector": None, "adapter": {"sees": {}}}, TEXT),
    "kl needs no image tokens": Case("plain", {"projector": None, "adapter": {"sees": {}}}, "kl"),
    "hidden states of one width": Case("pruned", distiller={"name": "kl", "hidden_layers": {-1: -1}}),
}  # fmt: skip

NO_VISUAL = "stages.dft.distiller={name:llava_kd,visual_weight:0.0,relation_weight:0.0}"
REFUSED = {
    "a tokenizer of its own": Case(
        "plain",
        tokenizer=False,
        reason="would train a tokenizer of its own",
        fix="tokenizer.checkpoint=model:{teacher}",
    ),
    "another grid": Case(
        "coarse", reason=r"lays 4 x 4 cells \(squash|lays 4 x 4 cells \(crop.*the teacher's 2 x 2", fix=NO_VISUAL
    ),
    "no image tokens": Case(
        "plain", {"projector": None, "adapter": {"sees": {}}}, reason="the student has none", fix=NO_VISUAL
    ),
    "a teacher that drops": Case("pruned", reason=r"pruners \[random\] are not those", fix=NO_VISUAL),
    "other pruning": Case(
        "pruned", {"pruner": {"random": {"keep_ratio": 0.25}}}, reason=r"\[random\] are not those", fix=NO_VISUAL
    ),
    "a student that merges": Case("plain", {"pruner": {"pool": {}}}, reason="'pool' makes new tokens", fix=NO_VISUAL),
    "tiles on one side": Case("tiled", reason="student's layout is none, the teacher's TilesConfig", fix=NO_VISUAL),
    "crops that are joined": Case(
        "joined", {"layout": JOINED}, reason="student's layout 'anyres' makes something else", fix=NO_VISUAL
    ),
    "other projectors": Case("resampled", reason="'mlp' and projector 'resampler'", fix=NO_VISUAL),
    "hidden states of other widths": Case(
        "plain",
        distiller={"name": "kl", "hidden_layers": {-1: -1}},
        reason="one width: the student has 32, the teacher 48",
        fix="~stages.dft.distiller.hidden_layers",
    ),
    "a teacher that drops inside its LLM": Case("drops inside", reason="'fastv' drops some inside", fix=NO_VISUAL),
    "a head on text alone needs no teacher": Case(
        "plain", distiller="dense", reason="'dense' asks nothing of a teacher"
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_what_fits_is_taught(name, teachers):
    case = FITS[name]
    check(plan(teachers[case.teacher], case.distiller, case.tokenizer, **case.slots))


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name, teachers, monkeypatch):
    monkeypatch.setattr(checker, "_MOST_TRIES", 4)  # the fixes of teaching come first
    case, teacher = REFUSED[name], teachers[REFUSED[name].teacher]
    with pytest.raises(RefusedError, match=f"(?s)Stage 'dft': .*{case.reason}") as refusal:
        check(plan(teacher, case.distiller, case.tokenizer, **case.slots), fixes=3 if case.fix else 0)
    if case.fix:
        assert case.fix.replace("{teacher}", teacher) in refusal.value.fixes


@pytest.mark.fixes
def test_another_tokenizer_is_refused(teachers, tmp_path):
    from zoo.text.tokenizer import train_tokenizer

    train_tokenizer(["other words than those, of another kind"] * 5, 300, "plain").save_pretrained(tmp_path)
    wanted = replace(plan(teachers["plain"]), tokenizer=str(tmp_path))
    with pytest.raises(RefusedError, match="different tokenizers: token 2") as refusal:
        check(wanted)
    assert f"tokenizer.checkpoint=model:{teachers['plain']}" in refusal.value.fixes


def test_weights_that_know_other_words_are_not_given_the_tokenizer_of_the_teacher(teachers, tmp_path):
    """It would fit, and each id would mean another word than the language model learnt."""
    from zoo.text.tokenizer import train_tokenizer

    train_tokenizer(["other words than those, of another kind"] * 5, 300, "plain").save_pretrained(tmp_path)
    wanted = replace(plan(teachers["plain"]), tokenizer=str(tmp_path), trained=True)
    with pytest.raises(RefusedError, match="know the words of its own tokenizer alone: name a teacher") as refusal:
        check(wanted)
    assert not any("tokenizer.checkpoint" in fix for fix in refusal.value.fixes)


def test_a_teacher_that_is_the_student_is_refused(teachers):
    from zoo.checking.plan import plan_from
    from zoo.settings import config as configs

    name = teachers["plain"]
    own = replace(plan_from(configs.compose("load", [f"model='{name}'"])), data=("scenes",))
    stages = {"dft": Stage(steps=1, distiller="llava_kd", teacher=name)}
    with pytest.raises(RefusedError, match="is the student itself"):
        check(replace(own, stages=stages))
    pruned = {**own.slots, "pruner": {"random": {"name": "random"}}}
    check(replace(own, stages=stages, slots=pruned))  # learning to do with fewer tokens is something else
    check(replace(own, stages={"dft": replace(stages["dft"], keep_range=[0.2, 0.8])}))
    check(replace(own, stages={"first": Stage(steps=1), **stages}))  # and so is staying near what it was


def test_rows_that_the_teacher_cannot_keep_apart_are_refused(teachers):
    stage = Stage(steps=1, distiller="kl", teacher=teachers["drops inside"])
    given = Plan(tiny_slots(), stages={"dft": stage}, tokenizer=f"{OF_MODEL}{stage.teacher}")
    assert "of the teacher pruner 'fastv' chooses" in check(given).stages[0].one_dialog
    for pack_length, message in ((None, ""), (90, "of the teacher adapter 'moextend' changes its LLM for a whole row")):
        stage = Stage(steps=1, distiller="kl", teacher=teachers["guarded"], pack_length=pack_length)
        with nullcontext() if not message else pytest.raises(RefusedError, match=message):
            check(replace(given, stages={"dft": stage}), fixes=0)


def test_the_teachers_memory_counts(teachers):
    teacher = plan(teachers["plain"])
    alone = replace(teacher, stages={"dft": Stage(steps=1)})
    taught, plain = (check(p).stages[0].memory.weights for p in (teacher, alone))
    assert taught - plain > 50_000


@pytest.mark.parametrize(
    "options, precision",
    [
        ({}, "bf16"),
        ({"device": "cpu"}, "bf16"),
        ({"dtype": "float32"}, "bf16"),
        ({"bits": 8}, "fp32"),
        ({"bits": 4}, "bf16"),
    ],
)
def test_a_teachers_memory_is_that_of_its_weights_as_they_are_loaded(options, precision, teachers):
    node = {"model": teachers["adapted"], **options}
    stage = Stage(steps=1, distiller="kl", teacher=node, precision=precision)
    given = Plan(tiny_slots(), stages={"dft": stage}, tokenizer=f"{OF_MODEL}{node['model']}", device="cpu")
    alone = replace(given, stages={"dft": Stage(steps=1, precision=precision)})
    taught, plain = (check(p).stages[0].memory.weights for p in (given, alone))
    model, _ = load_teacher(stage.teacher_node, device=torch.device("cpu"), precision=precision)
    there = [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith(("weight_bits", "scale")))]
    assert taught - plain == pytest.approx(sum(t.nbytes for t in there), rel=0.02)


def test_the_memory_of_a_teacher_elsewhere_is_not_that_of_the_stage(teachers):
    found = []
    for device in ("cpu", "cuda"):
        stage = Stage(steps=1, distiller="kl", teacher={"model": teachers["plain"], "device": device})
        plain = Plan(tiny_slots(), stages={"dft": stage}, tokenizer=f"{OF_MODEL}{teachers['plain']}", device="cpu")
        found.append(check(plain).stages[0].memory.weights)
    assert found[0] - found[1] > 50_000


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"modle": "x"}, "'modle'. Did you mean 'model'"),
        ({}, None),
        ({"model": "x", "store": "y"}, "give one"),
        (3, "a model's name or a mapping"),
    ],
)
def test_teachers_that_a_stage_cannot_name(teacher, message):
    if message is None:
        assert Stage(steps=1, teacher=teacher).teacher_node is None
        return
    with pytest.raises(ZooError, match=message):
        Stage(steps=1, teacher=teacher)
