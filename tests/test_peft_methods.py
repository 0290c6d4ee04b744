"""adapter=peft: each method gives what plain PEFT gives on the same language model, and comes back from its folders."""

import copy
import json
import threading
from dataclasses import fields

import peft
import pytest
import torch

import zoo
from tests.conftest import ANSWERS, QUESTIONS, sample, tiny_slots
from tests.fusion_builders import PEFT_METHODS, padded_batch, peft_node, tiny_llm
from zoo import registry
from zoo.checking.checker import RefusedError, check
from zoo.checking.plan import Plan
from zoo.composed.model import ZooModel
from zoo.fusion.adapters.peft import methods
from zoo.fusion.adapters.peft.methods import REFUSED, VARIANTS, Method
from zoo.registry import ZooError

IDS, MASK = padded_batch()
RESIDUAL = {"pissa": {"r": 4}, "olora": {"r": 4}}


def adapter_on(llm, method, seed=0, **options):
    torch.manual_seed(seed)
    node = {"name": "peft", **(peft_node(method, **options) if method in PEFT_METHODS else {})}
    node = {**node, "method": method, "options": {**node.get("options", {}), **options}}
    adapter = registry.build("adapter", node, llm=llm)
    adapter.attach()
    return adapter


def move(named, seed=1):
    """Move parameters as training would, in the order of their names."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(named):
            named[name].add_(0.1 * torch.randn(named[name].shape, generator=g))


def own(llm, adapter):
    """The parameters that a stage would train, by PEFT's names."""
    named = dict(llm.lm.named_parameters())
    return {n: p for n, p in named.items() if adapter.owns(n) and not adapter.idles(n)}


def plain(method, seed=0, **options):
    """`get_peft_model` on the same language model."""
    config = Method(method, {**PEFT_METHODS.get(method, {}), **options}).config()
    config.target_modules = config.target_modules or {"q_proj", "v_proj"}
    config.total_step = 10 if method == "adalora" else None
    lm = tiny_llm().lm
    torch.manual_seed(seed)
    return peft.get_peft_model(lm, config, adapter_name="peft").eval()


def answers(net):
    return net(input_ids=IDS, attention_mask=MASK).logits


@pytest.mark.parametrize("method", sorted({*PEFT_METHODS, "olora", *({"mica"} & {*methods.names()})} - {"corda"}))
def test_it_is_plain_peft_with_the_same_seed(method):
    """Outputs and gradients, at the start and moved; the residual ones subtract in another place."""
    llm, options = tiny_llm(), RESIDUAL.get(method, {})
    adapter = adapter_on(llm, method, **options)
    theirs = plain(method, **options)
    bound = 2e-6 if method in RESIDUAL else 0.0
    mine, named = own(llm, adapter), dict(theirs.base_model.model.named_parameters())
    assert mine and mine.keys() == {n for n, p in named.items() if p.requires_grad}
    for _ in range(2):
        assert all(torch.equal(p, named[n]) for n, p in mine.items())
        found = [answers(llm.lm), answers(theirs.base_model.model)]
        assert (found[0] - found[1]).abs().max() <= bound
        for logits in found:
            logits.float().logsumexp(-1).sum().backward()
        for name, p in mine.items():
            assert torch.allclose(p.grad, named[name].grad, atol=bound, rtol=1e-5 if bound else 0), name
            p.grad = named[name].grad = None
        move(mine), move({n: named[n] for n in mine})


def rows(processor, *which):
    samples = [sample((QUESTIONS[i], ANSWERS[i]), images=i % 2, seed=i) for i in which]
    return processor.collate([processor.encode(s) for s in samples])


