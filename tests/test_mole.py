"""MoLE: its equations against a loop over tokens, its gates, balance, padding, and where it cannot be."""

import copy

import pytest
import torch
from torch.nn import functional as F

from tests.fusion_builders import VOCAB, adapter_on, llm_node, padded_batch, tiny_llm
from zoo import registry
from zoo.composed.assembly import MisfitError, assemble
from zoo.fusion.adapters import mole
from zoo.registry import ZooError
from zoo.registry.forward_pass import running
from zoo.registry.versions import checkpoint_activations

MANY, FEW = (2, 12), (1, 5)  # tokens that are sorted, tokens that are not


def mole_on(llm, seed=0, attach=True, shaken=0.2, **options):
    return adapter_on(llm, {"name": "mole", "rank": 3, **options}, seed, attach=attach, shaken=shaken)


def twin(mlp, layer, x, gate, scale):
    """The equations for one token after the other, (S, C) -> (S, C)."""

    def linear(name, h, k, c):
        e = layer.experts[name]
        base = getattr(mlp, name).weight @ h
        return base + scale * sum(w * (e.lora_B[i] @ (e.lora_A[i] @ h)) for i, w in zip(k, c, strict=True))

    rows = []
    for token in x:
        p = (layer.router.weight @ token + layer.router.bias).softmax(0)
        best = int(p.argmax())
        one = {"none": 1.0, "prob": p[best], "ste": 1 + p[best] - p[best].detach()}
        k, c = (range(len(p)), p) if gate == "dense" else ([best], [one[gate]])
        u = F.silu(linear("gate_proj", token, k, c)) * linear("up_proj", token, k, c)
        rows.append(linear("down_proj", u, k, c))
    return torch.stack(rows)


@pytest.mark.parametrize("crowd", [MANY, FEW, "beside another adapter"])
@pytest.mark.parametrize("gate", mole.GATES)
def test_values_and_gradients_are_those_of_the_equations(gate, crowd):
    llm = tiny_llm()
    llm.double()
    mlp = llm.layers[1].mlp
    adapter = mole_on(llm, gate=gate, num_experts=4, alpha=5.0)
    if isinstance(crowd, str):
        mlp.up_proj.register_forward_hook(lambda *a: None)
    x = torch.randn(*(MANY if isinstance(crowd, str) else crowd), 32, dtype=torch.float64, requires_grad=True)
    layer = adapter.layers["1"]
    inputs = [x, *(p for p in layer.parameters() if gate != "none" or "lora" in _name(layer, p))]
    wanted = twin(copy.deepcopy(tiny_llm()).double().layers[1].mlp, layer, x.flatten(0, 1), gate, 5 / 3)
    got = mlp(x)
    assert torch.allclose(got.flatten(0, 1), wanted, atol=1e-10)
    ours, theirs = (torch.autograd.grad(y.square().sum(), inputs) for y in (got, wanted))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-9), "gradients"


def _name(module, parameter):
    return next(n for n, p in module.named_parameters() if p is parameter)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi3", "gemma"])
def test_a_fresh_one_is_the_base_model_to_the_bit(model_type):
    llm = tiny_llm(model_type)
    ids, mask = padded_batch(2, 12)
    wanted = llm.lm(ids, attention_mask=mask).logits
    mole_on(llm, shaken=0)
    assert torch.equal(llm.lm(ids, attention_mask=mask).logits, wanted)


@torch.no_grad()
def test_one_expert_is_lora():
    llm, other = tiny_llm(), tiny_llm()
    adapter = mole_on(llm, num_experts=1, alpha=6.0)
    torch.manual_seed(0)
    names = ["gate_proj", "up_proj", "down_proj"]
    lora = registry.build("adapter", {"name": "lora", "rank": 3, "alpha": 6.0, "targets": names}, llm=other)
    lora.attach()
    state = lora.adapter_state_dict()  # shares memory with the parameters
    for i, layer in adapter.layers.items():
        for name, e in layer.experts.items():
            for which, value in (("A", e.lora_A), ("B", e.lora_B)):
                state[f"model.layers.{i}.mlp.{name}.lora_{which}.lora.weight"].copy_(value[0])
    ids, mask = padded_batch(2, 12, pad=0)
    a, b = (m.lm(ids, attention_mask=mask).logits for m in (llm, other))
    assert torch.allclose(a, b, atol=1e-5) and not list(adapter.layers["0"].router.parameters())


