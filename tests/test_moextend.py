"""MoExtend: its equations, what stays as it was to the bit, its balance, its choice of layers, merging."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from tests.conftest import tiny_slots
from tests.fusion_builders import VOCAB, adapter_on, features, llm_node, padded_batch, same_state, tiny_llm
from zoo.checking.checker import RefusedError, check
from zoo.checking.plan import Plan
from zoo.composed.assembly import assemble
from zoo.fusion.adapters import expert_shift, extended_layer
from zoo.registry import ZooError
from zoo.registry.forward_pass import running
from zoo.settings.stage import Stage

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe"]
KERNELS = ["eager", "grouped_mm", "batched_mm"]


def extended(llm, seed=0, attach=True, shaken=0.2, **options):
    node = {"name": "moextend", "layers": [0], "sources": [1], **options}
    return adapter_on(llm, node, seed, attach=attach, shaken=shaken)


def logits(llm, ids, mask=None):
    return llm.lm(ids, attention_mask=mask).logits


def twin(gate, experts, layer, x):
    """The equations for one token after the other: (S, C) -> (S, C)."""
    rows = layer.rows
    weight = torch.cat([gate.weight, rows.weight])
    up = [*experts.gate_up_proj, *layer.gate_up_proj]
    down = [*experts.down_proj, *layer.down_proj]
    result = []
    for token in x:
        p = (weight @ token).softmax(0)
        chosen = p.topk(gate.top_k).indices
        q = p if rows.calib_in is None else p + rows.calib_out @ F.gelu(rows.calib_in @ p)
        w = q[chosen] / q[chosen].sum() if getattr(gate, "norm_topk_prob", True) else q[chosen]
        parts = []
        for share, e in zip(w, chosen, strict=True):
            a, b = (up[e] @ token).chunk(2)
            parts.append(share * (down[e] @ (F.silu(a) * b)))
        result.append(sum(parts))
    return torch.stack(result)


@pytest.mark.parametrize("options", [{}, {"num_new": 2, "calibration_width": 0}, {"shaken": 0}])
@pytest.mark.parametrize("counts_are_read", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_values_and_gradients_are_those_of_the_equations(model_type, options, counts_are_read, monkeypatch):
    monkeypatch.setattr(extended_layer, "_may_read_counts", lambda x: counts_are_read)
    llm = tiny_llm(model_type).double()
    llm.lm.set_experts_implementation("eager")  # grouped products of float64 do not exist
    plain = copy.deepcopy(llm.layers[0].mlp)
    adapter = extended(llm, **options)
    layer, block = adapter.layers["0"], llm.layers[0].mlp
    x = torch.randn(17, 32, dtype=torch.float64, requires_grad=True)
    got = block.experts(x, *reversed(block.gate(x)[1:]))
    wanted = twin(plain.gate, plain.experts, layer, x)
    assert torch.allclose(got, wanted, atol=1e-10)
    inputs = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(y.square().sum(), inputs, allow_unused=True) for y in (got, wanted))
    for (name, p), a, b in zip([("x", x), *layer.named_parameters()], ours, theirs, strict=True):
        if options.get("num_new") == 2 or not options.get("shaken", True):
            continue  # ties between copies: which of two equal experts runs is free, their gradients are not the same
        assert torch.allclose(a, torch.zeros_like(p) if b is None else b, atol=1e-9), name


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_detached_it_is_the_base_model_to_the_bit_and_attached_all_kernels_agree(model_type, kernel, monkeypatch):
    llm = tiny_llm(model_type)
    llm.lm.set_experts_implementation(kernel)
    ids, mask = padded_batch(2, 12)
    wanted = logits(llm, ids, mask)
    adapter = extended(llm)
    extended_logits = logits(llm, ids, mask)
    # As on CUDA: the family's own kernel skips rows of new experts.
    monkeypatch.setattr(extended_layer, "_may_read_counts", lambda x: False)
    assert torch.allclose(logits(llm, ids, mask), extended_logits, atol=1e-5)
    adapter.detach()
    assert torch.equal(logits(llm, ids, mask), wanted)
    adapter.attach()
    assert (extended_logits - wanted).abs().max() > 1e-3
    llm.lm.set_experts_implementation("eager")
    assert torch.allclose(logits(llm, ids, mask), extended_logits, atol=1e-5)
    adapter.detach()
    llm.lm.set_experts_implementation(kernel)
    assert torch.equal(logits(llm, ids, mask), wanted)


@torch.no_grad()
def test_at_the_start_only_tokens_of_the_copied_expert_change():
    llm = tiny_llm("mixtral")
    block = llm.layers[0].mlp
    x = torch.randn(1, 60, 32)
    before, first = block(x), block.gate(x)[2][:, 0]
    extended(llm, shaken=0)
    changed = (block(x) - before).abs().amax(-1)[0] > 1e-6
    assert torch.equal(changed, first == 1) and changed.any() and not changed.all()


def test_the_calibration_starts_without_effect_and_can_learn():
    llm = tiny_llm("mixtral")
    adapter = extended(llm, shaken=0)
    rows = adapter.layers["0"].rows
    ids = padded_batch()[0]
    out = logits(llm, ids)
    out.square().sum().backward()
    assert rows.calib_out.grad.any() and not rows.calib_in.grad.any()
    with torch.no_grad():
        rows.calib_in.mul_(3)
    assert torch.equal(logits(llm, ids), out)


def test_only_the_new_learn_and_the_old_keep_their_bits():
    llm = tiny_llm("qwen3_moe")
    llm.requires_grad_(False)
    base = {k: v.clone() for k, v in llm.lm.state_dict().items()}
    adapter = extended(llm)
    adapter.train()
    step = torch.optim.AdamW(adapter.parameters(), lr=0.01, weight_decay=0.1)
    with running():
        hidden = llm.hidden(inputs_embeds=llm.embed(padded_batch()[0])).last_hidden_state
        aux = adapter.aux_losses()["moextend_balance"]
    (hidden.square().sum() + aux).backward()
    step.step()
    assert all(p.grad is not None for p in adapter.parameters())
    assert same_state(llm.lm.state_dict(), base) and all(p.grad is None for p in llm.parameters())


@pytest.mark.parametrize("counts_are_read", [True, False])
def test_an_expert_that_no_token_chooses_gets_zero(counts_are_read, monkeypatch):
    monkeypatch.setattr(extended_layer, "_may_read_counts", lambda x: counts_are_read)
    llm = tiny_llm("mixtral")
    adapter = extended(llm)
    layer = adapter.layers["0"]
    seen = torch.rand(1, 20, 32)  # positive, so that a row of large negative numbers is never chosen
    with torch.no_grad():
        layer.rows.weight.fill_(-100.0)
    llm.layers[0].mlp(seen).sum().backward()
    assert not layer.gate_up_proj.grad.any() and not layer.down_proj.grad.any()
    assert layer.rows.calib_out.grad.isfinite().all()


def test_frozen_experts_keep_no_rows_for_gradients():
    kept = []
    for frozen in (True, False):
        llm = tiny_llm("mixtral").requires_grad_(not frozen)
        extended(llm)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            llm.layers[0].mlp(torch.randn(1, 64, 32, requires_grad=True))
        kept.append(sum(sizes))
    rows = 0.75 * 128  # that enter the old experts' two halves, at the least: the others are the new one's
    assert kept[0] <= kept[1] - rows * (32 + 48)


def test_the_balance_counts_each_layer_by_its_own_experts():
    for official in (False, True):
        llm = tiny_llm("mixtral")
        adapter = extended(llm, aux=0.5, official_aux=official)
        adapter.train()
        gates = []
        for layer in llm.layers:
            layer.mlp.gate.register_forward_hook(lambda m, a, out, gates=gates: gates.append(out))
        ids, mask = padded_batch(2, 12)
        with running():
            llm.hidden(inputs_embeds=llm.embed(ids), attention_mask=mask)
            aux = adapter.aux_losses()["moextend_balance"]
        total, real = 0, mask.flatten().bool()
        for raw, _, chosen in gates:
            p, e = raw[real].softmax(-1), raw.shape[-1]
            share = F.one_hot(chosen[real], e).float().mean(0)  # (k, E)
            total += (5 if official else e) * (share * p.mean(0)).sum()
        assert [raw.shape[-1] for raw, _, _ in gates] == [5, 4]
        assert torch.allclose(aux, 0.5 * total / 2, atol=1e-6)
        adapter.eval()
        with running():
            llm.hidden(inputs_embeds=llm.embed(ids))
            assert not adapter.aux_losses()


@torch.no_grad()
def test_recorded_logits_have_a_column_for_the_new_expert():
    llm = tiny_llm("mixtral")
    ids = padded_batch()[0]
    logits(llm, ids)  # transformers hooks its recorders in at the first pass that records
    pair = torch.nn.ModuleList([llm, extended(llm, layers=[1])])
    for both in (pair, copy.deepcopy(pair)):
        got = both[0].lm.model(ids, output_router_logits=True).router_logits
        assert [t.shape[-1] for t in got] == [4, 5]


@torch.no_grad()
def test_the_guard_leaves_text_alone():
    llm = tiny_llm("mixtral")
    ids, mask = padded_batch(2, 12)
    wanted = logits(llm, ids, mask)
    adapter = extended(llm, guard=True)
    image = features(m=1)
    for rows in ([0, 0], []):  # text given as embeddings comes without a number of images
        adapter.condition(None, rows)
        assert torch.equal(logits(llm, ids, mask), wanted)
    generated = llm.lm.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    adapter.detach()
    assert torch.equal(
        llm.lm.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0), generated
    )
    adapter.attach()
    adapter.condition(image, [0, 1])
    mixed = logits(llm, ids, mask)
    assert torch.allclose(mixed[0], wanted[0], atol=1e-6) and (mixed[1] - wanted[1]).abs().max() > 1e-3
    adapter.condition(image, [1, 1])
    assert torch.allclose(logits(llm, ids, mask)[1], mixed[1], atol=1e-6)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    adapter.condition(image, [0, 1], expand=3)
    assert torch.equal(llm.lm.generate(ids, **options), llm.lm.generate(ids, use_cache=False, **options))


def test_under_the_guard_text_alone_gives_every_parameter_a_gradient():
    llm = tiny_llm("mixtral")
    adapter = extended(llm, guard=True)
    adapter.train()
    adapter.condition(None, [0, 0])
    logits(llm, padded_batch()[0]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("guard", [True, False])
def test_under_the_guard_a_row_is_one_sample(guard):
    """Beside one with an image, text in a packed row would use the new experts."""
    slots = tiny_slots(llm=llm_node("mixtral"), adapter={"moextend": {"layers": [0], "guard": guard}})
    plan = Plan(slots, vocab_size=360, stages={"main": Stage(train=["adapter"], steps=1, pack_length=64)})
    why = "pack_length=64 puts several samples into a row, and adapter 'moextend'"
    with pytest.raises(RefusedError, match=why) if guard else nullcontext():
        check(plan)


@torch.no_grad()
def test_new_experts_have_no_order():
    llm = tiny_llm("mixtral")
    adapter = extended(llm, num_new=2)
    ids = padded_batch(2, 12)[0]
    wanted = logits(llm, ids)
    layer = adapter.layers["0"]
    for p in (layer.gate_up_proj, layer.down_proj, layer.rows.weight):
        p.copy_(p.flip(0))
    turn = [0, 1, 2, 3, 5, 4]
    layer.rows.calib_in.copy_(layer.rows.calib_in[:, turn])
    layer.rows.calib_out.copy_(layer.rows.calib_out[turn])
    assert torch.allclose(logits(llm, ids), wanted, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("model_type", FAMILIES)
def test_merged_it_is_a_plain_checkpoint(model_type, tmp_path):
    from transformers import AutoModelForCausalLM

    llm = tiny_llm(model_type)
    adapter = extended(llm, layers=[0, 1], sources=[1, 2], calibration_width=0)
    ids, mask = padded_batch(2, 12)
    wanted = logits(llm, ids, mask)
    adapter.merge()
    assert torch.allclose(logits(llm, ids, mask), wanted, atol=1e-5)
    llm.lm.save_pretrained(tmp_path)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(alone(ids, attention_mask=mask).logits, wanted, atol=1e-5)
    assert alone.model.layers[0].mlp.experts.gate_up_proj.shape[0] == 5
    with pytest.raises(ZooError, match="not attached"):
        adapter.merge()


def test_what_cannot_be_merged_says_why():
    with pytest.raises(ZooError, match=r"layer 1 has no new one.*adapter.moextend.layers=\[0,1\]"):
        extended(tiny_llm("mixtral")).merge()
    with pytest.raises(ZooError, match="calibration_width=0"):
        extended(tiny_llm("mixtral"), layers=[0, 1], sources=[0, 0]).merge()
    with pytest.raises(ZooError, match="guard=true"):
        extended(tiny_llm("mixtral"), layers=[0, 1], sources=[0, 0], calibration_width=0, guard=True).merge()


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path):
    llm, other = tiny_llm("mixtral"), tiny_llm("mixtral")
    extended(llm).save(tmp_path)
    extended(other, seed=5).load(tmp_path)
    ids = padded_batch()[0]
    assert torch.equal(logits(llm, ids), logits(other, ids))
    with pytest.raises(ZooError, match=r"has layers \[0\], this one \[1\]"):
        extended(tiny_llm("mixtral"), layers=[1]).load(tmp_path)
    with pytest.raises(ZooError, match=r"has old_experts \[4\], this one \[6\]"):
        extended(tiny_llm("mixtral", num_experts=6)).load(tmp_path)
    with pytest.raises(ZooError, match="num_new=1"):
        extended(tiny_llm("mixtral"), num_new=2).load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [5], "sources": []}, "Layer 5 has no experts to add to. Layers with experts: 0, 1"),
        ({"sources": [4]}, "sources must be in 0 ... 3, got 4"),
        ({"sources": [1, 2]}, "sources needs an expert for each of the 1 layers"),
        ({"layers": [0, 0], "sources": []}, "names a layer twice"),
        ({"num_new": 0}, "num_new must be at least 1"),
        ({"aux": -1.0}, "aux must not be negative"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        extended(tiny_llm("mixtral"), attach=False, **options)


@pytest.mark.fixes
def test_dense_models_and_a_second_balance_loss_are_refused():
    plan = Plan({"llm": llm_node(), "adapter": {"moextend": {}}}, vocab_size=512)
    with pytest.raises(RefusedError, match=r"adapter 'moextend' adds to experts .* 'llama' has none") as refusal:
        check(plan)
    assert "llm.model_type=mixtral" in refusal.value.fixes
    with pytest.raises(ZooError, match=r"'granitemoe' has none\. Take such an LLM"):
        extended(tiny_llm("granitemoe"), attach=False)
    slots = {"llm": llm_node("mixtral", router_aux_coef=0.01), "adapter": {"moextend": {}}}
    with pytest.raises(ZooError, match=r"set llm\.router_aux_coef=0"):
        assemble(slots, vocab_size=VOCAB)


def test_layers_are_those_whose_routing_shifts_most():
    before = {0: torch.tensor([10, 10, 10, 10]), 2: torch.tensor([40, 0, 0, 0]), 3: torch.tensor([4, 3, 2, 1])}
    after = {0: torch.tensor([8, 12, 10, 10]), 2: torch.tensor([10, 10, 5, 15]), 3: torch.tensor([1, 1, 2, 6])}
    assert expert_shift.select(before, after, 0.7) == ([2, 3], [3, 3])
    assert expert_shift.select(before, after, 1.0) == ([0, 2, 3], [1, 3, 3])
    with pytest.raises(ZooError, match="leave a layer of 3"):
        expert_shift.select(before, after, 0.2)


def test_layers_in_which_nothing_was_counted_are_not_chosen_from():
    counts, nothing = {i: torch.tensor([3, 1, 2, 1]) for i in range(4)}, torch.zeros(4, dtype=torch.long)
    for before, after, message in [
        (dict.fromkeys(counts, nothing), dict.fromkeys(counts, nothing), "layer 0 of the first model"),
        (counts, counts | {2: nothing}, "layer 2 of the second model"),
        (counts | {1: nothing}, counts, r"layer 1 of the first model \(counts \[0, 0, 0, 0\]\)"),
        (counts, counts | {3: torch.tensor([1, 2])}, "Layer 3 has 4 experts in the first model, 2 in the second"),
    ]:
        with pytest.raises(ZooError, match=message):
            expert_shift.select(before, after)


@torch.no_grad()
def test_counts_are_of_the_experts_that_ran():
    llm = tiny_llm("mixtral")
    ids, mask = padded_batch(2, 12)
    with expert_shift.counted(llm) as counts:
        logits(llm, ids, mask)
    x = []
    handle = llm.layers[0].mlp.gate.register_forward_pre_hook(lambda m, a: x.append(a[0]))
    logits(llm, ids, mask)
    handle.remove()
    raw = (x[0] @ llm.layers[0].mlp.gate.weight.T)[mask.flatten().bool()]
    wanted = [int((raw.topk(2).indices == e).sum()) for e in range(4)]
    assert counts[0].tolist() == wanted and counts[0].sum() == 2 * int(mask.sum())
    assert wanted != [int((raw.topk(2, largest=False).indices == e).sum()) for e in range(4)]
    assert not llm.lm.model._forward_pre_hooks


MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
OTHER_ROUTERS = {
    "deepseek_v2": {"num_kv_heads": 0, "extra": {"first_k_dense_replace": 1, **MLA}},  # weights are not renormalised
    "ernie4_5_moe": {},  # a bias on probabilities
    "flint": {},  # sigmoids
    "glm4_moe": {"extra": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}},  # sigmoids, a bias and groups
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("model_type", OTHER_ROUTERS)
def test_routers_that_choose_in_another_way_are_refused(model_type, device):
    """Its routing would stand in for theirs, and old experts would get other weights than they were trained with."""
    with torch.device(device):
        llm = tiny_llm(model_type, **{"num_experts": 4, "top_k": 2, "num_layers": 3} | OTHER_ROUTERS[model_type])
        with pytest.raises(ZooError, match="layer 2 chooses or weighs experts in another way"):
            extended(llm, layers=[2], attach=False)
        extended(tiny_llm("qwen3_vl_moe_text", num_experts=4, top_k=2), attach=False, shaken=0)


@torch.no_grad()
@pytest.mark.parametrize("counts_are_read", [True, False])
def test_terms_of_peft_on_the_old_experts_count(counts_are_read, monkeypatch):
    """PEFT gives the experts another class for the time of a pass."""
    monkeypatch.setattr(extended_layer, "_may_read_counts", lambda x: counts_are_read)
    ids, mask = padded_batch()
    both = []
    for terms in (False, True):
        llm = tiny_llm("mixtral")
        extended(llm)
        if terms:
            options = {"r": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
            adapter_on(llm, {"name": "peft", "options": options}, shaken=0)
            for name, p in llm.lm.named_parameters():
                p.add_(0.2 if ".lora_B." in name else 0.0)
        both.append(logits(llm, ids, mask))
    assert (both[0] - both[1]).abs().max() > 1e-3