@pytest.mark.parametrize("method", sorted(PEFT_METHODS))
def test_it_trains_saves_and_comes_back_from_both_folders(make_model, tmp_path, method):
    node = {"name": "peft", **peft_node(method)}
    model, processor = make_model(adapter={"peft": node})
    plain_lm = copy.deepcopy(model.llm.lm)
    model.adapter["peft"].detach()
    base = copy.deepcopy(model.llm.lm)
    model.adapter["peft"].attach()
    del plain_lm
    batch = rows(processor, 0, 1, 2, 3)
    trains = model.train().set_trainable(["adapter"])
    assert trains == {"adapter.peft": sum(p.numel() for p in own(model.llm, model.adapter["peft"]).values())}
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(6):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {model.part_of(n) for n, p in model.named_parameters() if not torch.equal(p, before[n])} == set(trains)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(**batch, all_logits=True).logits
        for again in (ZooModel.from_pretrained(tmp_path), copy.deepcopy(model)):
            assert torch.equal(again(**batch, all_logits=True).logits, wanted)
        lm_wanted = answers(model.llm.lm)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
        assert (answers(theirs) - lm_wanted).abs().max() <= 2e-6
        model.adapter["peft"].merge()
        assert torch.allclose(answers(model.llm.lm), lm_wanted, atol=1e-5)
        assert "peft" not in json.dumps(sorted(model.llm.lm.state_dict()))


def test_initial_values_that_take_long_are_computed_where_they_are_needed(make_model, tmp_path, monkeypatch):
    """A loaded PiSSA reads them; one that is new on a saved model begins at the weights that are loaded."""
    pissa = {"peft": {"name": "peft", **peft_node("pissa")}}
    for name, adapter in (("with", pissa), ("without", {})):
        model, processor = make_model(adapter=adapter)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    options = "{" + ",".join(f"{k}:{v}" for k, v in pissa["peft"]["options"].items()) + "}"
    words = ["adapter=[peft]", "adapter.peft.method=pissa", f"adapter.peft.options={options}"]
    new, _ = zoo.load(f"dir:{tmp_path / 'without'}", *words)
    wanted = zoo.load(f"dir:{tmp_path / 'without'}")[0].llm.lm(input_ids=IDS).logits
    assert all(p.any() for p in own(new.llm, new.adapter["peft"]).values())
    assert torch.allclose(new.llm.lm(input_ids=IDS).logits, wanted, atol=1e-5)

    def called(*_, **__):
        raise AssertionError("decomposed")

    monkeypatch.setattr(torch.linalg, "svd", called)
    again, _ = zoo.load(f"dir:{tmp_path / 'with'}")
    assert all(p.any() for p in own(again.llm, again.adapter["peft"]).values())


def test_a_copy_of_plain_lora_is_detached_by_itself():
    llm = tiny_llm()
    adapter = registry.build("adapter", {"name": "lora", "rank": 2}, llm=llm)
    adapter.attach()
    other, its = copy.deepcopy((llm, adapter))
    its.detach()
    kinds = [type(net.layers[0].self_attn.q_proj).__module__.partition(".")[0] for net in (llm, other)]
    assert kinds == ["peft", "torch"]


@pytest.mark.parametrize("method", sorted(PEFT_METHODS))
def test_a_copy_is_detached_by_itself_and_cast_it_keeps_float32(method):
    llm = tiny_llm()
    adapter = adapter_on(llm, method)
    move(own(llm, adapter))
    wanted = answers(llm.lm)
    other, its = copy.deepcopy((llm, adapter))
    its.detach()
    assert torch.equal(answers(llm.lm), wanted)
    assert torch.equal(answers(other.lm), answers(tiny_llm().lm)) and not torch.equal(answers(other.lm), wanted)
    adapter.start()  # anew, in place
    assert {id(p) for p in own(llm, adapter).values()} == {id(p) for p in own(llm, adapter).values()}


@pytest.mark.parametrize("method", ["pissa", "oft", "trainable_tokens"])
def test_exported_it_is_merged(tmp_path, method):
    from transformers import LlavaForConditionalGeneration

    from tests import published_builders as build

    _, processor = build.llava(tmp_path / "llava")
    options = PEFT_METHODS.get(method) or {"token_indices": [3, 4]}
    written = ",".join(f"{k}:{v}" for k, v in options.items())
    words = [f"adapter.peft.method={method}", f"adapter.peft.options={{{written}}}"]
    model, own_processor = zoo.load(f"dir:{tmp_path / 'llava'}", "adapter=[peft]", *words)
    move(own(model.llm, model.adapter["peft"]))
    texts = [processor.apply_chat_template(build.said(1), add_generation_prompt=True)]
    given = {"images": [build.photo(30, 50)], "text": texts, "return_tensors": "pt"}
    with torch.no_grad():
        wanted = model.eval()(**own_processor(**given)).logits
        zoo.export(model, own_processor, tmp_path / "out", family="llava")
        again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
        assert torch.allclose(again(**processor(**given)).logits[:, -1], wanted[:, -1], atol=1e-4)


