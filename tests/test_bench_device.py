"""`zoo bench device` comes to its end on a CPU at toy sizes, section by section, and goes on where it was cut off."""

import json
import math

import pytest
import torch

from zoo.benches import device as bench
from zoo.benches.device import SECTIONS, Journal, peak_of
from zoo.benches.device_models import SIZES, made, with_pruner
from zoo.cli.bench import main, parse
from zoo.registry import ZooError

SHORT = ["sizes=tiny", "device=cpu", "batches=2", "pruner=random"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_section_ends_and_writes_its_numbers(tmp_path, capsys):
    out = tmp_path / "device.jsonl"
    assert main(["device", *SHORT, "seconds=0.001", f"out={out}", f"json={tmp_path / 'rows.json'}"]) == 0
    found = lines(out)
    ends = {line["section"]: line for line in found if "end" in line}
    assert list(ends) == list(SECTIONS) and {line["end"] for line in ends.values()} == {"finished"}
    values = {line["what"]: line for line in found if "value" in line}
    assert {line["section"] for line in values.values()} == set(SECTIONS)
    assert all(math.isfinite(line["value"]["median"]) for line in values.values())
    exact = [w for w in values if "against" in w]
    assert len(exact) == 4 and all(values[w]["value"]["median"] < 1e-5 for w in exact)  # the walk and the KL
    left_out = {name: end["left_out"] for name, end in ends.items() if end["left_out"]}
    assert all(what.startswith("no time") for name in left_out if name != "aim" for what in left_out[name])
    assert left_out["aim"][-1].startswith("kernels: Triton cannot compile")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["what"] for row in rows} == set(values)
    assert "matmul" in capsys.readouterr().out


def test_a_run_that_was_cut_off_goes_on_with_what_is_missing(tmp_path, capsys, monkeypatch):
    out = tmp_path / "device.jsonl"
    words = [*SHORT, "seconds=9", f"out={out}", "only=matmul,kl,prompt_576"]
    main(["device", *words])
    whole = lines(out)
    prompts = [line["what"] for line in whole if line.get("section") == "prompt_576" and "what" in line]
    assert [w.rpartition(", ")[2] for w in prompts][:4] == [
        f"{name}: {what}" for name in ("null", "random") for what in ("prefill", "decoding")
    ]
    # Killed while a line of the second section was written.
    text = out.read_text().splitlines(keepends=True)
    cut = next(n for n, line in enumerate(text) if '"kl"' in line) + 1
    out.write_text("".join(text[:cut]) + text[cut][:20])
    ran = []
    run = bench._run
    monkeypatch.setattr(bench, "_run", lambda place, name: ran.append(name) or run(place, name))
    main(["device", *words])
    assert ran == ["kl", "prompt_576"]
    written = [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")]
    assert {line["what"] for line in written if "what" in line} == {line["what"] for line in whole if "what" in line}
    main(["device", *words])
    assert len(ran) == 2
    with pytest.raises(ZooError, match="another machine or other options"):
        main(["device", *words, "keep_ratio=0.5"])


def test_what_fails_is_written_down_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(place):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("zoo.benches.device_training.matmul", broken)
    out = tmp_path / "device.jsonl"
    main(["device", *SHORT, "seconds=0.001", f"out={out}", "only=matmul,kl"])
    found = lines(out)
    assert found[1]["left_out"] == ["matmul: OutOfMemoryError: CUDA out of memory."] and found[-1]["section"] == "kl"
    main(["device", *SHORT, "minutes=1e-9", f"out={tmp_path / 'none.jsonl'}"])
    assert len(lines(tmp_path / "none.jsonl")) == 1


def test_models_share_their_weights():
    sizes = SIZES["tiny"]["7b"]
    base = made(sizes, torch.device("cpu"), torch.bfloat16).eval()
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    assert base.llm.lm.model.rotary_emb.inv_freq.dtype == torch.float32  # positions are not rounded
    model = with_pruner(base, sizes, "fastv", {"keep_ratio": 1.0})
    assert model.llm.lm.lm_head.weight.data_ptr() == base.llm.lm.lm_head.weight.data_ptr()
    ids = torch.tensor([[5, 3, 3, *[3] * 14, 6, 7]])
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(
            model(input_ids=ids, pixel_values=pixels).logits, base(input_ids=ids, pixel_values=pixels).logits
        )


def test_options_say_what_is_wrong(tmp_path, monkeypatch):
    for words, message in [
        ("only=matmull", "matmul"),
        ("batches=a", "batches"),
        ("minutes=0", "minutes"),
        ("sizes=x", "full"),
    ]:
        with pytest.raises(ZooError, match=message):
            parse("device", bench.Options, [words])
    assert peak_of(torch.device("cpu")) == (0.0, "CPU")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_of(torch.device("cuda"))[0] == 989.4
    with pytest.raises(ZooError, match="there is none"):
        main(["device", "device=cpu", f"out={tmp_path / 'x'}"])
    assert Journal(tmp_path / "j", {"machine": "m"}).finished() == set()
