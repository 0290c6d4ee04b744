"""Runs that begin on checkpoints, and adapters that act late: killed twice, they lead to the same weights."""

import pytest

from tests import killed_runs
from tests.killed_runs import left, train
from zoo.benches.roundtrip_trial import SOURCES, write_checkpoints

RECIPE = """# @package _global_
defaults:
  - override /data: [chat_json]
data: {{chat_json: {{file: {root}/data.jsonl}}}}
device: cpu
precision: fp32
stages:
  a: {{steps: 1, batch_size: 4, lr: 0.01, warmup_ratio: 0, train: [{train}], {first}}}
  b: {{steps: 1, batch_size: 4, lr: 0.01, warmup_ratio: 0, train: [{then}], optimizer: muon_adamw}}
"""
FREEZE, DETACH = 'freeze: ["*s.0.*"]', "detach: [upcycle]"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoints")
    write_checkpoints(place)
    with killed_runs.served():
        yield place


def words_of(root, place, words, **recipe):
    folder = place / "conf" / "recipe"
    folder.mkdir(parents=True)
    (folder / "two.yaml").write_text(RECIPE.format(root=root, **recipe))
    words = (word.replace("{root}", str(root)) for word in words)
    return ["--config-dir", str(folder.parent), "recipe=two", *words, "run.folder=run"]


def killed_twice_and_whole(place, words):
    """What a run leaves that was killed at the border of its stages and in the final save, and one that was not."""
    whole = train(place / "whole", words)
    assert whole.code == 0, whole.said
    for again, event in ((words, "checkpoints/.step-00000002.writing"), (["resume=run"], ".model.writing")):
        killed = train(place / "killed", again, "killed_at_write", f"os.mkdir run/{event}")
        assert killed.code == -9, killed.said
    ended = train(place / "killed", ["resume=run"])
    assert ended.code == 0, ended.said
    return left(place / "killed" / "run"), left(place / "whole" / "run")


@pytest.mark.parametrize("name", ["hf tied", "experts", "published lora", "saved"])
def test_from_checkpoints(root, tmp_path, name):
    source = SOURCES[name]
    words = words_of(root, tmp_path, source.words, train=source.train, first=FREEZE, then=source.train)
    killed, whole = killed_twice_and_whole(tmp_path, words)
    assert killed == whole


def test_an_adapter_that_acts_from_the_second_stage_on(root, tmp_path):
    """It starts from what the first stage trained, and from nothing that a kill left."""
    words = (*SOURCES["hf"].words, "adapter=[upcycle]")
    words = words_of(root, tmp_path, words, train="projector, llm", first=DETACH, then="adapter.upcycle, projector")
    killed, whole = killed_twice_and_whole(tmp_path, words)
    assert killed == whole