def test_threads_share_a_model(make_model):
    model, processor = make_model(adapter={"peft": {"name": "peft", **peft_node("dora")}})
    assert model.adapter["peft"].concurrent
    move(own(model.llm, model.adapter["peft"]))
    batches = [rows(processor, i) for i in range(3)]
    with torch.no_grad():
        wanted = [model(**b).loss for b in batches]
    found = [None] * 3

    def ask(i):
        with torch.no_grad():
            found[i] = model(**batches[i]).loss

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.stack(found), torch.stack(wanted))


@pytest.mark.parametrize("method", ["dora", "oft", "pissa"])
def test_a_teacher_in_8_bits_keeps_the_adapter(make_model, tmp_path, method):
    from zoo.loading.build import load_teacher

    model, processor = make_model(adapter={"peft": {"name": "peft", **peft_node(method)}})
    move(own(model.llm, model.adapter["peft"]))
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    node = {"model": f"dir:{tmp_path}", "options": [], "dtype": None, "device": "cpu", "bits": 8, "attention": "auto"}
    teacher, _ = load_teacher(node, device=torch.device("cpu"), precision="fp32")
    theirs, mine = teacher.adapter["peft"].adapter_state_dict(), model.adapter["peft"].adapter_state_dict()
    assert all(torch.equal(theirs[n], mine[n]) for n in mine)
    batch = rows(processor, 0, 1)
    with torch.no_grad():
        wanted, found = (net(**batch, all_logits=True).logits for net in (model, teacher))
    assert 0 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()


# ---- options ---------------------------------------------------------------------------------------------------------


def test_every_method_of_peft_is_named_or_refused():
    documented = registry.get("adapter", "peft").options[0].doc
    listed = set(documented.partition("One of ")[2].partition(";")[0].replace(" ", "").split(","))
    assert set(methods.names()) <= listed
    assert "mica" not in methods.names() or listed == set(methods.names())  # earlier versions of PEFT have fewer
    for method, why in REFUSED.items():
        with pytest.raises(ZooError, match="does not work here") as refusal:
            Method(method, {})
        assert why in str(refusal.value)


WRONG = {"int": "x", "float": "x", "bool": 3, "list[str] | str | null": 3, "dict | null": [1]}


@pytest.mark.parametrize("method", sorted({*methods.names()} - VARIANTS.keys()))
def test_fields_of_every_config_class_are_checked(method):
    config = Method(method, {"n_frequency": 4} if method == "waveft" else {}).config_class
    for option in methods.options_of(config):
        near = option.name[:-1] + ("x" if option.name[-1] != "x" else "y") + "_"
        with pytest.raises(ZooError, match="No option of PEFT's") as error:
            Method(method, {near: 1})
        assert "Did you mean" in str(error.value) or len(option.name) < 4
        with pytest.raises(ZooError, match=f"Option '{option.name}' of PEFT's"):
            Method(method, {option.name: WRONG.get(option.type, object())})
    for name in ("peft_type", "inference_mode"):
        assert name in {f.name for f in fields(config)}
        with pytest.raises(ZooError, match="is not set by hand"):
            Method(method, {name: "x"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pisa"}, "got 'pisa'. Did you mean 'pissa'"),
        ({"init_lora_weights": "loftq"}, "bits=4"),
        ({"eva_config": {"rh": 1}}, "eva_config named 'rh'. Did you mean 'rho'"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2}}, "rho must be 1"),
        ({"corda_config": {"cache_file": "x.pt"}}, "does not work here"),
        ({"use_dora": True, "init_lora_weights": "olora"}, "use_dora does not go with"),
        ({"bias": "all"}, r"stages.<stage>.train=\[adapter,'llm.\*.bias'\]"),
        ({"modules_to_save": ["lm_head"]}, "name them in the stage"),
        ({"target_modules": r".*\.(q|v)_proj"}, "takes a list of names here"),
        ({"target_modules": ["(a+)+$"]}, "takes last parts of names"),
        ({"rank_pattern": {"(a+)+$": 4}}, "takes last parts of names"),
        ({"layers_to_transform": ["x"]}, "takes list"),
        ({"r": 0}, "r"),
        ({"r": float("inf")}, "takes int"),
        ({"r": float("nan")}, "takes int"),
    ],
    ids=str,
)
def test_options_that_would_go_wrong_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        adapter_on(tiny_llm(), "lora", **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"r": 10**9}),
        ("unilora", {"r": 10**9}),
        ("vblora", {"num_vectors": 10**9, "vector_length": 8}),
        ("vera", {"r": 10**8}),
    ],
)
def test_options_that_would_fill_memory_are_refused_on_the_meta_device(method, options):
    with torch.device("meta"), pytest.raises(ZooError, match=r"widest layer|new numbers"):
        adapter_on(tiny_llm(), method, target_modules=["q_proj"], **options)


