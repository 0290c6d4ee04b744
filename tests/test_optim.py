"""Optimisers: our Muon is torch's, parameters go where they belong, and the rate is a function of the step."""

import pytest
import torch
from torch import nn

from zoo.registry import ZooError
from zoo.runs.optim import StackedMuon, build_optimizers, rate_at, set_rate
from zoo.settings.stage import Stage


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.wide, self.tall = nn.Linear(128, 64), nn.Linear(64, 128)
        self.low = nn.Linear(64, 8, bias=False)
        self.head = nn.Linear(64, 50, bias=False)

    def get_output_embeddings(self):
        return self.head


def part_of(name):
    return (name.partition(".")[0],)


def places(net, stage):
    """Parameter name -> class of the optimiser that has it."""
    optimizers = build_optimizers({"": net}, stage, part_of)
    names = {id(p): n for n, p in net.named_parameters()}
    return {names[id(p)]: (type(o).__name__, g) for o in optimizers for g in o.param_groups for p in g["params"]}


def test_stacked_muon_is_torch_muon():
    torch.manual_seed(0)
    shapes = [(64, 64), (64, 64), (128, 64), (64, 128), (64, 64)]
    start = [torch.randn(s) * 0.1 for s in shapes]
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    stacked = StackedMuon(ours, lr=0.02, weight_decay=0.01)
    plain = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.01)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        stacked.step()
        plain.step()
    for a, b, t in zip(ours, theirs, start, strict=True):
        moved = (b - t).norm()
        assert moved > 0.1
        assert (a - b).norm() / moved < 0.02, "both iterate in bfloat16, which rounds to 1 in 256"


def test_a_parameter_without_gradient_stays():
    p = nn.Parameter(torch.ones(64, 64))
    StackedMuon([p]).step()
    assert p.equal(torch.ones(64, 64))


def test_muon_takes_matrices_and_adamw_the_rest():
    where = places(Net(), Stage(steps=1, optimizer="muon_adamw"))
    muon = {n for n, (kind, _) in where.items() if kind == "StackedMuon"}
    assert muon == {"a.weight", "b.weight", "wide.weight", "tall.weight"}
    assert set(where) == {n for n, _ in Net().named_parameters()}


def test_norms_biases_and_embeddings_do_not_decay():
    where = places(Net(), Stage(steps=1, weight_decay=0.1))
    assert where["a.weight"][1]["weight_decay"] == 0.1
    assert where["a.bias"][1]["weight_decay"] == where["embed.weight"][1]["weight_decay"] == 0.0


def test_tables_of_tokens_do_not_decay_whatever_they_are_called():
    net = nn.ModuleDict({"wte": nn.Embedding(50, 8), "a": nn.Linear(8, 8)})
    where = places(net, Stage(steps=1, weight_decay=0.1))
    assert where["a.weight"][1]["weight_decay"] == 0.1 and where["wte.weight"][1]["weight_decay"] == 0.0


def test_biases_of_stacked_experts_and_learnt_tokens_do_not_decay():
    net = nn.Module()
    shapes = {"bias": (4, 8), "down_proj_bias": (4, 8), "cls_token": (1, 1, 8), "down_proj": (4, 8, 8)}
    for name, shape in shapes.items():
        net.register_parameter(name, nn.Parameter(torch.ones(shape)))
    found = {n: group["weight_decay"] for n, (_, group) in places(net, Stage(steps=1, weight_decay=0.1)).items()}
    assert found == {"bias": 0.0, "down_proj_bias": 0.0, "cls_token": 0.0, "down_proj": 0.1}


@pytest.mark.parametrize("rank", [8, 48])
def test_factors_of_lora_are_not_for_muon_whatever_their_rank(rank):
    from peft import LoraConfig, inject_adapter_in_model

    net = inject_adapter_in_model(LoraConfig(r=rank, target_modules=["a"]), Net())
    net.a.base_layer.weight.requires_grad_(True)
    where = places(net, Stage(steps=1, optimizer="muon_adamw"))
    assert {n: kind for n, (kind, _) in where.items()} == {
        "a.base_layer.weight": "StackedMuon", "a.lora_A.default.weight": "AdamW", "a.lora_B.default.weight": "AdamW",
    }  # fmt: skip


