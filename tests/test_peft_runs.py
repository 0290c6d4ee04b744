"""adapter=peft in a run: what begins from data or follows the steps gives what PEFT's own calls give, and resumes."""

import json
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests import killed_runs
from tests.fusion_builders import padded_batch, tiny_llm
from tests.test_peft_methods import adapter_on, answers, move, own, plain
from tests.train_builders import config, losses, recipe, train_up_to
from zoo.composed.outputs import LLMSequence
from zoo.registry import ZooError
from zoo.registry.forward_pass import running
from zoo.settings.config import compose
from zoo.training.loop import Run

STAGES = {
    "align": "steps: 2, batch_size: 4, train: [projector, llm], lr: 0.02, detach: [peft]",
    "tune": "steps: 6, batch_size: 4, checkpoint_every: 2, train: [projector, adapter], lr: 0.02",
}
OPTIONS = {
    "adalora": "{init_r:4,target_r:1,tinit:1,tfinal:2,target_modules:[q_proj,v_proj]}",
    "corda": "{r:2,target_modules:[q_proj,v_proj]}",
    "eva": "{r:2,target_modules:[q_proj,v_proj]}",
    "pissa": "{r:2,target_modules:[q_proj,v_proj]}",
}


def words(method, folder):
    chosen = [f"adapter.peft.method={method}", f"adapter.peft.options={OPTIONS[method]}", "adapter.peft.batches=2"]
    return ["adapter=[peft]", *chosen, "llm.model_type=llama", f"run.folder={folder}"]


def weights(run):
    return {n: t.clone() for n, t in run.model.state_dict().items() if run.model.part_of(n) == "adapter.peft"}


@pytest.mark.parametrize("method", sorted(OPTIONS))
def test_a_run_that_is_cut_goes_on_to_the_same_weights(tmp_path, method):
    whole = Run(config(recipe(tmp_path / "a", STAGES), *words(method, tmp_path / "a" / "run")))
    whole.train()
    wanted, taken = weights(whole), losses(tmp_path / "a" / "run")
    llm = whole.model.llm
    whole.model.detach_only([])
    if method in ("corda", "eva"):
        assert bool(whole.model.adapter["peft"].calibrated)
    if method == "adalora":
        kept = [p for n, p in llm.lm.named_parameters() if ".lora_E." in n]
        assert sum(int((p != 0).sum()) for p in kept) == len(kept)  # of 4 each, 1 on average
        metrics = [json.loads(line) for line in (tmp_path / "a" / "run" / "metrics.jsonl").read_text().splitlines()]
        assert any("adalora_orthogonal" in str(row) for row in metrics)
    run = Run(config(recipe(tmp_path / "b", STAGES), *words(method, tmp_path / "b" / "run")))
    for at in (2, 4, 6) if method == "adalora" else (2, 4):  # whose ranks change between; the others only go on
        train_up_to(run, at)
        run = Run(compose("train", [f"resume={tmp_path / 'b' / 'run'}"]))
    run.train()
    assert losses(tmp_path / "b" / "run") == taken
    found = weights(run)
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("method", ["eva", "corda"])
def test_what_began_from_data_is_there_after_a_resume_where_nothing_trained_it_yet(tmp_path, method):
    """A stage that trains the projector alone, beside the adapter: its values are in the checkpoint all the same."""
    stages = {
        "align": "steps: 1, batch_size: 4, train: [projector]",
        "tune": "steps: 1, batch_size: 4, train: [adapter]",
    }
    run = Run(config(recipe(tmp_path, stages), *words(method, tmp_path / "run")))
    train_up_to(run)
    wanted = weights(run)
    found = weights(Run(compose("train", [f"resume={tmp_path / 'run'}"])))
    assert wanted and all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_two_processes_begin_as_one(tmp_path):
    """EVA reads the same batches in each, and what follows is averaged: the weights of one process."""
    alone = Run(config(recipe(tmp_path / "a", STAGES), *words("eva", tmp_path / "a" / "run")))
    alone.train()
    with killed_runs.served():
        two = [*recipe(tmp_path / "b", STAGES), *words("eva", tmp_path / "b" / "run")]
        ended = killed_runs.train(tmp_path / "forked", two, processes=2)
    assert ended.code == 0, ended.said
    found = load_file(tmp_path / "b" / "run" / "model" / "model.safetensors")
    for name, tensor in weights(alone).items():
        assert torch.allclose(found[name].to(tensor.dtype), tensor, atol=1e-5), name


