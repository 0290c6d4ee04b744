"""Checkpoints of 16 bits train in float32: what moves at a small rate, through a kill, two processes, save and load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from tests import killed_runs, two_processes_masters
from tests.conftest import ANSWERS, QUESTIONS, sample, tiny_slots
from tests.fusion_builders import SMALL
from tests.killed_runs import train
from zoo.benches.roundtrip_trial import SOURCES, write_checkpoints
from zoo.checking.checker import check
from zoo.checking.plan import plan_from
from zoo.composed.masters import as_saved, is_mixed, masters_in, narrow, widen
from zoo.composed.model import ZooModel
from zoo.loading.build import build
from zoo.registry import ZooError
from zoo.settings.config import compose
from zoo.settings.source import source_named
from zoo.settings.stage import Stage
from zoo.storage.safetensors_file import value_of
from zoo.storage.sharded import listing_of_parts
from zoo.training.step import Engine

RATE = 2e-5
RECIPE = """# @package _global_
defaults:
  - override /data: [chat_json]
data: {{chat_json: {{file: {root}/data.jsonl}}}}
device: cpu
precision: {precision}
master_weights: {masters}
stages:
  a: {{steps: 2, batch_size: 4, lr: {rate}, schedule: constant, warmup_ratio: 0, train: [{train}], freeze: ["*s.0.*"]}}
  b: {{steps: 1, batch_size: 4, lr: {rate}, schedule: constant, warmup_ratio: 0, train: [{train}], freeze: ["*s.0.*"]}}
"""


def halved(folder: Path, dtype=torch.bfloat16) -> None:
    """Round the checkpoint in a folder to 16 bits."""
    file, config = folder / "model.safetensors", folder / "config.json"
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in load_file(file).items()}
    file.unlink()
    save_file(state, file, metadata={"format": "pt"})
    content = json.loads(config.read_text())
    for part in (content, content.get("text_config"), content.get("vision_config")):
        if part is not None:
            part["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoints")
    write_checkpoints(place)
    for name in ("qwen2", "mixtral", "llava"):
        halved(place / name)
    with killed_runs.served():
        yield place


@pytest.fixture(scope="module")
def ran(root, tmp_path_factory):
    """`ran(name, precision=, masters=) -> folder` of a finished run; each is made once."""
    done = {}

    def run(name, **options):
        key = (name, *options.items())
        if key not in done:
            place = tmp_path_factory.mktemp("run")
            done[key] = trained(place, words_of(root, place, name, **options))
        return done[key]

    return run


def words_of(root, place, name, *, precision="bf16", masters="fp32"):
    source = SOURCES[name]
    folder = place / "conf" / "recipe"
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"root": root, "precision": precision, "masters": masters, "rate": RATE, "train": source.train}
    (folder / "small.yaml").write_text(RECIPE.format(**fields))
    words = [word.replace("{root}", str(root)) for word in source.words]
    return ["--config-dir", str(folder.parent), "recipe=small", *words, "run.folder=run"]


def trained(place, words, **options):
    ended = train(place, words, **options)
    assert ended.code == 0, ended.said
    return place / "run"


def newest(run: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a run, by their names in the model."""
    folder = sorted((run / "checkpoints").glob("step-*"))[-1]
    parts = listing_of_parts(sorted(folder.glob("weights*")))
    return {n.removeprefix("model."): value_of(t) for n, t in parts.items()}


def start_of(root, name) -> dict[str, torch.Tensor]:
    words = [word.replace("{root}", str(root)).removeprefix("model=") for word in SOURCES[name].words]
    model, _ = zoo.load(*words) if words[0].startswith("dir:") else zoo.compose(*words)
    return {n: t.detach().float() for n, t in model.state_dict().items()}


def share(after, before) -> float:
    """The share of numbers that moved, of the matrices in the language model's second layer."""
    names = [n for n in after if n.startswith("llm.") and "layers.1." in n and after[n].ndim > 1]
    moved = sum(int((after[n].float() != before[n]).sum()) for n in names)
    return moved / sum(after[n].numel() for n in names)


def require_same(a, b):
    assert a.keys() == b.keys()
    assert not [n for n in a if not a[n].equal(b[n])]