def test_vectors_of_peft_that_scale_do_not_decay_to_zero():
    from peft import IA3Config, LoraConfig, inject_adapter_in_model

    for config, decay in ((IA3Config(target_modules=["a"], feedforward_modules=[]), 0.0),
                          (LoraConfig(r=1, target_modules=["a"]), 0.1)):  # fmt: skip
        net = inject_adapter_in_model(config, Net())
        where = places(net, Stage(steps=1, weight_decay=0.1))
        assert where and {group["weight_decay"] for _, group in where.values()} == {decay}, config.peft_type


def test_lr_scale_by_part_and_glob():
    where = places(Net(), Stage(steps=1, lr=1.0, lr_scale={"a": 0.1, "*.bias": 0.5}))
    assert where["a.weight"][1]["lr"] == 0.1
    assert where["a.bias"][1]["lr"] == 0.5, "the last entry that matches counts"
    assert where["b.weight"][1]["lr"] == 1.0
    with pytest.raises(ZooError, match=r"'heat'. Did you mean 'head'"):
        places(Net(), Stage(steps=1, lr_scale={"heat": 0.1}))


def test_frozen_parameters_are_left_out():
    net = Net().requires_grad_(False)
    with pytest.raises(ZooError, match="Nothing trains"):
        places(net, Stage(steps=1))
    net.a.requires_grad_(True)
    assert set(places(net, Stage(steps=1))) == {"a.weight", "a.bias"}


def test_rate_rises_stays_and_falls():
    stage = Stage(steps=100, warmup_ratio=0.1, flat_ratio=0.5, final_ratio=0.02)
    rates = [rate_at(i, 100, stage) for i in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0
    assert rates[10:50] == [1.0] * 40
    assert rates[75] == pytest.approx(0.51)
    assert rates[100] == pytest.approx(0.02)
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_schedules_end_where_they_should():
    for schedule, half in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        stage = Stage(steps=10, schedule=schedule, warmup_ratio=0.0)
        assert rate_at(0, 10, stage) == 1.0
        assert rate_at(5, 10, stage) == pytest.approx(half)
    assert rate_at(0, 1, Stage(steps=1)) == 1.0


def test_set_rate_keeps_the_peaks():
    optimizers = build_optimizers({"": Net()}, Stage(steps=1, optimizer="muon_adamw", lr=1.0, matrix_lr=2.0), part_of)
    set_rate(optimizers, 0.5)
    set_rate(optimizers, 0.25)
    assert [o.param_groups[0]["lr"] for o in optimizers] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "either steps or epochs"),
        ({"steps": 1, "epochs": 1.0}, "either steps or epochs"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 1, "batch_size": 6, "accumulate": 4}, "does not split evenly"),
        ({"steps": 1, "optimizer": "adam"}, "'adam'. Did you mean 'adamw'"),
        ({"steps": 1, "schedule": "linaer"}, "Did you mean 'linear'"),
        ({"steps": 1, "train": []}, "'train' is empty"),
        ({"steps": 1, "betas": [0.9]}, "betas"),
        ({"steps": 1, "data": {"a": 0.0}}, "all weights are 0"),
        ({"steps": 1, "lr": -1.0}, "lr must be at least 0"),
        ({"steps": 1, "lr": float("nan")}, "lr must be at least 0"),
        ({"steps": 1, "lr": float("inf")}, "lr must be at least 0 and finite"),
        ({"steps": 1, "distiller": 3}, "A distiller is a name"),
        ({"steps": 1, "pack": "none", "pack_length": 64}, "needs pack=dialogs"),
    ],
)
def test_a_stage_says_what_is_wrong(wrong, message):
    with pytest.raises(ZooError, match=message):
        Stage(**wrong)