@torch.no_grad()
def test_experts_have_no_order():
    llm = tiny_llm()
    llm.double()
    adapter = mole_on(llm, num_experts=4, gate="prob")
    ids, mask = padded_batch(2, 12)
    wanted = llm.lm(ids, attention_mask=mask).logits
    turn = torch.tensor([2, 0, 3, 1])
    for p in adapter.parameters():
        p.copy_(p[turn])
    assert torch.allclose(llm.lm(ids, attention_mask=mask).logits, wanted, atol=1e-10)


def losses(adapter, llm, embeds, mask):
    adapter.train()
    with running() as passed:
        hidden = llm.hidden(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        return hidden, adapter.aux_losses(), passed


def test_the_gate_decides_what_the_router_learns_from():
    for gate in mole.GATES:
        llm = tiny_llm()
        adapter = mole_on(llm, gate=gate, balance=0.0, dropout=0.0)
        hidden, aux, _ = losses(adapter, llm, llm.embed(padded_batch(2, 12)[0]), None)
        hidden.square().sum().backward()
        assert not aux
        router = adapter.layers["0"].router
        if gate == "none":  # nothing would ever train it, and data parallelism wants a gradient for each parameter
            assert not list(router.parameters()) and set(router.state_dict()) == {"weight", "bias"}
        else:
            assert router.weight.grad.abs().sum() > 0
    plain, straight = (mole_on(tiny_llm(), gate=g) for g in ("none", "ste"))
    ids = padded_batch(2, 12)[0]
    assert torch.equal(plain.llm.lm(ids).logits, straight.llm.lm(ids).logits)


def test_the_released_balance_is_its_formula_and_padding_does_not_count():
    made = []
    for official in (True, False):
        llm = tiny_llm()
        llm.double()
        adapter = mole_on(llm, balance=0.5, official_balance=official, dropout=0.0)
        ids, mask = padded_batch(2, 12)
        embeds = llm.embed(ids).detach()
        _, aux, _ = losses(adapter, llm, embeds, mask)
        inputs = {}
        for i in (0, 1):
            note = lambda m, a, i=i, inputs=inputs: inputs.update({i: a[0]})  # noqa: E731
            llm.layers[i].mlp.register_forward_pre_hook(note, prepend=True)
        losses(adapter, llm, embeds, mask)
        changed = embeds.clone()
        changed[mask == 0] = torch.randn(3, 32, dtype=torch.float64)
        again = losses(adapter, llm, changed, mask)[1]["mole_balance"]
        assert torch.allclose(aux["mole_balance"], again, atol=1e-12)
        made.append((adapter, aux["mole_balance"], inputs, mask))
    (adapter, value, inputs, mask), (_, per_layer, _, _) = made
    total = []
    for i in range(2):
        rows = []
        for layer in (0, 1):
            router = adapter.layers[str(layer)].router
            for t in range(12):
                if mask[i, t]:
                    p = (router.weight @ inputs[layer][i, t] + router.bias).softmax(0)
                    rows.append((p, F.one_hot(p.argmax(), 3).double()))
        mean, share = (sum(r[j] for r in rows) / len(rows) for j in (0, 1))
        total.append((mean * share).sum())
    assert torch.allclose(value, 0.5 * sum(total) / 2, atol=1e-12)
    each = []
    for layer in (0, 1):
        router = adapter.layers[str(layer)].router
        p = (inputs[layer][mask.bool()] @ router.weight.T + router.bias).softmax(-1)
        each.append(3 * (p.mean(0) * F.one_hot(p.argmax(1), 3).double().mean(0)).sum())
    assert torch.allclose(per_layer, 0.5 * sum(each) / 2, atol=1e-6)  # counts are float32
    assert {n for n, p in adapter.named_parameters() if p.grad is not None} == set()
    value.backward()
    assert {n.split(".")[-2] for n, p in adapter.named_parameters() if p.grad is not None and p.grad.any()} >= {
        "router"
    }


def test_experts_without_tokens_get_zero_and_padding_gets_no_expert():
    llm = tiny_llm()
    adapter = mole_on(llm, dropout=0.0)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.router.bias[1] = 100.0
    ids, mask = padded_batch(2, 12)
    seen = {}
    llm.layers[0].mlp.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]), prepend=True)
    llm.layers[0].mlp.register_forward_hook(lambda m, a, out: seen.update(y=out))
    hidden, _, passed = losses(adapter, llm, llm.embed(ids), mask)
    hidden.sum().backward()
    grad = adapter.layers["0"].experts["up_proj"].lora_A.grad
    assert grad[1].any() and not grad[[0, 2]].any()
    adapter.detach()
    x, y = seen["x"], seen["y"]
    same = (llm.layers[0].mlp(x) == y).all(-1)
    assert torch.equal(same, mask == 0)
    assert adapter.usage(passed) == {0: [0.0, 1.0, 0.0], 1: [0.0, 1.0, 0.0]}


