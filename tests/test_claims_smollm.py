"""The claims on SmolLM2: arms fit; one of a small model is trained, kept, gone on with and scored."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.pretrained_builders import TEMPLATE
from zoo.checking.checker import check
from zoo.checking.plan import plan_from
from zoo.claims import (
    llava_kd_smollm,
    llava_mod_smollm,
    moextend_smollm,
    mole_smollm,
    pool_smollm,
    pruning_smollm,
    smollm,
    vlora_smollm,
)
from zoo.claims.experiment import RowFile, Run
from zoo.claims.smollm import options_of
from zoo.settings.config import compose

SCENES = ["data=[scenes]", "data.scenes.questions={box: 2}", "data.scenes.scenes=8", "data.scenes.eval_scenes=4"]
SMALL = [
    f"model=dir:{Path(__file__).parents[1] / 'model_cards' / 'scenes_tiny'}",
    "adapter=[lora]",
    "adapter.lora.rank=2",
]


class Composed:
    """Takes the place of `trained`: composes the options of every arm as it does, and checks them."""

    def __init__(self, run):
        self.run, self.words = run, {}

    def __call__(self, run, name, words, stages):
        base = self.words.get(words[0].removeprefix("model=dir:"))
        own = [*base, *words[1:]] if base else list(words)  # a model that was trained has the parts that it began with
        check(plan_from(compose("train", [*own, *options_of(run, stages)])))
        self.words[name] = own
        return Path(name)


@pytest.mark.parametrize("claim", [mole_smollm, vlora_smollm, pool_smollm, pruning_smollm])
def test_every_arm_fits_with_its_stages(claim, monkeypatch, tmp_path):
    """As they are measured, from checkpoints of packages; those of the other claims are run below."""
    run = Run(0, show=lambda text: None, file=RowFile(tmp_path / "x-0.jsonl", {}, print))
    composed = Composed(run)
    model = SimpleNamespace(adapter={})
    stand_ins = {
        "trained": composed,
        "loaded": lambda folder, *words: (model, None),
        "scores": lambda *a, **k: {"all": 0.5},
        "same_text": lambda *a: 1.0,
        "photos": lambda split: (np.zeros((20, 28, 28), np.uint8), np.arange(20) % 10),
    }
    for name, stand_in in stand_ins.items():
        if hasattr(claim, name):
            monkeypatch.setattr(claim, name, stand_in)
    claim.measure(run)
    assert set(getattr(claim, "ARMS", ["reader"])) <= composed.words.keys()


def parts():
    """Pruners, students and teachers, of checkpoints of packages."""
    m, taught = pruning_smollm, f"+stages.learn.teacher={llava_kd_smollm.TEACHER}"
    for name in ("fastervlm 16", "aim merged to 36, none from layer 24"):
        yield [*m.READER, *m.chains()[name], *m.DATA]
    m = llava_kd_smollm
    yield [*m.STUDENT, *m.DATA, taught, "+stages.learn.distiller=llava_kd"]
    m = llava_mod_smollm
    yield [*m.STUDENT, *m.DATA, m.UPCYCLE, taught, "+stages.learn.distiller=llava_mod"]


@pytest.mark.parametrize("words", parts())
def test_parts_fit(words):
    check(plan_from(compose("train", ["recipe=null", "+stages.learn.steps=2", *words])))


def test_an_arm_is_kept_gone_on_with_and_scored(tmp_path, monkeypatch):
    def run():
        return Run(0, 0.01, file=RowFile(tmp_path / "x-0.jsonl", {"claim": "x"}, print))

    stages = {"learn": {"steps": 300, "train": ["adapter"], "data": {"scenes": 1}, "checkpoint_every": 1}}
    with monkeypatch.context() as killed:
        killed.setattr(smollm, "save_model", lambda training: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            smollm.trained(run(), "an arm, small", [*SMALL, *SCENES], stages)
    folder = smollm.trained(run(), "an arm, small", [*SMALL, *SCENES], stages)
    assert folder == tmp_path / "x-0" / "an_arm__small" / "model" and not (folder.parent / "checkpoints").exists()
    with monkeypatch.context() as again:
        again.setattr(smollm, "Training", None)
        assert smollm.trained(run(), "an arm, small", [*SMALL, *SCENES], stages) == folder  # trained already
    model, processor = smollm.loaded(folder, "pruner=random")
    assert list(model.pruner) == ["random"]
    found = smollm.scores(run(), model, processor, SCENES, 200, metric="iou", baselines=True)
    assert set(found) == {f"{what}{end}" for what in ("all", "scenes") for end in ("", ", blind", ", majority")}
    assert 0 <= found["all"] == found["scenes"] <= 1
    RowFile(tmp_path / "x-0.jsonl", {"claim": "another"}, print)
    assert not folder.exists()  # of rows that are put aside


QUIET = "{color: 0, shape: 0, size: 0, count: 0, relation: 0, box: 0}"
EXIST = ("data.scenes.scenes=8", f"data.scenes.questions={QUIET}")


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """Two steps of an arm; models and data are those of drawn scenes."""
    monkeypatch.setattr("zoo.evaluation.evaluate.TRAIN_SAMPLES", 100)  # whose answers a constant guess is made of
    student = ("model=llava_kd_tiny", "tokenizer.checkpoint=model:scenes_tiny")
    for claim in (llava_kd_smollm, llava_mod_smollm):
        monkeypatch.setattr(claim, "STUDENT", student)
        monkeypatch.setattr(claim, "TEACHER", "scenes_tiny")
    return Run(0, 0.01, print, RowFile(tmp_path / "x-0.jsonl", {"claim": "x"}, print))


def judge(claim, run):
    """Bounds on the rows of a run; those of arms that it left out are not judged."""
    rows = {}
    for bound in claim.EXPERIMENT.bounds:
        with contextlib.suppress(KeyError):
            rows[bound.what] = bound.row("x", [run.found])
    return rows


def test_stages_and_their_costs_are_compared(small_run, monkeypatch):
    k = llava_kd_smollm
    monkeypatch.setattr(k, "SETS", {"scenes": 1})
    monkeypatch.setattr(k, "DATA", ("data=[scenes]", *EXIST))
    monkeypatch.setattr(k, "ARMS", {name: k.ARMS[name] for name in ("PT-SFT-SFT", "DPT-SFT-DFT")})
    k.measure(small_run)
    found = small_run.found
    assert found[k.FACTOR] > 1 and all(found[f"{arm}, seconds"] > 0 for arm in (*k.ARMS, k.EQUAL_COMPUTE))
    assert found["DPT-SFT-DFT, seconds"] > found["PT-SFT-SFT, seconds"]
    assert "all three stages over the control at equal compute" in judge(k, small_run)
    folder = small_run.folder / "DPT_SFT_DFT"
    assert (folder / "model").is_dir() and "teacher: scenes_tiny" in (folder / "config.yaml").read_text()
    assert "scenes_tiny" not in (small_run.folder / "PT_SFT_SFT" / "config.yaml").read_text().split("stages:")[1]


def test_dense_and_sparse_students_learn_from_answers_a_teacher_and_pairs(small_run, monkeypatch):
    m = llava_mod_smollm
    monkeypatch.setattr(m, "SET", "scenes")
    monkeypatch.setattr(m, "PAIRED", "scenes_pairs")
    monkeypatch.setattr(m, "PRESENCE", "exist")
    monkeypatch.setattr(m, "DATA", ("data=[scenes,scenes_pairs]", *EXIST))
    monkeypatch.setattr(m, "ARMS", {name: one for name, one in m.ARMS.items() if name != "sparse, answers"})
    monkeypatch.setattr(m, "PAIRS", {name: m.PAIRS[name] for name in ("kto_pair, anchor", "chosen answers")})
    m.measure(small_run)
    assert "dense, accuracy of mimic above answers alone at equal compute" in judge(m, small_run)
    wanted = {"teacher", "before", m.EQUAL_COMPUTE, *m.ARMS, *m.PAIRS}
    assert {name.split(": ")[0] for name in small_run.found} == wanted | {m.FACTOR}
    config = (small_run.folder / "kto_pair__anchor" / "config.yaml").read_text()
    assert "anchor: 1.0" in config and "scenes_pairs: 1" in config
    assert "upcycle" in (small_run.folder / "sparse__mimic" / "model" / "config.json").read_text()


def llama(folder):
    """A tiny Llama, with a tokenizer that writes chats."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from zoo.text.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["what is shown? a red circle, yes or no"] * 3, 320, "plain")
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(**sizes, **ends, vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 2])
def test_an_upcycled_llama_computes_what_it_did(every, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    sparse = AutoModelForCausalLM.from_pretrained(
        moextend_smollm.upcycled(llama(tmp_path / "dense"), tmp_path / "sparse", every), dtype=torch.float32
    )
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).float()
    ids = torch.randint(3, dense.config.vocab_size, (2, 20))
    assert [hasattr(layer.mlp, "experts") for layer in sparse.model.layers] == [every == 1, True]
    torch.testing.assert_close(sparse(input_ids=ids).logits, dense(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_new_experts_and_full_fine_tuning_are_compared_on_old_and_new_domains(small_run, tmp_path, monkeypatch):
    e = moextend_smollm
    dense = llama(tmp_path / "dense")
    monkeypatch.setattr(e, "folder_of", lambda checkpoint: str(dense))
    monkeypatch.setattr(e, "EVERY", 1)
    monkeypatch.setattr(e, "OLD", {"scenes": 1})
    monkeypatch.setattr(e, "NEW_DOMAIN", {"scenes_basics": 1})
    monkeypatch.setattr(e, "DATA", ("data=[scenes,scenes_basics]", "data.scenes_basics.eval_scenes=2", *EXIST))
    vit = ["image_size=32", "patch_size=16", "width=32", "depth=1", "heads=2", "cls_token=false", "layer=-1"]
    monkeypatch.setattr(e, "CONVOLUTIONS", ["vision=timm", *(f"vision.{word}" for word in vit), "projector=mlp"])
    chosen = e.arms
    monkeypatch.setattr(e, "arms", lambda *own: {name: chosen(*own)[name] for name in (e.NEW, e.FULL)})
    e.measure(small_run)
    rows = judge(e, small_run)
    assert rows["text under the guard, same to the bit"].value.median == 1
    assert small_run.found[f"before, {e.TEXT}"] > 1
    for name, own in ((e.NEW, True), (e.FULL, False)):
        moved = (small_run.folder / "".join(c if c.isalnum() else "_" for c in name) / "config.yaml").read_text()
        assert ("moextend" in moved) == own