@pytest.mark.parametrize("name", ["hf tied", "experts", "published"])
def test_a_saved_model_loads_in_16_bits_and_keeps_what_was_trained(root, ran, tmp_path, name):
    run, before = ran(name), start_of(root, name)
    moved = share(newest(run), before)
    assert moved > (0.5 if name == "experts" else 0.99)  # an expert that no token chose has no gradient

    rounded, exact = (zoo.load(f"dir:{run}", device="cpu", dtype=dtype)[0] for dtype in (None, "float32"))
    assert {p.dtype for n, p in rounded.named_parameters() if n.startswith("llm.")} == {torch.bfloat16}
    narrowed, named = rounded.state_dict(), exact.state_dict()
    for key, weight in newest(run).items():
        if key in named:
            assert torch.equal(named[key], weight.float()), key
            assert torch.equal(narrowed[key], weight.to(narrowed[key].dtype)), key
    assert share(named, before) == moved

    held = load_file(run / "model" / "model.safetensors")
    assert not [n for n in held if n.startswith("llm.") and "layers.0." in n], "frozen, so the base has them"
    again, _ = build(source_named(f"dir:{run}"), device="cpu", masters=True)  # as `zoo train model=dir:` begins
    assert again.masters and all(again.state_dict()[n].equal(newest(run)[n]) for n in again.masters)
    again.save_pretrained(tmp_path)
    require_same(load_file(tmp_path / "model.safetensors"), held)


def test_a_killed_run(root, ran, tmp_path):
    words = words_of(root, tmp_path, "hf tied")
    for again, event in ((words, "checkpoints/.step-00000002.writing"), (["resume=run"], ".model.writing")):
        assert train(tmp_path, again, "killed_at_write", f"os.mkdir run/{event}").code == -9
    resumed = trained(tmp_path, ["resume=run"])
    require_same(newest(resumed), newest(ran("hf tied")))
    assert killed_runs.left(resumed) == killed_runs.left(ran("hf tied"))


def test_without_masters_most_weights_do_not_move(root, ran):
    found, before = newest(ran("hf tied", masters="none")), start_of(root, "hf tied")
    assert share(found, before) < 0.5
    assert {t.dtype for n, t in found.items() if n.startswith("llm.")} == {torch.bfloat16}


def test_the_same_weights_as_from_a_checkpoint_in_float32(root, ran, tmp_path):
    """With products in float32 too, the number format of the files makes no difference."""
    wide = tmp_path / "wide"
    shutil.copytree(root, wide)
    halved(wide / "qwen2", torch.float32)
    found = trained(tmp_path, words_of(wide, tmp_path, "hf tied", precision="fp32"))
    require_same(newest(ran("hf tied", precision="fp32")), newest(found))


def test_two_processes(root, ran, tmp_path):
    one = newest(ran("hf tied", precision="fp32"))
    two = newest(trained(tmp_path, words_of(root, tmp_path, "hf tied", precision="fp32"), processes=2))
    assert one.keys() == two.keys()
    for name in one:  # sums in another order, and Adam divides by the root of small ones
        assert one[name].dtype == two[name].dtype
        assert (one[name] - two[name]).abs().max() < 3 * 3 * RATE, name
    assert share(two, start_of(root, "hf tied")) > 0.99


def test_sharded_parameters(root, ran, tmp_path):
    """FSDP2 takes one data type for what it reduces together; killed in between, and saved."""
    words = words_of(root, tmp_path, "hf tied", precision="bf16")
    ended = killed_runs.call_in_two(tmp_path, two_processes_masters.main, tmp_path, words)
    assert ended.code == 0, ended.said
    one, two = newest(ran("hf tied", precision="bf16")), newest(tmp_path / "run")
    assert one.keys() == two.keys()
    assert all((one[n] - two[n]).abs().max() < 3 * 3 * RATE for n in one)
    assert share(two, start_of(root, "hf tied")) > 0.99
    saved, _ = zoo.load(f"dir:{tmp_path / 'run'}", device="cpu", dtype="float32")
    assert all(saved.state_dict()[n].equal(t) for n, t in two.items() if n in saved.state_dict())


ADAPTERS = {
    "lora": ("llama", {}),
    "vlora": ("llama", {**SMALL["vlora"], "max_images": 2}),
    "mole": ("llama", {"gate": "prob", "dropout": 0.0}),
    "upcycle": ("llama", {"every": 1}),
    "moextend": ("mixtral", {"layers": [0, 1], "calibration_width": 0}),
}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_new_weights_of_adapters(name, precision, make_model, tmp_path):
    """Beside a frozen language model of 16 bits, which stays as it is to the bit."""
    family, options = ADAPTERS[name]
    llm = tiny_slots()["llm"] | {"model_type": family} | ({"num_experts": 4, "top_k": 2} if family != "llama" else {})
    slots = {"llm": llm, "adapter": {name: {"name": name, **options}}} | (
        {"projector": None} if name == "vlora" else {}
    )
    model, processor = make_model(**slots)
    model.to(torch.bfloat16)
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    engine = Engine(
        accelerator(), model, Stage(train=["adapter"], steps=2, lr=RATE, precision=precision, warmup_ratio=0), 2
    )
    own = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for n, p in model.named_parameters() if n in own} == {torch.float32}
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad and n not in model.masters}
    assert {p.dtype for n, p in frozen.items() if "norm" not in n and model.part_of(n) == "llm"} <= {torch.bfloat16}
    batch = processor.collate([processor.encode(sample((QUESTIONS[0], ANSWERS[0])))])
    for number in range(2):
        engine.run(number, number, [{k: v.clone() if torch.is_tensor(v) else v for k, v in batch.items()}], False)
    after = model.state_dict()
    assert all(after[n].to(before[n].dtype).equal(before[n]) for n in before if n not in own)
    moved = {n for n in own if n in after and not after[n].equal(before[n].float())}
    assert len(moved) > len(own) / 3  # a factor that is multiplied by zeros, and experts without a token, wait

    narrow(model)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = zoo.load(f"dir:{tmp_path}", device="cpu")
    assert all(again.state_dict()[n].equal(t) for n, t in model.state_dict().items())