@torch.no_grad()
def test_more_padding_changes_nothing():
    llm = tiny_llm()
    mole_on(llm)
    ids = padded_batch(1, 12)[0]
    wanted = llm.lm(ids, attention_mask=torch.ones_like(ids)).logits
    wide = F.pad(ids, (9, 0), value=5)
    mask = F.pad(torch.ones_like(ids), (9, 0))
    assert torch.allclose(llm.lm(wide, attention_mask=mask).logits[:, 9:], wanted, atol=1e-5)


def test_two_passes_before_one_backward_under_checkpointing():
    grads = []
    for checkpointing in (False, True):
        llm = tiny_llm()
        adapter = mole_on(llm, dropout=0.0)
        llm.train()
        if checkpointing:
            checkpoint_activations(llm.lm, {"use_reentrant": False})
        total = 0
        for pad in (2, 7):
            ids, mask = padded_batch(2, 12, pad)
            hidden, aux, _ = losses(adapter, llm, llm.embed(ids), mask)
            total = total + hidden.square().sum() + aux["mole_balance"]
        total.backward()
        grads.append([p.grad for p in adapter.parameters()])
    assert all(
        torch.allclose(a, b, atol=1e-5 * max(1.0, float(b.detach().abs().max()))) for a, b in zip(*grads, strict=True)
    )


def test_reentrant_checkpointing_is_refused_where_the_balance_would_not_learn():
    llm = tiny_llm()
    adapter = mole_on(llm)
    llm.train()
    checkpoint_activations(llm.lm, {"use_reentrant": True})
    embeds = llm.embed(padded_batch(2, 12)[0]).detach().requires_grad_()
    with pytest.raises(ZooError, match="use_reentrant=False"):
        losses(adapter, llm, embeds, None)


def test_compiled_decoder_layers_say_the_same():
    llm = tiny_llm()
    adapter = mole_on(llm, dropout=0.0)
    ids, mask = padded_batch(2, 12)
    results = []
    torch._dynamo.reset()
    for compiled in (False, True):
        adapter.zero_grad()
        if compiled:
            for layer in llm.layers:
                layer.compile(fullgraph=True, backend="aot_eager")
        hidden, aux, _ = losses(adapter, llm, llm.embed(ids), mask)
        (hidden.square().sum() + aux["mole_balance"]).backward()
        results.append([hidden, aux["mole_balance"], *(p.grad for p in adapter.parameters())])
    torch._dynamo.reset()
    assert all(
        torch.allclose(a, b, atol=1e-4 * max(1.0, float(b.detach().abs().max()))) for a, b in zip(*results, strict=True)
    )


def test_new_weights_are_float32_and_products_run_in_the_base_type():
    llm = tiny_llm()
    llm.lm.to(torch.bfloat16)
    adapter = mole_on(llm)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    ids = padded_batch(2, 12)[0]
    assert llm.lm(ids).logits.dtype == torch.bfloat16
    adapter.to(torch.bfloat16)
    assert {n.split(".")[-2] for n, p in adapter.named_parameters() if p.dtype == torch.float32} == {"router"}
    plain = tiny_llm()
    mole_on(plain)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            low = plain.lm(ids).logits
        assert (low.float() - plain.lm(ids).logits).abs().mean() < 0.01  # a near tie may choose another expert


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path):
    llm, other = tiny_llm(), tiny_llm()
    mole_on(llm).save(tmp_path)
    mole_on(other, seed=7).load(tmp_path)
    ids, mask = padded_batch(2, 12)
    assert torch.equal(*(m.lm(ids, attention_mask=mask).logits for m in (llm, other)))
    for options, message in [
        ({"num_experts": 4}, "num_experts=3"),
        ({"rank": 4}, "rank=3"),
        ({"layers": [1]}, "layers"),
    ]:
        with pytest.raises(ZooError, match=message):
            mole_on(tiny_llm(), **options).load(tmp_path)
    with pytest.raises(ZooError, match="of another model"):
        mole_on(tiny_llm("phi3")).load(tmp_path)
    with pytest.raises(ZooError, match="does not hold a saved adapter"):
        mole_on(tiny_llm()).load(tmp_path / "nowhere")