def test_names_of_modules_have_to_exist():
    with pytest.raises(ZooError, match=r"target_modules has 'q_porj'.* Did you mean 'q_proj'"):
        adapter_on(tiny_llm(), "lora", target_modules=["v_proj", "q_porj"])
    with pytest.raises(ZooError, match=r"rank_pattern has 'upp_proj'.* Did you mean 'up_proj'"):
        adapter_on(tiny_llm(), "lora", rank_pattern={"upp_proj": 4})
    with pytest.raises(ZooError, match=r"target_parameters\) named 'gate_proj'. .*Did you mean|named 'gate_proj'"):
        adapter_on(tiny_llm("mixtral"), "lora", target_parameters=["gate_proj"], target_modules=[])
    adapter = adapter_on(
        tiny_llm(), "lora", target_modules=["*.layers.1.*.q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 3}
    )
    assert adapter.exclusive == ["model.layers.1.self_attn.q_proj"]
    assert adapter.adapter_state_dict()["model.layers.1.self_attn.q_proj.lora_A.peft.weight"].shape[0] == 3


def test_without_targets_it_takes_those_of_peft_or_all_linear_layers():
    assert {n.rpartition(".")[2] for n in adapter_on(tiny_llm("llama"), "lora").exclusive} == {"q_proj", "v_proj"}
    assert len(adapter_on(tiny_llm("smollm3"), "lora").exclusive) == 14
    with pytest.raises(ZooError, match=r"LNTuningConfig has no target_modules for the family 'smollm3'"):
        adapter_on(tiny_llm("smollm3"), "ln_tuning", target_modules=None)


# ---- beside others ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["peft", "lora"], ["lora", "peft"], ["peft", "mole"], ["mole", "peft"]])
def test_it_acts_beside_other_adapters(make_model, tmp_path, names):
    nodes = {"lora": {"name": "lora", "rank": 2, "targets": ["k_proj", "o_proj"]}, "mole": {"name": "mole", "rank": 2}}
    nodes["peft"] = {"name": "peft", **peft_node("dora")}
    model, processor = make_model(adapter={name: nodes[name] for name in names})
    trains = model.train().set_trainable(["adapter"])
    assert set(trains) == {f"adapter.{name}" for name in names}
    batch = rows(processor, 0, 1)
    for _ in range(2):  # what starts at zero hides the gradient of its other factor
        model(**batch).loss.backward()
        for p in model.parameters():
            if p.requires_grad and p.grad is not None:
                p.data.sub_(0.1 * p.grad)
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(**batch, all_logits=True).logits
        assert torch.equal(ZooModel.from_pretrained(tmp_path)(**batch, all_logits=True).logits, wanted)


@pytest.mark.fixes
def test_on_the_same_layers_it_is_refused_and_the_fix_keeps_its_options():
    nodes = {"peft": {"name": "peft", "method": "lora", "options": {"r": 2, "target_modules": "all-linear"}}}
    with pytest.raises(RefusedError, match=r"both take \d+ modules of the LLM") as refusal:
        check(Plan(tiny_slots(adapter={**nodes, "mole": {"name": "mole", "rank": 2}}), vocab_size=360))
    assert "adapter.peft.options.target_modules=[q_proj,k_proj,v_proj,o_proj]" in refusal.value.fixes


def test_get_peft_model_on_top_would_switch_it_off(make_model):
    model, processor = make_model(adapter={"peft": {"name": "peft", **peft_node("dora")}})
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ZooError, match=r"switches the model's own adapter 'peft' off"):
        wrapped(**rows(processor, 0))


