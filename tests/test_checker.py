"""The check: what does not fit is refused with its reason and fixes that fit; what passes really runs."""

import itertools
import json
import random
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from tests.conftest import ANSWERS, QUESTIONS, sample, tiny_slots
from zoo import registry
from zoo.checking import checker
from zoo.checking.checker import RefusedError, check, show
from zoo.checking.data_check import check_data
from zoo.checking.plan import Plan, plan_from
from zoo.registry import ImageFeatures, Pruner, ZooError
from zoo.settings.config import compose
from zoo.settings.stage import Stage
from zoo.text.sizes import size_text

TIMM = tiny_slots()["vision"]
LLM = tiny_slots()["llm"]
LORA = {"rank": 2}


@dataclass
class NeedyConfig:
    pass


@pytest.fixture(scope="module", autouse=True)
def parts_with_needs():
    """Parts that need what not every composition gives; gone again after this file."""

    @registry.register("pruner", "needs_cls")
    class NeedsCls(nn.Module):
        needs, provides, destroys = frozenset({"cls_attention"}), frozenset(), frozenset({"grid"})

        def __init__(self, config: NeedyConfig) -> None:
            super().__init__()

        def num_tokens(self, n: int) -> int:
            return n // 2

        def forward(self, image: ImageFeatures) -> ImageFeatures:
            return ImageFeatures(image.tokens[:, : image.tokens.shape[1] // 2], None)

    @registry.register("adapter", "needs_moe")
    class NeedsExperts(nn.Module):
        needs, provides, destroys = frozenset({"moe"}), frozenset(), frozenset()

        def __init__(self, config: NeedyConfig) -> None:
            super().__init__()

        def attach(self) -> None: ...

        def detach(self) -> None: ...

        def owns(self, name: str) -> bool:
            return False

    @registry.register("projector", "needs_grid")
    class NeedsGrid(nn.Module):
        needs, provides, destroys = frozenset({"grid"}), frozenset(), frozenset()

        def __init__(self, config: NeedyConfig) -> None:
            super().__init__()

        def num_tokens(self, n: int) -> int:
            return n

        def forward(self, image: ImageFeatures): ...

    @registry.register("distiller", "needs_teacher")
    class NeedsTeacher(nn.Module):
        needs = frozenset({"teacher.logits"})

        def __init__(self, config: NeedyConfig) -> None:
            super().__init__()

        def forward(self, student, teacher, batch): ...

    yield
    for kind, name in [
        ("pruner", "needs_cls"),
        ("adapter", "needs_moe"),
        ("projector", "needs_grid"),
        ("distiller", "needs_teacher"),
    ]:
        del registry.table._entries[kind][name]


@pytest.mark.parametrize(
    ("kind", "name", "given", "meant"),
    [
        ("pruner", "needs_cls", "cls_atention", "cls_attention"),
        ("adapter", "needs_moe", "mo", "moe"),
        ("distiller", "needs_teacher", "teacher.logit", "teacher.logits"),
    ],
)
def test_a_misspelt_need_names_the_nearest(monkeypatch, kind, name, given, meant):
    monkeypatch.setattr(registry.get(kind, name).cls, "needs", frozenset({given}))
    slots = stage(distiller=name, teacher="scenes_tiny") if kind == "distiller" else {kind: {name: {}}}
    with pytest.raises(RefusedError, match=f"'?{given}'?.*Did you mean '{meant}'"):
        check(plan_with(slots), fixes=0)


def vision(**options):
    return {"vision": {**TIMM, **options}}


def llm(**options):
    return {"llm": {**LLM, **options}}


def stage(**options):
    return {"stages": {"main": lambda: Stage(**{"steps": 1, **options})}}


# (what is wrong, changes to the slots or to the plan, what the refusal must say)
FAULTS = [
    ("no encoder under a projector", {"vision": None}, "projector 'mlp' has no image tokens: the slot vision is empty"),
    ("no encoder under a pruner", {"vision": None, "projector": None, "pruner": {"random": {}}}, "pruner 'random' has no image tokens"),
    ("image reaches nothing", {"projector": None}, "The image reaches nothing"),
    ("no llm", {"llm": None}, "slot llm is empty"),
    ("layer too low", vision(layer=-9), "vision 'timm'.*layer must be 1 to 2, or -2 to -1.*got -9"),
    ("layer too high", vision(layer=7), "layer must be 1 to 2.*got 7"),
    ("layer beyond a deeper tower", {"vision": {"name": "hf", "image_size": 32, "depth": 3, "width": 32, "heads": 2, "layer": 5}}, "layer must be.*got 5"),
    ("image no multiple of patches", vision(image_size=30), "30.*8|8.*30"),
    ("heads do not divide width", vision(heads=3), "32.*3|3.*32"),
    ("unknown timm model", {"vision": {"name": "timm", "model": "vit_tiny_patch16_244"}}, "vit_tiny_patch16_224"),
    ("unknown family of towers", {"vision": {"name": "hf", "model_type": "siglib"}}, "siglip"),
    ("tower folder that is not there", {"vision": {"name": "hf", "checkpoint": "./no/such"}}, "no/such"),
    ("positions too short", llm(max_positions=32), "llm 'hf' has 32 positions; one image of 16 tokens and 64 of text need 80"),
    ("positions one too short", llm(max_positions=79), "79 positions"),
    ("positions too short for a finer grid", {**vision(patch_size=2), **llm(max_positions=256)}, "one image of 256 tokens"),
    ("heads do not divide the llm", llm(num_heads=3), "32 is not a multiple of num_heads 3"),
    ("key heads do not divide heads", llm(num_heads=4, num_kv_heads=3), "num_heads 4 is not a multiple of num_kv_heads 3"),
    ("no layers", llm(num_layers=0), "num_layers must be at least 1, got 0"),
    ("unknown family of llms", llm(model_type="lama"), "lama.*llama"),
    ("unknown field of a family", llm(extra={"rope_thetta": 1}), "rope_thetta"),
    ("more experts at work than there are", llm(model_type="mixtral", num_experts=2, top_k=3), "runs top_k=3 experts for each token and has num_experts=2"),
    ("fewer experts than the family runs", llm(model_type="qwen3_moe", num_experts=4), "by default runs top_k=8 experts for each token and has num_experts=4"),
    ("linears of experts that have none", {**llm(model_type="mixtral", num_experts=2, top_k=1), "adapter": {"lora": {**LORA, "targets": ["gate_proj"]}}}, "Its experts are fused tensors such as 'model.layers.0.mlp.experts.gate_up_proj'"),
    ("balance loss of a dense llm", llm(router_aux_coef=0.1), "router_aux_coef is for MoE LLMs"),
    ("llm folder that is not there", {"llm": {"name": "hf", "checkpoint": "./no/such"}}, "no/such"),
    ("grid destroyed before it is needed", {"pruner": {"random": {}, "pool": {}}}, "pruner 'pool' needs grid, but pruner 'random' destroys it"),
    ("grid destroyed before the projector", {"pruner": {"random": {}}, "projector": {"name": "needs_grid"}}, "projector 'needs_grid' needs grid, but pruner 'random' destroys it"),
    ("encoder without [CLS]", {**vision(cls_token=False), "pruner": {"needs_cls": {}}}, "pruner 'needs_cls' needs cls_attention, but vision 'timm' does not give it"),
    ("SigLIP has no [CLS]", {"vision": {"name": "hf", "model_type": "siglip", "image_size": 32, "depth": 2, "width": 32, "heads": 2}, "pruner": {"needs_cls": {}}}, "needs cls_attention"),
    ("experts on a dense llm", {"adapter": {"needs_moe": {}}}, "adapter 'needs_moe' needs moe, but llm 'hf' does not give it"),
    ("keep ratio of nothing", {"pruner": {"random": {"keep_ratio": 0.0}}}, r"keep_ratio.*\(0, 1\].*0.0"),
    ("keep ratio above one", {"pruner": {"random": {"keep_ratio": 1.5}}}, "keep_ratio.*1.5"),
    ("pooling to more than the grid", {"pruner": {"pool": {"target": [9, 9]}}}, r"target \[9, 9\] is larger than the grid \[4, 4\]"),
    ("no queries", {"projector": {"name": "resampler", "num_queries": 0}}, "num_queries.*0"),
    ("no depth", {"projector": {"name": "mlp", "depth": 0}}, "depth.*0"),
    ("adapter on linears that are not there", {"adapter": {"lora": {**LORA, "targets": ["q_prj"]}}}, "q_prj.*q_proj"),
    ("two adapters on one linear", {"adapter": {"lora": LORA, "mole": {"rank": 2}}}, r"adapter 'mole' and adapter 'lora' both take \d+ modules"),
    ("rank of nothing", {"adapter": {"lora": {"rank": 0}}}, "rank.*0"),
    ("unknown pruner", {"pruner": {"randum": {}}}, "No pruner named 'randum'. Did you mean 'random'"),
    ("unknown option", {"pruner": {"random": {"keep_ration": 0.5}}}, "'keep_ration'. Did you mean 'keep_ratio'"),
    ("wrong type", {"pruner": {"random": {"keep_ratio": "half"}}}, "keep_ratio.*half"),
    ("code in a config", {"projector": {"name": "mlp", "_target_": "os.system"}}, "'_target_'"),
    ("interpolation in a config", {"projector": {"name": "mlp", "depth": "${oc.env:HOME}"}}, "interpolation"),
    ("unknown projector", {"projector": {"name": "mpl"}}, "Did you mean 'mlp'"),
    ("CUDA where there is none", {"device": "cuda"}, "finds no CUDA device"),
    ("unknown device", {"device": "tpu"}, "there is no such device"),
    ("unknown precision", {"precision": "fp8"}, "No precision named 'fp8'"),
    ("flash attention without CUDA", {"attention": "flash_attention_2"}, "flash_attention_2 runs on CUDA only"),
    ("a kernel that a family lacks", {**llm(model_type="gemma2"), "attention": "sdpa"}, "attention 'sdpa' cannot run: Gemma2ForCausalLM has none"),
    ("tokens dropped inside GPT-2", {**llm(model_type="gpt2"), "pruner": {"aim": {}}}, "pruner 'aim' cannot drop tokens inside 'gpt2', which has an output"),
    ("vocabulary below the bytes", {"vocab_size": 100}, "vocab_size must be at least 260"),
    ("unknown template", {"template": "chatlm"}, "No chat template named 'chatlm'. Did you mean 'chatml'"),
    ("placeholders of another pruner", {"placeholders": 9}, "writes 9 placeholders for an image, but the parts make 16"),
    ("a part that does not exist trains", stage(train=["projectr"]), "Stage 'main'.*'projectr'. Did you mean 'projector'"),
    ("an adapter that is not there trains", stage(train=["adapter"]), "Stage 'main'.*'adapter'"),
    ("everything frozen", stage(train=["projector"], freeze=["all"]), "Nothing trains"),
    ("data that is not there", stage(data={"scens": 1.0}), "No data named 'scens'"),
    ("a distiller that needs a teacher", stage(distiller="needs_teacher"), "needs a teacher: set stages.main.teacher"),
    ("a teacher without a distiller", stage(teacher="scenes_tiny"), "a teacher is named, but no distiller"),
    ("unknown distiller", stage(distiller="dence"), "Did you mean 'dense'"),
    ("packed rows beyond a sliding window", {**llm(model_type="mistral", extra={"sliding_window": 96}), **stage(pack_length=128)}, "longer than the LLM's sliding window of 96.*pack_length=null"),
    ("packed rows of states", {**llm(model_type="falcon_h1"), **stage(pack_length=128)}, "'falcon_h1' carry a state from token to token.*set pack_length=null"),
    ("nothing to learn", stage(loss_weights={"answer": 0.0}), "nothing is learnt"),
]  # fmt: skip


def plan_with(changes: dict) -> Plan:
    changes = dict(changes)
    given = {
        k: changes.pop(k)
        for k in ("device", "precision", "attention", "vocab_size", "template", "placeholders")
        if k in changes
    }
    stages = {name: make() for name, make in changes.pop("stages", {}).items()}
    return Plan(tiny_slots(**changes), **{"vocab_size": 360, **given}, stages=stages, data=("scenes",))


@pytest.mark.parametrize(("changes", "reason"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_what_does_not_fit_is_refused_with_its_reason(changes, reason, monkeypatch):
    walk, walked = checker._report_of, []

    def first(plan):
        walked.append(plan)
        if len(walked) > 1:
            raise ZooError("whether a fix fits is what the next test asks")
        return walk(plan)

    monkeypatch.setattr(checker, "_report_of", first)
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(ZooError, match=f"(?s){reason}") as refusal:
        check(plan_with(changes))
    assert len(getattr(refusal.value, "fixes", [])) <= 3


@pytest.mark.fixes
@pytest.mark.parametrize(
    ("changes", "fixes"),
    [
        ({"projector": None}, ["projector=linear", "projector=mlp"]),
        (llm(max_positions=32), ["llm.max_positions=128"]),
        (vision(layer=-9), ["vision.layer=-2"]),
        ({"pruner": {"random": {}, "pool": {}}}, ["pruner=[pool,random]"]),
        ({"adapter": {"lora": {**LORA, "targets": ["q_prj"]}}}, ["adapter.lora.targets=[all-linear]"]),
        ({"adapter": {"mole": {}, "lora": LORA}}, ["adapter.lora.targets=[q_proj,k_proj,v_proj,o_proj]"]),
        ({"attention": "flash_attention_2", "precision": "bf16"}, ["attention=auto"]),
        ({**llm(model_type="gemma2"), "attention": "sdpa"}, ["attention=auto"]),
        (stage(train=["projector"], freeze=["all"]), ["stages.main.freeze=[]"]),
        ({"template": "chatlm"}, ["tokenizer.chat_template=plain"]),
    ],
)
def test_fixes_are_offered_and_fit(changes, fixes):
    with pytest.raises(RefusedError) as refusal:
        check(plan_with(changes))
    assert set(fixes) <= set(refusal.value.fixes)
    assert all(f"fix {i}: {fix}" in str(refusal.value) for i, fix in enumerate(refusal.value.fixes, 1))


@pytest.mark.fixes
def test_fixes_of_trained_models_leave_their_weights_alone():
    import zoo

    for name, first in (("dart", "pruner.dart.layer=1"), ("holov", "pruner.holov.score=column_mean")):
        with pytest.raises(RefusedError) as refusal:
            zoo.check("fashion_tiny", f"pruner=[{name}]")
        assert refusal.value.fixes[0] == first
        zoo.load("fashion_tiny", f"pruner=[{name}]", first)


def test_parts_are_compared_with_stored_weights_and_fixes_fit_them():
    import zoo

    for word, why, fix in (
        ("vision.layer=1", "unknown in vision: 12 tensors", "vision.layer=-1"),
        ("llm.hidden_size=64", "other shape: llm.lm.lm_head.weight: (426, 128) in the file", "llm.hidden_size=128"),
    ):
        with pytest.raises(RefusedError, match="do not fit the model") as refusal:
            zoo.check("scenes_tiny", word, fixes=1)
        assert why in refusal.value.reason and refusal.value.fixes == [fix]
    zoo.check("scenes_tiny", "adapter=[lora]")  # a new adapter may start without weights


@pytest.mark.fixes
def test_tokenizers_that_cannot_end_an_answer_are_refused(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again.chat_template = None
    again.save_pretrained(tmp_path / "no_template")
    (tmp_path / "no_template" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ZooError, match="no chat template") as refusal:
        check(Plan(tiny_slots(), tokenizer=str(tmp_path / "no_template")))
    assert "tokenizer.chat_template=plain" in refusal.value.fixes
    again = AutoTokenizer.from_pretrained(tmp_path)
    again.eos_token = None
    again.save_pretrained(tmp_path / "ends")  # its template ends answers with a token, which becomes that of the end
    check(Plan(tiny_slots(), tokenizer=str(tmp_path / "ends")))
    for about in ({"tokenizer": str(tmp_path / "ends")}, {"vocab_size": 512, "template": "plain"}):
        with pytest.raises(ZooError, match="No variable of the chat template named 'enable_thinking'"):
            check(Plan(tiny_slots(), **about, template_options={"enable_thinking": False}), fixes=0)
    again.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    again.save_pretrained(tmp_path / "no_end")
    with pytest.raises(ZooError, match="no end-of-sequence token"):
        check(Plan(tiny_slots(), tokenizer=str(tmp_path / "no_end")))


def test_a_checkpoint_is_walked_without_its_weights(tmp_path):
    """The folder holds config.json alone: a walk that read weights would fail."""
    from transformers import LlamaConfig

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 400,
    }
    LlamaConfig(**sizes).save_pretrained(tmp_path)
    walk = check(Plan(tiny_slots(llm={"name": "hf", "checkpoint": str(tmp_path)}), vocab_size=360))
    assert walk.rows[-1].kind == "llm" and walk.rows[-1].width == 32


def compositions(count: int, seed: int = 0) -> list[dict]:
    """Random valid compositions of the parts that ship with the zoo."""
    towers = [
        TIMM,
        {**TIMM, "cls_token": False, "stem": "conv"},
        {**TIMM, "registers": 2, "layer": 1},
        {"name": "hf", "image_size": 32, "patch_size": 8, "depth": 2, "width": 32, "heads": 2},
        {
            "name": "hf",
            "model_type": "siglip",
            "image_size": 32,
            "patch_size": 8,
            "depth": 2,
            "width": 32,
            "heads": 2,
            "layer": -1,
        },
        {"name": "hf", "model_type": "dinov2", "image_size": 32, "patch_size": 8, "depth": 2, "width": 32, "heads": 2},
        {"name": "open_clip", "image_size": 32, "patch_size": 8, "depth": 2, "width": 32, "heads": 2},
    ]
    pruners = [
        {},
        {"random": {"keep_ratio": 0.5}},
        {"pool": {"stride": 2}},
        {"pool": {"stride": 2}, "random": {"keep_ratio": 0.5}},
    ]
    projectors = [
        {"name": "linear"},
        {"name": "mlp"},
        {"name": "mlp", "depth": 1},
        {"name": "resampler", "num_queries": 4, "num_heads": 2},
    ]
    llms = [
        {**LLM, "model_type": t, "num_kv_heads": k}
        for t in ("llama", "qwen2", "qwen3", "mistral", "gemma", "starcoder2")
        for k in (1, 2)
    ]
    llms += [
        {**LLM, "model_type": "phi3"},
        {**LLM, "model_type": "smollm3"},
        {**LLM, "model_type": "mixtral", "num_experts": 2, "top_k": 1},
    ]
    adapters = [{}, {"lora": LORA}]
    trains = [["all"], ["projector"], ["vision", "llm"]]
    every = list(itertools.product(towers, pruners, projectors, llms, adapters, trains))
    keys = ("vision", "pruner", "projector", "llm", "adapter", "train")
    return [dict(zip(keys, c, strict=True)) for c in random.Random(seed).sample(every, count)]


def test_what_passes_really_runs_a_step(make_model, tokenizer):
    for composition in compositions(70):  # every part, family and stage is among them
        train = composition.pop("train")
        walk = check(
            Plan(tiny_slots(**composition), vocab_size=len(tokenizer), stages={"main": Stage(train=train, steps=1)})
        )
        model, processor = make_model(**composition)
        assert walk.num_image_tokens == processor.num_image_tokens == model.num_image_tokens
        assert [r.tokens for r in walk.rows] == [s.tokens for s in model.steps]
        trainable = model.train().set_trainable(train)
        assert trainable == walk.stages[0].trainable
        batch = processor.collate([processor.encode(sample((QUESTIONS[0], ANSWERS[0]), (QUESTIONS[1], ANSWERS[2])))])
        loss = model(**batch).loss
        loss.backward()
        assert loss.isfinite(), composition
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not [n for n in without if "experts" not in n], (composition, without)


@pytest.mark.parametrize(
    ("count", "gives", "said"),
    [
        (lambda self, n: n * 0.5, None, r"its num_tokens\(16\) gives 8.0, and has to give a whole number"),
        (lambda self, n, grid: n, None, r"fails in num_tokens\(16\): TypeError: .*'grid'"),
        (lambda self, n: n, lambda image: image.tokens, "gives a Tensor, and has to give ImageFeatures"),
        (lambda self, n: n, lambda image: None, "gives nothing, and has to give ImageFeatures"),
    ],
)
def test_a_part_that_breaks_its_kind_is_named(count, gives, said):
    class Wrong(Pruner, nn.Module):
        num_tokens = count

        def __init__(self, config: NeedyConfig) -> None:
            super().__init__()

        def forward(self, image: ImageFeatures):
            return gives(image)

    registry.register("pruner", "wrong")(Wrong)
    try:
        with pytest.raises(RefusedError, match=f"pruner 'wrong'.*{said}"):
            check(plan_with({"pruner": {"wrong": {}}}), fixes=0)
    finally:
        del registry.table._entries["pruner"]["wrong"]


def test_the_walk_is_shown(capsys):
    show(check(Plan(tiny_slots(pruner={"random": {}}), vocab_size=360, stages={"main": Stage(steps=1)})), "It fits.")
    shown = capsys.readouterr().out
    for words in (
        "vision timm",
        "4x4",
        "pruner random",
        "destroys grid",
        "4 image tokens = placeholders",
        "stage main: trains",
    ):
        assert words in shown


@pytest.mark.parametrize(("count", "text"), [(7, "7"), (1500, "1.5 K"), (23_400_000, "23.4 M"), (7.1e9, "7.1 G")])
def test_sizes_for_people(count, text):
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("family", "options", "layers"),
    [
        ("llama", {}, [1]),
        ("mixtral", {}, [1]),
        ("gemma2", {}, [2]),  # sliding and full attention in turns
        ("qwen2_moe", {"extra": {"mlp_only_layers": [0]}}, [2]),
        ("llama", {"num_layers": 1}, [1]),
    ],
)
def test_as_many_layers_are_run_as_tell_something(family, options, layers, monkeypatch):
    from tests.fusion_builders import llm_node
    from zoo.checking import counts

    node, run, inner = llm_node(family, **{"num_layers": 4, **options}), [], counts._tried

    def tried(run_it, part, *args):
        run.append(part.num_layers)
        return inner(run_it, part, *args)

    monkeypatch.setattr(counts, "_tried", tried)
    with torch.device("meta"):
        llm = registry.build("llm", node, vocab_size=300)
    counts._check_llm(node, llm)
    assert run == layers
    monkeypatch.setattr(type(llm.layers[-1]), "forward", None)
    with pytest.raises(ZooError, match=f"llm 'hf' of type '{family}' fails when it is run"):
        counts._check_llm(node, llm)
    assert run[len(layers) :] == sorted({*layers, llm.num_layers})


@pytest.mark.parametrize(
    "changes, reason",
    [
        (llm(model_type="falcon_h1"), "carry a state from token to token"),
        (llm(model_type="bloom"), "takes a mask of padding alone"),
        (llm(model_type="mistral", extra={"sliding_window": 16}), "sliding window of 16 is shorter than a row"),
        (llm(model_type="mistral", extra={"sliding_window": 17}), ""),
    ],
)
def test_several_dialogs_of_an_image_do_not_share_a_row_where_they_would_mix(changes, reason):
    found = check(plan_with({**changes, **stage()})).stages[0].one_dialog
    assert reason in found and bool(reason) == bool(found)
    assert not check(plan_with({**changes, **stage(pack="none")})).stages[0].one_dialog


@pytest.mark.parametrize(
    "words, reason",
    [
        (
            ["parallel.gather=bf16", "stages.a.precision=fp32"],
            "parallel.gather=bf16 gathers weights for products in bf16",
        ),
        (["features.keep=bf16"], "features.keep does not work with FSDP"),
        (["features.keep=bf16", "stages.a.train=[all]"], ""),  # nothing is kept of an encoder that trains
        (["parallel.gather=bf16"], ""),  # precision=auto is bf16 on the devices that it is for
    ],
)
def test_what_a_model_in_shards_does_not_do_is_refused(words, reason):
    words = ["recipe=null", "model=scenes_tiny", "data=[scenes]", "+stages.a={train: [projector], steps: 1}", *words]
    check(plan_from(compose("train", words)))  # each copy whole
    with pytest.raises(RefusedError, match=f"Stage 'a': {reason}") if reason else nullcontext():
        check(plan_from(compose("train", [*words, "parallel.shard=fsdp2"])), fixes=0)


STREAM = {"name": "hf", "streaming": True}


@pytest.fixture
def records(tmp_path):
    """A file whose first record is broken."""
    good = [{"id": str(i), "question": "what?", "answer": "yes"} for i in range(4)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [{"id": "x"}, *good]))
    return tmp_path / "d.jsonl"


@pytest.mark.parametrize(
    "length, reason",
    [
        ({"epochs": 1}, "is a stream without a length: give the stage steps, not epochs"),
        ({"steps": 1, "balance": True}, "balance needs data of known length"),
        ({"steps": 1, "length_buckets": True}, "length_buckets needs data of known length"),
    ],
)
def test_streams_are_not_asked_for_a_length(length, reason, records):
    """Of a later stage, too, whose turn comes when the others are trained."""
    nodes = {"rows": {**STREAM, "path": str(records)}}
    stages = {"a": Stage(steps=1), "b": Stage(**length)}
    cfg = OmegaConf.create({"data": nodes, "task": {}, "skip_broken": True, "limit": None})
    cfg.stages = {name: OmegaConf.structured(stage) for name, stage in stages.items()}
    report = check(plan_with({"stages": {name: lambda s=s: s for name, s in stages.items()}}))
    with pytest.raises(ZooError, match=f"Stage 'b': .*{reason}"):
        check_data(cfg, report.stages)


@pytest.mark.parametrize("skip", [True, False])
def test_the_form_of_data_is_that_of_a_record_that_can_be_read(skip, records):
    nodes = {"rows": {"name": "chat_json", "file": str(records), "check": False}}
    cfg = OmegaConf.create({"data": nodes, "task": {}, "skip_broken": skip, "limit": None})
    cfg.stages = {"main": OmegaConf.structured(Stage(steps=1))}
    report = check(plan_with({"pruner": {"sparsevlm": {}}, **stage()}))
    assert report.stages[0].one_dialog
    with nullcontext() if skip else pytest.raises(ZooError, match="sample 'x'"):
        assert check_data(cfg, report.stages) == []


def test_a_part_of_a_split_trains_where_the_rest_is_for_evaluation(records):
    """By one rule in the check and in the run (`zoo.runs.data`)."""
    words = ["recipe=null", "model=scenes_tiny", "+stages.a.steps=1", "data=[hf]", f"data.hf.path={records}"]
    words += ["data.hf.split='train[:75%]'"]
    with pytest.raises(RefusedError, match=r"no data to train on. The run has hf \(split train\[:75%\]\)"):
        check(plan_from(compose("train", words)), fixes=0)
    check(plan_from(compose("train", [*words, "data.hf.eval_split='train[75%:]'"])))
