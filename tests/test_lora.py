"""LoRA through PEFT: its equation, its targets, its names, merging."""

import copy
import itertools
import re

import pytest
import torch

import zoo
from tests.conftest import tiny_slots
from tests.fusion_builders import VOCAB, llm_node, padded_batch, same_state, tiny_llm
from tests.train_builders import saved
from zoo import registry
from zoo.checking.checker import check, show
from zoo.checking.plan import Plan
from zoo.registry import ZooError
from zoo.runs import checkpoint


def lora_on(llm, seed=0, attach=True, **options):
    torch.manual_seed(seed)
    adapter = registry.build("adapter", {"name": "lora", "rank": 3, **options}, llm=llm)
    if attach:
        adapter.attach()
    return adapter


def shake(adapter, seed=1):
    """Give its weights values as if it had been trained."""
    g = torch.Generator().manual_seed(seed)
    for weight in adapter.adapter_state_dict().values():  # shares memory with the parameters
        weight.copy_(0.1 * torch.randn(weight.shape, generator=g))


@torch.no_grad()
def test_the_term_is_its_equation():
    llm = tiny_llm()
    weight = llm.layers[0].mlp.up_proj.weight.clone()
    adapter = lora_on(llm, alpha=6.0, targets=["up_proj"])
    shake(adapter)
    assert adapter.targets == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    a = adapter.adapter_state_dict()["model.layers.0.mlp.up_proj.lora_A.lora.weight"]
    b = adapter.adapter_state_dict()["model.layers.0.mlp.up_proj.lora_B.lora.weight"]
    assert (a.shape, b.shape) == ((3, 32), (48, 3))
    x = torch.randn(5, 32)
    assert torch.allclose(llm.layers[0].mlp.up_proj(x), x @ (weight + 2.0 * b @ a).T, atol=1e-6)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_casts_an_input_once_and_the_outputs_stay_those_of_peft(base):
    def run(own):
        llm = tiny_llm()
        llm.lm.requires_grad_(False).to(base)
        adapter = lora_on(llm)
        shake(adapter)
        layers = [llm.lm.get_submodule(name) for name in adapter.targets]
        for layer in [] if own else layers:
            layer.__class__ = type(layer).__mro__[1]
        weights = [w for n, w in llm.lm.named_parameters() if adapter.owns(n)]
        for weight in weights:
            weight.requires_grad_(True)
        kept = {}

        def keep(x):
            kept[x.data_ptr(), x.dtype] = x.nbytes
            return x

        x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0)).to(base)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            out = llm.lm.model(inputs_embeds=x, use_cache=False).last_hidden_state
            out.float().square().mean().backward()
        return out, [w.grad for w in weights], sum(kept.values())

    (ours, grads, less), (peft, others, more) = run(True), run(False)
    assert ours.dtype == peft.dtype and (ours == peft).all() and less < more
    for a, b in zip(grads, others, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.03 * b.norm()
    # Without autocast a term in float32 on a base of 16 bits still gets its input in float32.
    llm = tiny_llm()
    llm.lm.to(torch.bfloat16)
    shake(lora_on(llm))
    assert llm.lm.model(inputs_embeds=torch.randn(1, 3, 32).bfloat16()).last_hidden_state.dtype == torch.bfloat16


@torch.no_grad()
def test_a_layer_has_no_hook_and_does_what_peft_does_with_it():
    """Also in a copy; switched off; with another set of weights; and merged."""
    from peft import LoraConfig, inject_adapter_in_model

    llm = tiny_llm()
    shake(lora_on(llm))
    lm = copy.deepcopy(llm.lm)
    layers = [m for m in lm.modules() if hasattr(m, "lora_A")]
    assert layers and not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)
    mine, x = type(layers[0]), torch.randn(2, 5, 32)

    def both():
        made = []
        for kind in (mine, mine.__mro__[1]):
            for layer in layers:
                layer.__class__ = kind
            made.append(lm.model(inputs_embeds=x, use_cache=False).last_hidden_state)
        assert torch.equal(*made)
        return made[0]

    told = [llm.lm.model(inputs_embeds=x, use_cache=False).last_hidden_state, both()]
    assert torch.equal(*told)
    for change in (
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.enable_adapters(True),
        lambda layer: layer.merge(),
        lambda layer: layer.unmerge(),
    ):
        for layer in layers:
            change(layer)
        told.append(both())
    inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]), lm, "more")
    for layer in layers:
        layer.set_adapter(["lora", "more"] if "more" in layer.lora_A else "lora")
    told.append(both())
    apart = [(a - b).abs().max() > 1e-4 for a, b in itertools.pairwise(told[1:])]
    assert apart == [True, True, False, False, True]


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe"])
def test_all_linear_is_all_but_the_vocabulary(model_type):
    adapter = lora_on(tiny_llm(model_type))
    llm = adapter.lm
    assert adapter.targets and "lm_head" not in " ".join(adapter.targets) and "embed_out" not in adapter.targets
    own = [n for n, _ in llm.named_parameters() if adapter.owns(n)]
    assert sorted(own) == sorted(adapter.adapter_state_dict())
    assert len(own) == 2 * len(adapter.targets)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama4_text", "phimoe"])