def test_experts_by_target_parameters(make_model, tmp_path):
    experts = {**tiny_slots()["llm"], "model_type": "mixtral", "num_experts": 4, "top_k": 2}
    options = {"r": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model, processor = make_model(llm=experts, adapter={"peft": {"name": "peft", "options": options}})
    names = set(model.llm.lm.state_dict())
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    model.adapter["peft"].detach()
    base = copy.deepcopy(model.llm.lm)
    model.adapter["peft"].attach()
    mine = own(model.llm, model.adapter["peft"])
    assert len(mine) == 4 * len(model.llm.layers)
    move(mine)
    batch = rows(processor, 0, 1)
    model.train().set_trainable(["adapter"])
    model(**batch).loss.backward()
    assert [n for n, p in mine.items() if p.grad is None] == []
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(**batch, all_logits=True).logits
        assert torch.equal(ZooModel.from_pretrained(tmp_path)(**batch, all_logits=True).logits, wanted)
        wanted = answers(model.llm.lm)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
        assert (answers(theirs) - wanted).abs().max() <= 2e-6
        model.adapter["peft"].merge()
        assert torch.allclose(answers(model.llm.lm), wanted, atol=1e-5)


def test_on_a_16_bit_model_new_weights_stay_float32(make_model):
    model, processor = make_model(adapter={"peft": {"name": "peft", **peft_node("vera")}})
    move(own(model.llm, model.adapter["peft"]))
    model = model.to(torch.bfloat16)
    assert {t.dtype for t in model.adapter["peft"].adapter_state_dict().values()} == {torch.float32}
    assert model.eval()(**rows(processor, 0)).loss.isfinite()


# Options of a size for tiny models, of methods that PEFT_METHODS does not have.
SMALL = {
    "c3a": {"block_size": 8},
    "miss": {"r": 4},
    "psoft": {"r": 4},
    "road": {"group_size": 4},
    "shira": {"r": 2},
    "trainable_tokens": {"token_indices": [1, 2], "target_modules": None},
    "vblora": {"vector_length": 8, "num_vectors": 16},
    "waveft": {"n_frequency": 16},
}


def whole(method):
    """The options of any method, on two layers."""
    options = PEFT_METHODS.get(method) or {"target_modules": ["q_proj", "v_proj"], **SMALL.get(method, {})}
    return {k: v for k, v in options.items() if v is not None}


def state(lm):
    """What modules hold beside tensors, each value or its identity, one level into dicts."""

    def seen(value):
        return repr(value) if isinstance(value, (bool, int, float, str, tuple)) else id(value)

    kept = {}
    for name, module in lm.named_modules():
        for key in vars(module).keys() - {"_parameters", "_buffers", "_modules"}:
            value = vars(module)[key]
            kept[name, key] = {k: seen(v) for k, v in value.items()} if isinstance(value, dict) else seen(value)
    return kept


@pytest.mark.parametrize("method", methods.names())
def test_a_pass_leaves_nothing_on_modules_and_all_methods_come_back(method):
    """Threads may share what keeps no state; base weights stay, detached it is gone, its state dict is all of it."""
    llm = tiny_llm()
    base = {n: t.clone() for n, t in llm.lm.state_dict().items()}
    wanted = answers(llm.lm).detach()
    adapter = adapter_on(llm, method, **whole(method))
    mine = own(llm, adapter)
    assert mine
    move(mine)
    moved = answers(llm.lm).detach()
    for train in (True, False):
        llm.lm.train(train)
        before = state(llm.lm)
        answers(llm.lm).sum().backward()
        assert state(llm.lm) == before or not adapter.concurrent
    assert [n for n, p in mine.items() if p.grad is None] == []
    assert all(torch.equal(t, base[n]) for n, t in llm.lm.state_dict().items() if n in base)
    other = tiny_llm()
    again = adapter_on(other, method, seed=5, **whole(method))
    other.lm.load_state_dict(llm.lm.state_dict())
    again.load_state_dict(adapter.state_dict())
    assert torch.equal(answers(other.lm), moved)
    adapter.detach()
    assert torch.equal(answers(llm.lm), wanted)


@pytest.mark.parametrize("method", ["lora", *RESIDUAL])
def test_merged_into_weights_of_16_bits_it_is_rounded_once(method):
    """The terms of PiSSA and OLoRA are as large as the weights, and what was learnt is the difference of two."""
    llm = tiny_llm()
    llm.lm.to(torch.bfloat16)
    adapter = adapter_on(llm, method, **RESIDUAL.get(method, {"r": 4}), target_modules=["q_proj", "down_proj"])
    with torch.no_grad():
        for name, tensor in own(llm, adapter).items():
            tensor.add_(1e-3 if "lora_A" in name else 2e-3)
    beginnings, exact = dict(adapter._beginnings()), {}
    for path, layer in adapter.places.layers.items():
        exact[path] = layer.base_layer.weight.float() + layer.get_delta_weight("peft").float()
        exact[path] -= beginnings[path].weight() if beginnings else 0.0
    adapter.merge()
    for path, wanted in exact.items():
        merged = llm.lm.get_submodule(path).weight
        assert merged.dtype == torch.bfloat16
        error, least = ((w.float() - wanted).norm() for w in (merged, wanted.to(torch.bfloat16)))
        assert error <= 1.02 * least, path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_term_on_one_of_two_tied_layers_is_not_merged_into_both(tied, target):
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "tie_embeddings": tied}
    llm = registry.build("llm", {"name": "hf", **sizes}, vocab_size=50).eval()
    adapter = adapter_on(llm, "lora", r=2, target_modules=["q_proj", target])
    move(own(llm, adapter))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        wanted = llm.lm(input_ids=ids).logits
        if tied:
            with pytest.raises(ZooError, match=rf"a term on '[\w.]*{target}', whose matrix is that of '[\w.]+' too"):
                adapter.merge()
        else:
            adapter.merge()
        torch.testing.assert_close(llm.lm(input_ids=ids).logits, wanted, atol=1e-5, rtol=0)
    assert adapter.merged is not tied


