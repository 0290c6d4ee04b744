"""What `zoo check` states of many devices: torch's own estimate of FSDP2, sums by hand, and plans that cannot be."""

from math import prod

import pytest
import torch

from zoo.benches.device_models import LLM, SIZES, made_on
from zoo.benches.llava import composed
from zoo.benches.scale import twin_row
from zoo.checking.devices import local_shapes, on_device, scale_text
from zoo.checking.plan import Plan
from zoo.cli import check_command
from zoo.registry import ZooError
from zoo.settings.config import compose
from zoo.settings.parallel import ParallelConfig
from zoo.settings.scale import Devices
from zoo.settings.stage import Stage
from zoo.text.terminal import plain

TINY = SIZES["tiny"]["7b"]


def model(**slots):
    with made_on("meta", torch.bfloat16):
        made = composed(TINY, llm=LLM, **slots)
    made.vision.requires_grad_(False)
    return made


def spread(devices, shard="fsdp2", made=None, batch=2, scale=None, **stage):
    made = made or model()
    stage = Stage(steps=1, batch_size=batch * devices, precision="bf16", **stage)
    scale = Devices(devices=devices, **(scale or {}))
    return on_device(stage, made, Plan(slots={}), scale, ParallelConfig(shard=shard)), scale


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped")
def test_it_is_what_torch_estimates():
    row = twin_row("tiny", 8)
    assert abs(row.value.median - 1) < 0.1, row.note
    assert not torch.distributed.is_initialized()


def test_shares_and_what_is_sent_are_those_by_hand():
    made = model()
    trained = [p for p in made.parameters() if p.requires_grad]
    frozen = sum(p.nbytes for p in made.parameters() if not p.requires_grad)
    numbers = sum(p.numel() for p in trained)
    whole, _ = spread(4, shard="none", made=made)
    assert (whole.weights, whole.optimizer, whole.gathered) == (4 * numbers + frozen, 8 * numbers, 0)
    assert whole.gradients >= 4 * numbers and whole.sent["reduce gradients"][0] == 2 * 3 * 4 * numbers // 4
    for shards, copies in ((4, 1), (2, 2)):
        found, scale = spread(4, made=made, scale={"replicate": copies}, accumulate=2)
        share = sum(-(-p.shape[0] // shards) * prod(p.shape[1:]) for p in trained)
        assert found.optimizer == 8 * share and found.passes == 2 and found.rows[0] == 1
        layers = 2 * sum(p.numel() for layer in made.llm.layers for p in layer.parameters())
        root = sum(p.nbytes for n, p in made.named_parameters() if not p.requires_grad)
        inside = {id(p) for layer in made.llm.layers for p in layer.parameters()}
        root += 4 * sum(p.numel() for p in trained if id(p) not in inside)
        assert found.sent["gather weights"][0] == int((shards - 1) / shards * 2 * (2 * layers + root))
        assert found.sent["reduce gradients"][0] == int((shards - 1) / shards * 2 * 4 * numbers)
        assert ("reduce over copies" in found.sent) == (copies > 1)
        assert all(seconds > 0 for _, seconds in found.sent.values()) and found.seconds(scale)[0] > 0
        assert ("HSDP" in scale_text(scale, ParallelConfig(shard="fsdp2"))) == (copies > 1)
    assert found.bound(Devices(devices=4, memory=1e-9)) == "memory"


def test_layers_that_a_stage_does_not_run_are_not_gathered():
    """An encoder that learns from dense targets alone."""
    made = model()
    made.requires_grad_(False)
    made.vision.requires_grad_(True)
    answers, _ = spread(4, made=made)
    alone, _ = spread(4, made=made, loss_weights={"answer": 0.0}, distiller="dense")
    inside = {id(p) for layer in made.llm.layers for p in layer.parameters()}
    root = sum(p.numel() * (4 if p.requires_grad else 2) for p in made.parameters() if id(p) not in inside)
    assert alone.sent["gather weights"][0] == 3 * root // 4 < answers.sent["gather weights"][0]
    assert alone.gathered < answers.gathered and alone.weights == answers.weights


def test_layers_that_devices_share():
    made = model()
    shapes = local_shapes(made, 2)
    named = dict(made.named_parameters())
    changed = {n.rpartition("layers.0.")[2]: (tuple(named[n].shape), s) for n, s in shapes.items() if "layers.0." in n}
    assert changed["self_attn.k_proj.weight"] == ((16, 32), (8, 32)) and changed["self_attn.o_proj.weight"][1] == (
        32,
        16,
    )
    assert changed["mlp.down_proj.weight"][1] == (32, 32) and "input_layernorm.weight" not in changed
    one, two = spread(4)[0], spread(4, batch=1, scale={"tensor": 2})[0]
    assert one.rows == two.rows and two.activations < one.activations
    assert 0.4 < (two.flops - one.flops / 2) / one.flops + 0.5 < 0.8  # the encoder and the head are on each
    length, width, layers = two.rows[1], 32, 6
    assert two.sent["sum over tensor parallel devices"][0] == 7 * layers * two.rows[0] * length * width * 2
    for tensor, message in ((4, "does not divide the 2 key_value_heads"), (3, "does not divide the 4")):
        with pytest.raises(ZooError, match=message):
            local_shapes(made, tensor)


def test_experts_that_are_chosen_by_a_maximum_run_without_numbers():
    """MoLE takes the index of `max` along a side, and counts tokens by it."""
    found, _ = spread(4, made=model(adapter={"mole": {"name": "mole", "rank": 2}}))
    assert found.flops > 0 and not found.notes


def test_steps_that_are_too_small_are_said_to_be():
    for batch, accumulate, passes, rows, note in (
        (16, 4, 2, 1, "accumulate=2"),
        (4, 1, 1, 1, "no sample for each of 8"),
        (20, 1, 1, 2, "rounded down"),
    ):
        stage = Stage(steps=1, batch_size=batch, accumulate=accumulate, precision="bf16")
        found = on_device(stage, model(), Plan(slots={}), Devices(devices=8), ParallelConfig())
        assert (found.passes, found.rows[0]) == (passes, rows) and note in found.notes[0]
    for wrong, message in [({"devices": 9, "replicate": 2}, "not a multiple"), ({"tensor": 16}, "between machines")]:
        with pytest.raises(ZooError, match=message):
            Devices(**wrong)


def test_speeds_of_rings():
    scale = Devices(devices=64, within=450, between=400)
    assert scale.rate(8, 1) == 450e9 and scale.rate(64, 1) == 400e9
    assert scale.rate(8, 8) == 50e9  # one of each machine: an eighth of its network


def test_the_command_prints_them(capsys):
    cfg = compose("check", ["scale.devices=4", "model=scenes_tiny", "data=[scenes_basics]"])
    report = check_command.main(cfg)
    said = capsys.readouterr().out
    assert "on 4 devices, shards over 4 (FSDP2)" in said and "a step sends" in said and "logits" in said
    assert max(map(len, said.splitlines())) <= 80
    found = plain(report.as_json())["devices"]
    assert [row["stage"] for row in found] == [stage.name for stage in report.stages]
    assert all(row["total"] > row["weights"] > 0 and row["sent"] for row in found)
