"""The memory that the check states for training, against what two steps of the same stage take."""

from dataclasses import replace

import pytest
import torch

from zoo.benches import memory as bench
from zoo.checking import memory
from zoo.checking.checker import check
from zoo.checking.plan import plan_from
from zoo.cli.check_command import add_batches
from zoo.registry import ZooError
from zoo.settings.config import compose
from zoo.settings.stage import Stage

LLM = {"hidden_size": 48, "num_layers": 2, "num_heads": 3, "intermediate_size": 128}
LORA = {"adapter": {"lora": {"name": "lora"}}}
VLORA = {"projector": None, "adapter": {"vlora": {"name": "vlora", "width": 32, "rank": 4, "depth": 2, "skip": 2}}}
MOE = {"model_type": "mixtral", "num_experts": 4, "top_k": 2}
FROZEN = {"train": ["projector"], "precision": "bf16"}
CASES = {
    "fp32": bench.Recipe({"precision": "fp32"}),
    "bf16": bench.Recipe({"precision": "bf16"}),
    "accumulated": bench.Recipe({"precision": "bf16", "accumulate": 2}, rows=4),
    "masters": bench.Recipe({"precision": "bf16"}, dtype="bfloat16"),
    "no masters": bench.Recipe({"precision": "bf16", "master_weights": "none"}, dtype="bfloat16"),
    "a frozen decoder": bench.Recipe(FROZEN),
    "packed": bench.Recipe({"precision": "bf16"}, length=512, samples=4),
    "checkpointed": bench.Recipe({"precision": "bf16", "gradient_checkpointing": True}, length=512, samples=4),
    "lora": bench.Recipe({"train": ["adapter"], "precision": "bf16"}, {}, LORA, dtype="bfloat16"),
    "vlora": bench.Recipe({"train": ["adapter"], "precision": "fp32"}, {}, VLORA),
    "experts": bench.Recipe({"precision": "bf16"}, MOE),
    "a chunked loss": bench.Recipe({"precision": "bf16"}, vocab=20_000, labels=100),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench, "_LLM", {**bench._LLM, **LLM})
    monkeypatch.setattr(bench, "_VISION", {**bench._VISION, "width": 48, "depth": 2, "image_size": 64})
    for module in ("zoo.composed.answer_loss", "zoo.checking.memory"):  # so that a small vocabulary is chunked
        monkeypatch.setattr(f"{module}.LOGITS_AT_ONCE", 1 << 20)


@pytest.mark.parametrize("name", CASES)
def test_as_measured(name):
    recipe = CASES[name]
    recipe = replace(recipe, vocab=900 if recipe.vocab == 50_000 else recipe.vocab, rows=2)
    found = bench._measured(replace(recipe, length=min(recipe.length, 256 * recipe.samples)))
    assert "formula" not in found["how"]
    assert found["estimate"] == pytest.approx(found["measured"], rel=0.05)


def test_where_a_part_asks_for_numbers_it_is_a_formula(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("a number is asked for")

    monkeypatch.setattr(memory, "bytes_of_step", refuse)
    found = bench._measured(replace(CASES["bf16"], vocab=900, rows=2))
    assert "by a formula" in found["how"]
    assert 0.3 < found["estimate"] / found["measured"] < 3


def test_rows_are_those_of_the_data():
    words = ["recipe=null", "data=[scenes]", "data.scenes.scenes=8", "data.scenes.size=32", "model=scenes_tiny"]
    words += ["llm.num_layers=2", "vision.depth=2", "+stages.a.batch_size=4", "+stages.a.steps=1"]
    words += ["+stages.a.pack_length=400", "+stages.b.steps=1"]
    cfg = compose("check", words)
    report = check(plan_from(cfg))
    stage = report.stages[1]
    assumed = stage.measure(stage.batch, stage.placeholder)
    assert assumed.rows == (16, report.num_image_tokens + memory.TEXT)
    add_batches(cfg, report)
    packed, plain = (stage.memory for stage in report.stages)
    assert 200 < packed.rows[1] <= 400 and packed.rows[0] <= 4
    assert plain.rows[0] == 16 and plain.rows[1] != assumed.rows[1]
    assert 0 < plain.labels < plain.rows[0] * plain.rows[1]
    assert not packed.estimated and packed.total == packed.weights + packed.optimizer + packed.step


def test_a_pass_has_what_the_distiller_compares():
    """Without answers too: a distiller of hidden states runs the LLM, and holds each layer's."""
    alone = Stage(steps=1, loss_weights={"answer": 0.0}, distiller="dense")
    for needs, runs in (
        (frozenset(), False),
        ({"student.image"}, False),
        ({"student.hidden"}, True),
        ({"teacher.response"}, True),
    ):
        options = memory.options_of(alone, frozenset(needs))
        assert options["run_llm"] == alone.runs_llm(needs) == runs
        assert bool(options.get("output_hidden_states")) == ("student.hidden" in needs)
    assert memory.options_of(alone, frozenset({"student.logits"}))["all_logits"]
    assert memory.options_of(Stage(steps=1), frozenset())["run_llm"]


def test_rows_of_the_data_beyond_a_sliding_window_are_refused():
    words = ["recipe=null", "data=[scenes]", "data.scenes.scenes=8", "data.scenes.size=32", "model=scenes_tiny"]
    words += ["llm.num_layers=2", "llm.model_type=mistral", "llm.extra={sliding_window: 100}", "vision.depth=2"]
    words += ["tokenizer.checkpoint=model:scenes_tiny", "+stages.a.batch_size=4", "+stages.a.steps=1"]
    with pytest.raises(ZooError, match=r"a row of \d+ tokens holds several dialogs .* window of 100.*pack=none"):
        add_batches(cfg := compose("check", words), check(plan_from(cfg)))
    add_batches(cfg := compose("check", [*words, "stages.a.pack=none"]), check(plan_from(cfg)))


def test_the_model_is_as_it_was(make_model):
    """No fake tensor stays behind in a module."""
    model, _ = make_model()
    model.set_trainable(["all"])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    cfg = compose("check", ["recipe=null", "data=[scenes]", "+stages.a.steps=1"])
    plan = plan_from(cfg)
    stage = next(iter(plan.stages.values()))
    memory.memory_of(stage, model, plan, weights=0, distiller=None)
    assert all(type(t) is torch.Tensor for t in model.state_dict().values())
    assert all(t.equal(before[n]) for n, t in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