@torch.no_grad()
def test_a_copy_of_the_model_has_experts_of_its_own():
    pair = torch.nn.ModuleList([tiny_llm()])
    pair.append(mole_on(pair[0]))
    ids = padded_batch(2, 12)[0]
    wanted = pair[0].lm(ids).logits
    other = copy.deepcopy(pair)
    for p in pair[1].parameters():
        p.zero_()
    assert torch.equal(other[0].lm(ids).logits, wanted)


def test_it_cannot_be_merged_and_says_why():
    with pytest.raises(ZooError, match="depends on the token"):
        mole_on(tiny_llm()).merge()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "top"}, "No gate named 'top'"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"balance": -1.0}, "balance must not be negative"),
        ({"layers": [2]}, "layers must be in 0 ... 1, got 2"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with torch.device("meta"), pytest.raises(ZooError, match=message):
        mole_on(registry.build("llm", llm_node(), vocab_size=VOCAB), attach=False, shaken=0, **options)


def test_a_family_without_a_feed_forward_module_is_refused():
    with pytest.raises(ZooError, match=r"OPTDecoderLayer has .*fc1"):
        mole_on(tiny_llm("opt"), attach=False)


@pytest.mark.parametrize("order", [("lora", "mole"), ("mole", "lora")])
def test_plain_lora_on_the_same_linears_is_refused(order):
    nodes = {"lora": {"name": "lora", "targets": ["up_proj", "q_proj"]}, "mole": {"name": "mole"}}
    slots = {"llm": llm_node(), "adapter": {name: nodes[name] for name in order}}
    with torch.device("meta"), pytest.raises(MisfitError, match=r"both take \d+ modules of the LLM, .*mlp\.up_proj"):
        assemble(slots, vocab_size=VOCAB)
    nodes["lora"]["targets"] = ["q_proj", "o_proj"]
    parts = assemble({**slots}, vocab_size=VOCAB)
    assert parts.llm.lm(padded_batch(2, 12)[0]).logits.isfinite().all()


def test_around_another_adapters_mixture():
    slots = {"llm": llm_node(), "adapter": {"upcycle": {"name": "upcycle"}, "mole": {"name": "mole", "layers": [0]}}}
    parts = assemble(slots, vocab_size=VOCAB)
    assert list(parts.adapter["mole"].layers["0"].experts) == ["whole"]
    parts.llm.lm(padded_batch(2, 12)[0]).logits.sum().backward()
    assert parts.adapter["mole"].layers["0"].experts["whole"].lora_B.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("first", [True, False])
def test_another_hook_on_the_layer_sees_the_tokens_in_order(first):
    wanted = mole_on(tiny_llm()).llm.layers[0].mlp
    llm, x, seen = tiny_llm(), torch.randn(2, 12, 32), {}
    mlp = llm.layers[0].mlp

    def hook(module, args, out):
        seen.update(x=args[0])
        return out + args[0]

    if first:
        mlp.register_forward_hook(hook)
    mole_on(llm)
    if not first:
        mlp.register_forward_hook(hook)
    assert torch.allclose(mlp(x), wanted(x) + x, atol=1e-5) and seen["x"] is x


def test_gpt2_keeps_its_matrices_turned():
    llm = tiny_llm("gpt2")
    mole_on(llm)
    ids = padded_batch(2, 12)[0]
    llm.lm(ids).logits.square().sum().backward()
    with torch.no_grad():
        sorted_way = llm.lm(ids).logits
        mole.FEW, before = 100, mole.FEW
        try:
            assert torch.allclose(llm.lm(ids).logits, sorted_way, atol=1e-5)
        finally:
            mole.FEW = before
