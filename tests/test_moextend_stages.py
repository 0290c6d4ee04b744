"""MoExtend from a saved model on: routers alone tune, `zoo shift` chooses, new experts start from trained weights."""

import pytest
import torch

import zoo
from tests.test_loading import TEXTS, TINY
from zoo.inspection import moextend_layers as shift
from zoo.registry import ZooError
from zoo.settings.config import compose
from zoo.training.loop import Run

MOE = ["llm.model_type=mixtral", "llm.num_experts=4", "llm.top_k=2"]
LAYER = ["adapter.moextend.layers=[0]", "adapter.moextend.sources=[0]"]
DATA = ["data=[scenes]", "data.scenes.scenes=32"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A mixture in a folder, and a copy with other routers."""
    torch.manual_seed(0)
    model, processor = zoo.compose(*TINY, *MOE, texts=TEXTS)
    folders = []
    for name in ("base", "probe"):
        folders.append(tmp_path_factory.mktemp(name))
        model.set_trainable(["llm.lm.*.mlp.gate.weight"])
        model.save_pretrained(folders[-1])
        processor.save_pretrained(folders[-1])
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p))
    return [f"dir:{folder}" for folder in folders]


def test_the_choice_is_printed_as_options(two, capsys):
    assert shift.main([f"base={two[0]}", f"probe={two[1]}", "samples=4", "share=1", *DATA]) == 0
    words = capsys.readouterr().out.split()
    assert words[0] == "adapter.moextend.layers=[0,1]" and words[1].startswith("adapter.moextend.sources=[")
    model, _ = zoo.load(two[0], "adapter=[moextend]", *words)
    layer = model.adapter["moextend"].layers["1"]
    source = int(words[1].split(",")[1].rstrip("]"))
    gate, experts = model.llm.layers[1].mlp.gate, model.llm.layers[1].mlp.experts
    assert torch.equal(layer.rows.weight[0], gate.weight[source]), "of the weights in the folder"
    assert torch.equal(layer.down_proj[0], experts.down_proj[source]) and model.fresh_parts == ["adapter.moextend"]


def test_saved_with_its_new_experts_it_loads_to_the_bit(two, tmp_path):
    model, processor = zoo.load(two[0], "adapter=[moextend]")
    with torch.no_grad():
        for p in model.adapter.parameters():
            p.add_(0.1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = zoo.load(f"dir:{tmp_path}")
    ids = torch.arange(40, 60).view(1, -1)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "it needs --probe"),
        (["samples=many"], "--samples takes a whole number, got 'many'"),
        (["share=0.1"], "leave a layer of 2, got 0.1"),
        (["samples=0"], "samples must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_chosen_is_refused(two, words, message):
    models = [f"base={two[0]}", f"probe={two[1]}", "samples=1", *DATA] if words else ["base=x"]
    with pytest.raises(ZooError, match=message):
        shift.main([*models, *words])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("moextend_scenes_probe", ["stages.probe.steps=1", "stages.probe.batch_size=2"]),
        ("moextend_scenes", ["stages.tune.steps=1", "stages.tune.batch_size=2", *LAYER]),
    ],
)
def test_the_recipes_go_on_from_a_run(two, name, options, tmp_path):
    data = [f"data.{d}.scenes=4" for d in ("scenes", "scenes_basics")]
    cfg = compose("train", [f"recipe={name}", f"model={two[0]}", f"run.dir={tmp_path}", "device=cpu", *data, *options])
    run = Run(cfg)
    before = {n: p.clone() for n, p in run.model.named_parameters()}
    run.train()
    changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    own = ("adapter.moextend.", "projector.") if name == "moextend_scenes" else ("llm.lm.model.layers.",)
    assert changed and all(n.startswith(own) for n in changed)
    assert name == "moextend_scenes" or all(n.endswith("mlp.gate.weight") for n in changed)