def test_adalora_is_pefts_own_loop():
    """Over the schedule and behind it: values, ranks and what is masked."""
    options = {"target_modules": ["q_proj", "v_proj"], "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2}
    llm, steps = tiny_llm(), 8
    adapter = adapter_on(llm, "adalora", **options)
    theirs = plain("adalora", **options)
    theirs.peft_config["peft"].total_step = steps
    mine, named = own(llm, adapter), dict(theirs.base_model.model.named_parameters())
    optimizers = [torch.optim.SGD(p, lr=0.3) for p in (list(mine.values()), [named[n] for n in mine])]
    llm.lm.train()
    adapter.begin_stage(steps)
    for step in range(steps):
        loss = answers(llm.lm).float().logsumexp(-1).sum() + sum(adapter.aux_losses().values())
        out = theirs.base_model(input_ids=padded_batch()[0], attention_mask=padded_batch()[1], labels=padded_batch()[0])
        extra = out.loss - answers_loss(theirs, out)
        (out.logits.float().logsumexp(-1).sum() + extra).backward()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        adapter.end_step(step)
        theirs.base_model.update_and_allocate(step + 1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for name, p in mine.items():
            assert torch.allclose(p, named[name], atol=1e-6), (step, name)
            assert torch.equal(p == 0, named[name] == 0)
    kept = [p for n, p in mine.items() if ".lora_E." in n]
    assert sum(int((p != 0).sum()) for p in kept) == 2 * len(kept)
    with pytest.raises(ZooError, match=r"tinit=1 and its last tfinal=2 steps, and the stage that trains it has 3"):
        adapter_on(tiny_llm(), "adalora", **options).begin_stage(3)


def answers_loss(net, out):
    """The loss of transformers, without what PEFT adds to it."""
    ids = padded_batch()[0]
    return net.base_model.model.loss_function(logits=out.logits, labels=ids, vocab_size=out.logits.shape[-1])


def passes(llm, batches):
    def run(ids, mask):
        with torch.no_grad(), running(LLMSequence(None, mask, None, None)):
            llm.hidden(inputs_embeds=llm.embed(ids), attention_mask=mask)

    return [lambda b=b: run(*b) for b in batches]


def test_eva_takes_the_vectors_that_peft_takes():
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    llm = tiny_llm()
    adapter = adapter_on(llm, "eva")
    theirs = plain("eva")
    batches = [padded_batch(2, 24, seed=i) for i in range(3)]
    assert adapter.passes_first() == 8
    torch.manual_seed(3)
    adapter.calibrate(passes(llm, batches))
    torch.manual_seed(3)
    given = [{"input_ids": ids, "attention_mask": mask} for ids, mask in batches]
    theirs.peft_config["peft"].eva_config.rho = 1.0
    initialize_lora_eva_weights(theirs, given, adapter_name="peft", show_progress_bar=False)
    named = dict(theirs.base_model.model.named_parameters())
    for name, p in own(llm, adapter).items():
        assert torch.allclose(p, named[name], atol=1e-5), name
    assert adapter.passes_first() == 0
    with pytest.raises(ZooError, match=r"EVA needs at least r=4 tokens in a batch|EVA needs at least r=4"):
        adapter_on(llm2 := tiny_llm(), "eva").calibrate(passes(llm2, [padded_batch(1, 2, pad=0)]))


def test_corda_splits_the_weights_as_peft_does(monkeypatch):
    if not find_spec("attr"):  # which PEFT's module wants for its decorator, and does not install
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    llm, lm = tiny_llm(), tiny_llm().lm
    adapter = adapter_on(llm, "corda")
    batches = [padded_batch(1, 24, pad=0, seed=i) for i in range(3)]
    fresh = answers(llm.lm).detach()
    adapter.calibrate(passes(llm, batches))
    assert torch.allclose(answers(llm.lm), fresh, atol=1e-5)  # B A - B0 A0 is zero still
    given = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="corda")

    @torch.no_grad()
    def run():
        for ids, _ in batches:
            lm(input_ids=ids)

    preprocess_corda(lm, given, run_model=run)
    theirs = peft.get_peft_model(lm, given, adapter_name="peft")
    named = dict(theirs.base_model.model.named_parameters())
    mine = own(llm, adapter)
    for name, p in mine.items():
        assert torch.allclose(p, named[name], atol=1e-4 * float(named[name].abs().max())), name
    move(mine), move({n: named[n] for n in mine})
    assert torch.allclose(answers(llm.lm), answers(theirs.eval().base_model.model), atol=1e-4)


def test_a_pass_that_fails_leaves_no_hooks_of_eva():
    llm = tiny_llm()
    adapter = adapter_on(llm, "eva")

    def fails():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        adapter.calibrate([fails])
    assert not any(module._forward_hooks for module in llm.lm.modules())


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_corda_refuses_inputs_that_are_zero_or_not_finite(value):
    llm = tiny_llm()
    adapter = adapter_on(llm, "corda")
    with torch.no_grad():
        llm.lm.get_input_embeddings().weight.fill_(value)
    with pytest.raises(ZooError, match="zero in these batches, or not finite"):
        adapter.calibrate(passes(llm, [padded_batch(1, 24, pad=0)]))


@pytest.mark.parametrize("options", [{"init_r": 8}, {"init_r": 4, "target_r": 4}])
def test_adalora_without_ranks_to_give_up_is_refused(options):
    with pytest.raises(ZooError, match="init_r must be more; got init_r="):
        adapter_on(tiny_llm(), "adalora", **{"target_r": 8} | options)
