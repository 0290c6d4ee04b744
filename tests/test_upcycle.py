"""Upcycling: parity with the dense model, routing, balance, capacity; the rest is in the adapters' battery."""

import copy

import pytest
import torch

from tests.fusion_builders import DENSE, VOCAB, llm_node, padded_batch, tiny_llm
from zoo import registry
from zoo.fusion.adapters.routing_trace import Passes
from zoo.fusion.adapters.upcycle import SparseFeedForward, UpcycleConfig, balance_of, capacity
from zoo.registry import ZooError
from zoo.registry.forward_pass import running

WIDTH, WIDER, TOKENS = 8, 12, 23


def upcycled(llm, seed=0, **options):
    torch.manual_seed(seed)
    adapter = registry.build("adapter", {"name": "upcycle", **options}, llm=llm)
    adapter.attach()
    return adapter


class Gated(torch.nn.Module):
    """A feed-forward layer with biases, float64."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(WIDTH, WIDER, dtype=torch.float64) for _ in range(2))
        self.down = torch.nn.Linear(WIDER, WIDTH, dtype=torch.float64)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def sparse(seed=0, shaken=True, **options):
    torch.manual_seed(seed)
    layer = SparseFeedForward(
        0, Gated(), WIDTH, UpcycleConfig(**options), Passes(None, lambda: False, "upcycle")
    ).double()
    if shaken:
        with torch.no_grad():
            for p in layer.experts.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return layer.train()


def noted(layer, x, keep=None):
    """What the layer gives, and the balance of a pass in which the tokens of `keep` are no padding."""
    with running() as now:
        now.records["upcycle"], now.valid = [], [] if keep is None else [(0, keep.flatten())]
        out = layer(x)
    return out, balance_of(*now.records["upcycle"][-1])


def naive(layer, x, experts):
    """The equations token by token, in float64: output and balance."""
    rows, first, probs = [], [], []
    for token in x.reshape(-1, WIDTH):
        p = torch.softmax(layer.router.weight @ token, -1)
        chosen = sorted(range(len(p)), key=lambda e, p=p: -p[e].item())[: layer.top_k]
        total = sum(p[e] for e in chosen) if layer.normalize else 1.0
        rows.append(sum(p[e] / total * experts[e](token) for e in chosen))
        first.append(chosen[0])
        probs.append(p)
    e = layer.num_experts
    share = [sum(c == i for c in first) / len(first) for i in range(e)]
    balance = e * sum(share[i] * sum(p[i] for p in probs) / len(probs) for i in range(e))
    return torch.stack(rows).view_as(x), balance


def apart(layer):
    """The stacked experts as modules of their own that hold views of the same weights."""
    found = []
    for i in range(layer.num_experts):
        module = Gated()
        for name in ("gate", "up", "down"):
            linear, stack = getattr(module, name), getattr(layer.experts, name)
            del linear.weight, linear.bias
            linear.weight, linear.bias = stack.weight[i], stack.bias[i]
        found.append(module)
    return found


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 1, "normalize": False}, {"top_k": 3}, {"top_k": 2, "normalize": False}]
)
def test_is_its_equations_in_values_and_gradients(options):
    grads = []
    for way in ("ours", "naive"):
        layer = sparse(**options)
        x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
        out, balance = noted(layer, x) if way == "ours" else naive(layer, x, apart(layer))
        (out.square().sum() + 0.7 * balance).backward()
        grads.append([out, balance, x.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)  # shares of tokens are counted in float32


@torch.no_grad()
@pytest.mark.parametrize("model_type", [f for f in DENSE if f != "opt"])
def test_a_fresh_one_is_the_dense_model_in_all_families_whatever_the_router(model_type):
    llm = tiny_llm(model_type, extra={"resid_pdrop": 0.0} if model_type == "gpt2" else {})
    ids, mask = padded_batch(t=30)
    wanted = llm.lm(input_ids=ids, attention_mask=mask).logits
    for num_experts, top_k in ((4, 2), (1, 1), (2, 1)):
        adapter = upcycled(llm, num_experts=num_experts, top_k=top_k, every=1)
        for layer in adapter.layers.values():
            layer.router.weight.mul_(30)
        for train in (True, False):
            adapter.train(train)
            got = llm.lm(input_ids=ids, attention_mask=mask).logits
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        adapter.detach()
    assert torch.equal(llm.lm(input_ids=ids, attention_mask=mask).logits, wanted)


@torch.no_grad()
def test_one_expert_without_normalised_weights_is_not_the_dense_model():
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    layer = sparse(shaken=False, top_k=1, normalize=False)
    dense = apart(layer)[0](x)
    likeliest = layer.router(x).softmax(-1).amax(-1, keepdim=True)
    torch.testing.assert_close(layer(x), dense * likeliest)
    assert (layer(x) - dense).abs().max() > 0.1


@torch.no_grad()
def test_two_weights_of_a_token_sum_to_one():
    layer = sparse()
    weights, chosen = layer.route(layer.router(torch.randn(50, WIDTH, dtype=torch.float64)).softmax(-1))
    assert weights.shape == chosen.shape == (50, 2) and (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(50, dtype=torch.float64))
    assert (chosen[:, 0] != chosen[:, 1]).all()


def test_the_balance_is_one_for_even_routing_and_the_number_of_experts_at_collapse():
    for logits, wanted in ((20.0 * torch.eye(4).repeat(6, 1), 1.0), (torch.tensor([[50.0, 0, 0, 0]] * 24), 4.0)):
        assert balance_of(logits.softmax(-1), logits.topk(2).indices, None).item() == pytest.approx(wanted, abs=1e-5)
    logits = (torch.randn(64, 4) + torch.tensor([1.0, 0, 0, 0])).requires_grad_()
    balance_of(logits.softmax(-1), logits.topk(2).indices, None).backward()
    assert logits.grad.mean(0)[0] > 0 > logits.grad.mean(0)[1:].sum()  # descent takes from the expert used most


def test_padding_does_not_count_in_the_balance():
    layer, x = sparse(), torch.randn(2, 10, WIDTH, dtype=torch.float64)
    keep = torch.ones(2, 10, dtype=torch.bool)
    keep[1, 6:] = False
    _, wanted = noted(layer, torch.cat([x[0], x[1, :6]]))
    torch.testing.assert_close(noted(layer, x, keep)[1], wanted)


@torch.no_grad()
def test_capacity_drops_second_choices_and_late_tokens_first():
    layer = sparse(shaken=False, capacity=1.0)
    x = torch.randn(16, WIDTH, dtype=torch.float64)
    dense = apart(layer)[0](x)
    probs = torch.tensor([[0.6, 0.3, 0.06, 0.04]], dtype=torch.float64).expand(16, 4)
    weights, chosen = layer._drop(*layer.route(probs))  # room for 8 tokens in each expert
    assert chosen[:8].tolist() == [[0, 1]] * 8 and (chosen[8:] == -1).all()
    assert (weights[:8].sum(-1) - 1).abs().max() < 1e-9 and (weights[8:] == 0).all()
    layer.router.weight.zero_()
    layer.router.weight[0] += 100 * x.sign().mean(0)
    assert ((layer(x) - dense).abs().amax(-1) < 1e-9).logical_or(layer(x).abs().amax(-1) == 0).all()
    roomy = sparse(shaken=False, capacity=2.0)  # k * S / E * 2 = S: nothing is dropped
    torch.testing.assert_close(roomy(x), dense, rtol=0, atol=1e-9)


def dropped(probs, limit):
    """First choices in the order of the tokens, then second ones, each while its expert has room: a loop."""
    left = dict.fromkeys(range(probs.shape[1]), limit)
    order = [row.argsort(descending=True).tolist() for row in probs]
    kept = set()
    for choice in range(2):
        for token, experts in enumerate(order):
            if left[experts[choice]]:
                left[experts[choice]] -= 1
                kept.add((token, experts[choice]))
    return kept


@torch.no_grad()
def test_capacity_is_that_of_deepspeed():
    """Its formula, scripted as there: all of the product is rounded up, and by a float32 factor."""

    def theirs(tokens, experts, factor, k):
        return int(torch.ceil((tokens / experts) * torch.tensor(factor * k)).to(torch.int64))

    settings = [
        (s, e, f, k)
        for s in (1, 2, 3, 5, 7, 10, 13, 100, 333, 2048)
        for e in (2, 3, 4, 8)
        for f in (0.25, 0.5, 0.75, 1.0, 1.1, 1.25, 1.3, 1.5, 2.0)
        for k in (1, 2)
    ]
    assert [capacity(*x) for x in settings] == [theirs(*x) for x in settings]
    rounded_down_first = [max(1, -(-int(s * k * f) // e)) for s, e, f, k in settings]
    assert rounded_down_first != [capacity(*x) for x in settings], "the settings tell the two apart"
    generator = torch.Generator().manual_seed(0)
    for tokens, factor in ((3, 0.75), (7, 0.5), (13, 0.6), (32, 1.1)):
        layer = sparse(shaken=False, capacity=factor)
        probs = torch.rand(tokens, 4, generator=generator, dtype=torch.float64).softmax(-1)
        _, chosen = layer._drop(*layer.route(probs))
        kept = {(t, e) for t, row in enumerate(chosen.tolist()) for e in row if e >= 0}
        assert kept == dropped(probs, theirs(tokens, 4, factor, 2))


@torch.no_grad()
def test_evaluation_has_a_capacity_of_its_own():
    x = torch.randn(16, WIDTH, dtype=torch.float64)
    seen = {}
    for name, options in (
        ("none", {}),
        ("both", {"capacity": 0.5}),
        ("open", {"capacity": 0.5, "eval_capacity": 0.0}),
        ("eval", {"eval_capacity": 0.5}),
    ):
        layer = sparse(**options)
        seen[name] = {mode: layer.train(mode)(x) for mode in (True, False)}
    assert not torch.equal(seen["both"][True], seen["none"][True])
    assert torch.equal(seen["both"][True], seen["both"][False])
    assert torch.equal(seen["open"][True], seen["both"][True]) and torch.equal(seen["open"][False], seen["none"][False])
    assert torch.equal(seen["eval"][True], seen["none"][True]) and torch.equal(seen["eval"][False], seen["both"][False])


def test_experts_without_tokens_get_zero_gradients():
    layer = sparse(top_k=1)
    with torch.no_grad():
        layer.router.weight.zero_()
    layer(torch.randn(TOKENS, WIDTH, dtype=torch.float64)).sum().backward()
    grad = layer.experts.gate.weight.grad
    assert grad.shape == (4, WIDER, WIDTH) and [bool(g.any()) for g in grad].count(True) == 1


def test_a_batch_and_its_order_change_nothing():
    layer, x = sparse(), torch.randn(3, 7, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[1], layer(x[1:2])[0])
    torch.testing.assert_close(layer(x.flip(1)), layer(x).flip(1))


def test_which_layers():
    assert list(upcycled(tiny_llm(num_layers=5)).layers) == ["0", "2", "4"]
    assert list(upcycled(tiny_llm(), every=1).layers) == ["0", "1"]
    assert list(upcycled(tiny_llm(num_layers=5), layers=[3, 1]).layers) == ["1", "3"]


@pytest.mark.parametrize(
    ("sizes", "dense", "total", "active"),
    [
        ((1024, 24, 16, 0, 2816), 0.464, 0.775, 0.568),  # Qwen1.5-0.5B
        ((896, 24, 14, 2, 4864), 0.494, 0.965, 0.651),  # Qwen2-0.5B
    ],
)
def test_parameters_are_those_of_the_paper(sizes, dense, total, active):
    width, layers, heads, kv, inner = sizes
    node = {"hidden_size": width, "num_layers": layers, "num_heads": heads, "num_kv_heads": kv}
    node |= {"intermediate_size": inner, "tie_embeddings": True}
    with torch.device("meta"):
        llm = registry.build("llm", {"name": "hf", "model_type": "qwen2", **node}, vocab_size=151936)
        adapter = registry.build("adapter", {"name": "upcycle"}, llm=llm)
        adapter.attach()
    base = {n: p.numel() for n, p in llm.lm.named_parameters()}
    idle = sum(count for n, count in base.items() if adapter.idles(n))
    experts = sum(p.numel() for n, p in adapter.named_parameters() if ".experts." in n)
    routers = sum(p.numel() for n, p in adapter.named_parameters() if ".router." in n)
    rest = sum(base.values()) - idle + routers
    assert sum(base.values()) / 1e9 == pytest.approx(dense, abs=6e-4)
    assert (rest + experts) / 1e9 == pytest.approx(total, abs=6e-4)
    assert (rest + experts / 2) / 1e9 == pytest.approx(active, abs=6e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 2, "top_k": 3}, "top_k must be from 1 to num_experts=2, got 3"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"layers": [7]}, "layers must be from 0 to 1 in this LLM, got 7"),
        ({"layers": [1, 1]}, "names a layer twice"),
        ({"balance": -1.0}, "balance must not be negative"),
        ({"eval_capacity": -1.0}, "eval_capacity must not be negative"),
        ({"expert": 4}, "'expert'. Did you mean 'num_experts'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with torch.device("meta"), pytest.raises(ZooError, match=message):
        upcycled(registry.build("llm", llm_node(), vocab_size=VOCAB), **options)


def test_layers_that_it_cannot_copy_are_refused():
    with pytest.raises(ZooError, match="finds no feed-forward module in layer 0 of OPTForCausalLM"):
        upcycled(tiny_llm("opt"))
    with pytest.raises(ZooError, match="made of plain linear layers; 'mlp' in layer 0 of MixtralForCausalLM"):
        upcycled(tiny_llm("mixtral"))
    with pytest.raises(ZooError, match=r"adapter=\[upcycle,lora\]"):
        llm = tiny_llm()
        registry.build("adapter", {"name": "lora"}, llm=llm).attach()
        upcycled(llm)


@torch.no_grad()
def test_lora_behind_it_leaves_idle_layers_alone():
    llm = tiny_llm()
    upcycled(llm)
    lora = registry.build("adapter", {"name": "lora"}, llm=llm)
    lora.attach()
    assert not any(t.startswith("model.layers.0.mlp") for t in lora.targets)
    assert any(t.startswith("model.layers.1.mlp") for t in lora.targets)


def test_starting_again_copies_what_the_dense_layer_is_now():
    llm = tiny_llm()
    adapter = upcycled(llm)
    with torch.no_grad():
        llm.layers[0].mlp.up_proj.weight.normal_()
        ids, mask = padded_batch()
        adapter.detach()
        wanted = llm.lm(input_ids=ids, attention_mask=mask).logits
        adapter.attach()
        assert not torch.allclose(llm.lm(input_ids=ids, attention_mask=mask).logits, wanted, atol=1e-3)
        adapter.start()
        torch.testing.assert_close(llm.lm(input_ids=ids, attention_mask=mask).logits, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_copy_of_the_model_has_experts_of_its_own(make_model):
    model, _ = make_model(adapter={"upcycle": {"name": "upcycle"}})
    ids = torch.randint(5, 300, (2, 9))
    twin = copy.deepcopy(model)
    wanted = model(ids).logits
    twin.adapter["upcycle"].layers["0"].experts.up_proj.weight.zero_()
    assert torch.equal(model(ids).logits, wanted) and not torch.allclose(twin(ids).logits, wanted)


def test_balance_enters_the_loss_once_and_idle_layers_do_not_train(make_model):
    model, _ = make_model(adapter={"upcycle": {"name": "upcycle"}})
    trained = model.set_trainable(["llm", "adapter"])
    first = model.llm.layers[0].mlp
    assert not any(p.requires_grad for p in first.parameters())
    assert trained["llm"] == sum(p.numel() for p in model.llm.parameters()) - sum(p.numel() for p in first.parameters())
    model.train()
    ids = torch.randint(5, 300, (2, 9))
    out = model(ids, attention_mask=torch.ones_like(ids), labels=ids)
    balance = sum(balance_of(*record) for record in out.passed.records["upcycle"])
    torch.testing.assert_close(out.losses["upcycle_balance"], 0.01 * balance)
    torch.testing.assert_close(out.loss, out.losses["answer"] + 0.01 * balance)
    model.eval()
    assert list(model(ids, labels=ids).losses) == ["answer"]


def test_an_upcycled_model_starts_from_the_weights_of_a_trained_one(make_model, tmp_path):
    import zoo

    dense, processor = make_model(seed=4)
    dense.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, _ = zoo.load(f"dir:{tmp_path}", "adapter=upcycle", device="cpu")
    ids = torch.randint(5, 300, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=1e-5)
        for p in model.adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "sparse")
    processor.save_pretrained(tmp_path / "sparse")
    again, _ = zoo.load(f"dir:{tmp_path}/sparse", device="cpu", attention="sdpa")
    with torch.no_grad():
        model.set_attention("sdpa")
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_starting_again_copies_no_other_adapter(monkeypatch):
    """Hooks of one that came later hold it, and it holds the language model."""
    llm = tiny_llm("llama")
    adapter = upcycled(llm, every=1)
    registry.build("adapter", {"name": "mole", "rank": 2}, llm=llm).attach()
    copied = []
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(self))
    adapter.start()
    assert not copied