def test_routers_derived_from_a_linear_layer_are_none(model_type):
    """They give a tuple, to which no term can be added."""
    llm = tiny_llm(model_type, num_experts=4, top_k=1 if model_type == "llama4_text" else 2)
    ids = torch.arange(5, 14)[None]
    wanted = llm.lm(ids).logits
    adapter = lora_on(llm)
    assert adapter.targets and not any("router" in name for name in adapter.targets)
    assert torch.equal(llm.lm(ids).logits, wanted)


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["*.layers.1.*.[kv]_proj"], ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"]),
        (["model.layers.0.mlp.down_proj"], ["model.layers.0.mlp.down_proj"]),
        (["0.mlp.down_proj", "0.mlp.up_proj"], ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]),
    ],
)
def test_targets(targets, found):
    assert lora_on(tiny_llm(), targets=targets).targets == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_porj"]}, "adapter 'lora' has no target 'q_porj' in LlamaForCausalLM. Did you mean 'q_proj'"),
        ({"targets": ["embed_tokens"]}, "cannot target 'embed_tokens': 'model.embed_tokens' is not a linear layer"),
        ({"targets": ["lm_head"]}, "is the vocabulary projection"),
        ({"targets": []}, "targets is empty"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"rnak": 4}, "'rnak'. Did you mean 'rank'"),
    ],
)
def test_options_that_cannot_be_are_refused_before_weights(options, message):
    with torch.device("meta"), pytest.raises(ZooError, match=message):
        llm = registry.build("llm", llm_node(), vocab_size=VOCAB)
        lora_on(llm, attach=False, **options)


def test_base_checkpoints_load_and_are_written_as_ever():
    llm, other = tiny_llm(), tiny_llm(seed=5)
    base = {k: v.clone() for k, v in llm.lm.state_dict().items()}
    adapter = lora_on(llm)
    state = llm.lm.state_dict()
    assert state.keys() == base.keys() | adapter.adapter_state_dict().keys()
    assert all(torch.equal(state[k], base[k]) for k in base)
    missing = llm.lm.load_state_dict(other.lm.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) == set(adapter.adapter_state_dict())
    adapter.detach()
    assert same_state(llm.lm.state_dict(), other.lm.state_dict())
    adapter.attach()
    llm.lm.load_state_dict(state)  # strict: all of it
    assert same_state(llm.lm.state_dict(), state)


def test_what_trains_in_the_base_is_left_alone():
    llm = tiny_llm()
    llm.layers[0].requires_grad_(False)
    before = {n: p.requires_grad for n, p in llm.lm.named_parameters()}
    adapter = lora_on(llm)
    now = {n.replace(".base_layer", ""): p.requires_grad for n, p in llm.lm.named_parameters()}
    assert {n: now[n] for n in before} == before
    assert all(now[n] for n in now if adapter.owns(n))
    assert not hasattr(llm.lm, "peft_config")


@torch.no_grad()
def test_merging_leaves_a_plain_model_that_says_the_same():
    llm = tiny_llm()
    names = list(llm.lm.state_dict())
    adapter = lora_on(llm)
    shake(adapter)
    ids, mask = padded_batch()
    wanted = llm.lm(input_ids=ids, attention_mask=mask).logits
    assert (wanted - tiny_llm().lm(input_ids=ids, attention_mask=mask).logits).abs().max() > 1e-2
    adapter.merge()
    assert list(llm.lm.state_dict()) == names
    assert torch.allclose(llm.lm(input_ids=ids, attention_mask=mask).logits, wanted, atol=1e-5)
    with pytest.raises(ZooError, match="not attached"):
        adapter.merge()


def test_a_checkpoint_holds_each_weight_once_by_the_name_it_has_without(make_model, tmp_path):
    model, _ = make_model(adapter={"lora": {"name": "lora", "rank": 3}})
    model.detach_only(["lora"])
    base = checkpoint.tensors_of(model)
    model.detach_only([])
    found = checkpoint.tensors_of(model)
    assert {n for n in found if ".lora_" not in n} == {n for n in base if ".lora_" not in n}
    assert all(found[n] is t for n, t in base.items())
    assert {id(t) for t in found.values()} >= {id(p) for p in model.parameters()}
    checkpoint.load_weights(saved(tmp_path, found), found)


def test_what_it_does_not_reach_of_a_mixture_is_said():
    where = r"2 layers hold them in fused tensors \(model.layers.0.mlp.experts.gate_up_proj\)"
    shared = "gate_proj, up_proj here means the shared expert alone"
    for model_type, targets, said in [
        ("llama", ["all-linear"], ""),
        ("mixtral", ["all-linear"], where),
        ("qwen2_moe", ["q_proj"], where),
        ("qwen2_moe", ["gate_proj", "up_proj", "q_proj"], f"{where}.*{shared}"),
        ("qwen3_moe", ["all-linear"], where),
    ]:
        notes = lora_on(tiny_llm(model_type), targets=targets).notes
        assert len(notes) == bool(said) and all(re.search(said, note) for note in notes)
        assert (shared in "".join(notes)) == (shared in said)


def test_the_check_and_loading_say_it(capsys):
    llm = llm_node("qwen2_moe")
    plan = Plan(tiny_slots(llm=llm, adapter={"lora": {"targets": ["up_proj"]}}), vocab_size=VOCAB + 200)
    walk = check(plan)
    assert len(walk.notes) == 1 and "up_proj here means the shared expert alone" in walk.notes[0]
    show(walk)
    assert f"note: {walk.notes[0]}" in " ".join(capsys.readouterr().out.split())
    vision = ["vision=timm", *(f"vision.{k}={v}" for k, v in tiny_slots()["vision"].items() if k != "name")]
    words = [f"llm.{k}={v}" for k, v in llm.items() if k != "name"]
    with pytest.warns(UserWarning, match="reaches no routed expert"):
        zoo.compose(*vision, "projector=mlp", "llm=hf", *words, "adapter=[lora]", texts=["a red circle"])