def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


# ---- parts of it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("globs", [["llm.*layers.1.*"], ["*norm*"], ["projector"], ["llm.*embed*"], ["vision.*s.0.*"]])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_part_that_trains_in_part_computes(dtype, globs, precision, make_model):
    model, processor = make_model()
    model.to(dtype)
    engine = Engine(accelerator(), model, Stage(train=globs, steps=1, precision=precision), 1)
    batch = processor.collate([processor.encode(sample((QUESTIONS[0], ANSWERS[0])))])
    losses, _ = engine.run(0, 0, [batch], False)
    assert losses["answer"].isfinite()
    assert is_mixed(model) <= (precision == "bf16")
    narrow(model)
    assert {p.dtype for p in model.parameters()} == {dtype} and not model.masters


def test_what_is_not_lost_is_saved_in_16_bits():
    exact, moved = torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.5001])
    state = {"llm.a": exact, "llm.b": moved, "vision.c": moved, "vision.d": moved}
    masters = dict.fromkeys(["llm.a", "llm.b", "vision.c"], torch.bfloat16)
    found, record = as_saved(state, masters, lambda name: name.partition(".")[0])
    assert [found[n].dtype for n in state] == [torch.bfloat16, *[torch.float32] * 3]
    assert record == {"bfloat16": ["llm", "vision.c"]}
    dtypes = {n: t.dtype for n, t in found.items()}
    assert masters_in(record, dtypes, lambda n: n.partition(".")[0]) == dict.fromkeys(
        ["llm.b", "vision.c"], torch.bfloat16
    )


@pytest.mark.parametrize("record", [{"int8": ["llm"]}, {"bfloat16": "llm"}, {"bfloat16": [1]}, ["llm"], "llm"])
def test_a_record_of_others_is_checked(record):
    with pytest.raises(ZooError, match="master"):
        masters_in(record, {"llm.a": torch.float32}, lambda n: "llm")


def test_a_cast_model_forgets_its_masters(make_model, tmp_path):
    model, _ = make_model()
    model.to(torch.bfloat16)
    model.set_trainable(["llm"])
    widen(model, "bf16")
    assert model.masters
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert ZooModel.from_pretrained(tmp_path).config.masters is None


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_terms_of_16_bits_beside_float32_compute_in_it_and_are_saved_as_they_were(base, make_model, tmp_path):
    model, processor = make_model(adapter={"lora": {"name": "lora", "rank": 2}})
    model.to(base)
    for name, weight in model.adapter["lora"].adapter_state_dict().items():
        weight.copy_(torch.randn_like(weight).bfloat16())
        model.get_parameter(f"llm.lm.{name}").data = weight.bfloat16()
    model.save_pretrained(tmp_path / "first")
    processor.save_pretrained(tmp_path / "first")
    loaded = zoo.load(f"dir:{tmp_path / 'first'}", device="cpu")[0]
    assert {w.dtype for w in loaded.adapter["lora"].adapter_state_dict().values()} == {base}
    exact = zoo.load(f"dir:{tmp_path / 'first'}", device="cpu", dtype="float32")[0]
    batch = processor.collate([processor.encode(sample((QUESTIONS[0], ANSWERS[0])))])
    if base == torch.float32:
        assert torch.equal(loaded(**batch, all_logits=True).logits, exact(**batch, all_logits=True).logits)
    loaded.save_pretrained(tmp_path / "second")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("first", "second"))
    assert before.keys() == after.keys()
    assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)


def test_the_check_states_their_memory(root, tmp_path):
    words = [word.replace("{root}", str(root)) for word in SOURCES["hf tied"].words]
    stages = ["stages.look.precision=bf16", "stages.look.train=[llm]", "stages.look.freeze=[]", "stages.look.steps=1"]
    cfg = ["recipe=null", "data=[scenes]", *(f"+{word}" for word in stages), *words]
    plan = plan_from(compose("check", cfg))
    report = check(plan)
    model, _ = zoo.compose(*words)
    assert report.stages[0].memory.masters == 2 * sum(
        p.numel() for n, p in model.named_parameters() if n.startswith("llm.")
    )
    plan.master_weights = "none"
    assert not check(plan).stages[0].memory.masters
