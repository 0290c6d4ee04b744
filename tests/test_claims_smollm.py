"""The claims on SmolLM2: arms fit; one of a small model is trained, kept, gone on with and scored."""

from pathlib import Path

import pytest

from zoo.checking.checker import check
from zoo.checking.plan import plan_from
from zoo.claims import mole_smollm, pool_smollm, pruning_smollm, smollm, vlora_smollm
from zoo.claims.experiment import RowFile, Run
from zoo.settings.config import compose

SCENES = ["data=[scenes]", "data.scenes.questions={box: 2}", "data.scenes.scenes=8", "data.scenes.eval_scenes=4"]
SMALL = [
    f"model=dir:{Path(__file__).parents[1] / 'model_cards' / 'scenes_tiny'}",
    "adapter=[lora]",
    "adapter.lora.rank=2",
]


def arms():
    """Options of an arm of each kind."""
    m = mole_smollm
    yield [m.LLM, *m.CONVOLUTIONS, *m.ARMS["3 experts"][0], *m.DATA]
    m = vlora_smollm
    yield [m.LLM, *m.ENCODER, *m.ARMS["kv, rank 16"][0], *m.DATA]
    m = pool_smollm
    yield [m.LLM, *m.ENCODER, *m.ARMS["16 queries"], *m.LORA, *m.DATA]
    m = pruning_smollm
    chains = m.chains()
    yield from (
        [*m.READER, *chains[name], *m.DATA] for name in ("fastervlm 16", "aim merged to 36, none from layer 24")
    )


@pytest.mark.parametrize("words", arms())
def test_arms_fit(words):
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
    assert folder == tmp_path / "x-0" / "an_arm__small" / "model"
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
