"""The benches of loading and generating run, and say what was measured; loading keeps its bound on memory."""

import pytest
import torch

from zoo.benches import load
from zoo.benches.generate import Options, run
from zoo.benches.peak import in_process
from zoo.benches.published import MODELS, SIZES, write
from zoo.cli.bench import main
from zoo.registry import ZooError


def test_generation_is_compared_and_the_answers_are_equal(capsys):
    assert main(["generate", "sizes=tiny", "rounds=1", "new=3", "text=12", "device=cpu"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "tiny: prefill" in out and "tiny: decode" in out and "bound <= 1.03x" in out
    assert "answers differ" not in out


def test_families_of_native_resolution_are_compared(monkeypatch):
    for name in ("qwen2_5_vl", "qwen3_vl_moe"):
        monkeypatch.setitem(MODELS, name, MODELS[name].tiny)
    options = Options(sizes="qwen2_5_vl,qwen3_vl_moe", rounds=1, new=3, text=12, device="cpu")
    report = run(options, lambda line: None)
    assert len(report.rows) == 12 and not any(row.note for row in report.rows)


def test_a_named_model_decodes_beside_its_language_model_in_transformers(make_model, tmp_path):
    model, processor = make_model(adapter={"lora": {"name": "lora", "rank": 2}})
    for weight in model.adapter["lora"].adapter_state_dict().values():
        weight.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    report = run(Options(model=f"dir:{tmp_path}", rounds=1, new=4, batch=2, device="cpu"), lambda line: None)
    ratios = [row for row in report.rows if row.bound]
    assert len(ratios) == 2 and all(row.note == "100% of the tokens are the same" for row in ratios)


def test_a_few_frames_of_a_clip_cost_a_few(capsys):
    pytest.importorskip("av")
    assert main(["video", "rounds=1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "decoded over the least 1x" in out and "MISSED" not in out


def test_mistakes_are_said():
    with pytest.raises(ZooError, match="Did you mean '100m'"):
        Options(sizes="tiny,100n")
    with pytest.raises(ZooError, match="rounds must be at least 1"):
        load.Options(rounds=0)


@pytest.mark.slow
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    """One process that loads 440 MB; what it held before is not counted."""
    write(SIZES["tiny"], tmp_path / "tiny", torch.float32)
    weights = write(SIZES["100m"], tmp_path / "100m", torch.float32)
    found = in_process("load", "ours", str(tmp_path / "100m"), str(tmp_path / "tiny"), "float32", "cpu", 1)
    assert found["peak"] <= 1.15 * weights and found["call"] <= found["seconds"]