def test_layers_that_another_adapter_bypasses_are_no_targets():
    llm = tiny_llm("llama")
    registry.build("adapter", {"name": "upcycle", "every": 2}, llm=llm).attach()
    adapter = adapter_on(llm, "lora", target_modules=["gate_proj"])
    assert adapter.exclusive == ["model.layers.1.mlp.gate_proj"]
    llm = tiny_llm("llama")
    registry.build("adapter", {"name": "upcycle", "every": 1}, llm=llm).attach()
    with pytest.raises(
        ZooError, match="'gate_proj', which LlamaForCausalLM has only where another adapter bypasses it"
    ):
        adapter_on(llm, "lora", target_modules=["gate_proj"])
    with pytest.raises(ZooError, match=r"'model.layers.0.mlp.gate_proj' is bypassed by another adapter"):
        registry.build("adapter", {"name": "lora", "targets": ["gate_proj"]}, llm=llm)


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_merged_it_is_not_attached_again(method):
    llm = tiny_llm()
    adapter = adapter_on(llm, method)
    move(own(llm, adapter))
    adapter.merge()
    wanted = answers(llm.lm)
    adapter.attach()
    assert torch.equal(answers(llm.lm), wanted)
    assert not any(type(m).__module__.startswith("peft") or m._forward_hooks for m in llm.lm.modules())


def test_a_table_with_rows_of_its_own_is_named_as_in_checkpoints(make_model):
    options = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}
    model, _ = make_model(adapter={"peft": {"name": "peft", "options": options}})
    model.set_trainable(["llm", "adapter"], freeze=["llm.lm.model.embed_tokens.weight"])
    assert [n for n, p in model.named_parameters() if "embed_tokens" in n and p.requires_grad] == [
        "llm.lm.model.embed_tokens.token_adapter.trainable_tokens_delta.peft"
    ]
