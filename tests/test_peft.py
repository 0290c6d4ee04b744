"""PEFT's own `get_peft_model` on a composed model gives what it gives on transformers' LLaVA class."""

import copy

import peft
import pytest
import torch

import zoo
from tests import published_builders as build
from tests.published_builders import CASES, said
from zoo.registry import ZooError

NAMES = (("model.language_model.", "llm.lm.model."), ("model.vision_tower.", "vision.tower."))
ATTENTION = ["q_proj", "v_proj"]  # of the LLM and of the encoder
METHODS = {
    "lora": lambda **k: peft.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False, **k),
    "lora of some": lambda **k: peft.LoraConfig(
        r=2, target_modules=r".*(language_model|llm).*\.(up|down)_proj", init_lora_weights=False, **k
    ),
    "dora": lambda **k: peft.LoraConfig(r=2, target_modules=ATTENTION, use_dora=True, init_lora_weights=False, **k),
    "head": lambda **k: peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, **k),
    "embedding": lambda **k: peft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False, **k),
    "trained whole": lambda **k: peft.LoraConfig(
        r=2, target_modules=ATTENTION, modules_to_save=["lm_head"], init_lora_weights=False, **k
    ),
    "ia3": lambda **k: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False, **k
    ),
    "loha": lambda **k: peft.LoHaConfig(r=2, target_modules=ATTENTION, init_weights=False, **k),
    "oft": lambda **k: peft.OFTConfig(target_modules=ATTENTION, oft_block_size=4, init_weights=False, **k),
    "norms": lambda **k: peft.LNTuningConfig(target_modules=["input_layernorm"], **k),
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """The folder, the model and the inputs of transformers, and our model."""
    folder = tmp_path_factory.mktemp("peft") / "llava"
    reference, processor = build.llava(folder)
    texts = [processor.apply_chat_template(said(n, q), add_generation_prompt=True) for n, q in CASES["unlike samples"]]
    images = [build.photo(30 + 9 * i, 50, seed=i) for i in range(3)]
    batch = dict(processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt"))
    return folder, reference, zoo.load(f"dir:{folder}")[0], batch


def renamed(name):
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    return name.replace("base_model.model.lm_head", "base_model.model.llm.lm.lm_head")


def both(llava, method, **options):
    """The same adapter, with the same weights, on the model of transformers and on ours."""
    _, reference, model, _ = llava
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(reference), METHODS[method](**options)).eval()
    ours = peft.get_peft_model(copy.deepcopy(model), METHODS[method](**options)).eval()
    given = {renamed(name): p for name, p in theirs.named_parameters()}
    copied = 0
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.requires_grad:
                copied += 1
                p.copy_(given[name])
    assert copied
    return theirs, ours


@pytest.mark.parametrize("task", ["CAUSAL_LM", "FEATURE_EXTRACTION", None])
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_computes_and_learns_what_it_does_on_transformers_class(llava, method, task):
    theirs, ours = both(llava, method, **{"task_type": task} if task else {})
    batch = llava[3]
    mask = batch["attention_mask"].bool()
    a, b = ours(**batch), theirs(**batch)
    torch.testing.assert_close(a.logits[mask], b.logits[mask], atol=2e-5, rtol=1e-5)
    with ours.disable_adapter():
        torch.testing.assert_close(ours(**batch).logits, llava[2](**batch).logits, atol=0, rtol=0)
    if task == "FEATURE_EXTRACTION":
        return  # PEFT's class for it takes no labels by name
    labels = batch["input_ids"].masked_fill(~mask, -100)
    for net in (ours, theirs):
        net(**batch, labels=labels).loss.backward()
    given = {renamed(name): p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, given[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora", "trained whole", "oft"])
def test_it_generates_merges_saves_and_loads(llava, method, tmp_path):
    theirs, ours = both(llava, method, task_type="CAUSAL_LM")
    folder, _, _, batch = llava
    options = {"max_new_tokens": 8, "do_sample": False}
    ids = theirs.generate(**batch, **options)
    assert torch.equal(ours.generate(**batch, **options), ids)
    ours.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(zoo.load(f"dir:{folder}")[0], tmp_path / "adapter").eval()
    logits = ours(**batch).logits
    torch.testing.assert_close(again(**batch).logits, logits, atol=0, rtol=0)
    merged = ours.merge_and_unload()
    assert isinstance(merged, zoo.ZooModel)
    torch.testing.assert_close(merged(**batch).logits, logits, atol=2e-5, rtol=1e-5)
    assert torch.equal(merged.generate(**batch, **options), ids)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_under_frozen_weights_as_transformers_class(llava, checkpointing):
    """With reentrant checkpointing gradients reach an adapter only through inputs that require them."""
    theirs, ours = both(llava, "lora of some", task_type="CAUSAL_LM")
    batch = llava[3]
    losses = []
    for net in (theirs, ours):
        net.train()
        if checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": True})
            net.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        some = []
        for _ in range(3):
            loss = net(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            some.append(loss.item())
        losses.append(some)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[0][2] < losses[0][0]


@pytest.mark.parametrize("words", [["pruner=[pool]"], ["pruner=[fastv]"], ["adapter=[mole]"]], ids=str)
def test_a_new_adapter_beside_our_parts_changes_nothing(llava, words):
    from transformers import AutoProcessor

    folder, _, _, _ = llava
    model, processor = zoo.load(f"dir:{folder}", *words)
    text = AutoProcessor.from_pretrained(folder).apply_chat_template(said(1), add_generation_prompt=True)
    batch = processor(images=[build.photo(40, 60)], text=[text])
    wanted = model.eval()(**batch).logits
    config = peft.LoraConfig(r=2, target_modules=ATTENTION, task_type="CAUSAL_LM")
    assert torch.equal(peft.get_peft_model(model, config).eval()(**batch).logits, wanted)


def test_a_wrapped_model_is_not_saved_into_a_folder_that_cannot_be_loaded(llava, tmp_path):
    folder, _, _, batch = llava
    for words in (["adapter=[lora]"], ["adapter=[mole]"]):
        model, _ = zoo.load(f"dir:{folder}", *words)
        model.save_pretrained(tmp_path / "own")  # layers that our adapters wrap have their names
        again = zoo.ZooModel.from_pretrained(tmp_path / "own")
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    model, _ = zoo.load(f"dir:{folder}")
    model.vision.base_layer = torch.nn.Sequential(torch.nn.Linear(2, 2))  # a name that timm's DLA has, too
    model.save_pretrained(tmp_path / "own")
    del model.vision.base_layer
    for more in ({}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):
        config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | more)
        wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
        with pytest.raises(ZooError, match=r"inside a layer of PEFT.*merge_and_unload"):
            wrapped.get_base_model().save_pretrained(tmp_path / "none")
        assert not (tmp_path / "none").exists()
    wanted = wrapped(**batch).logits
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = zoo.ZooModel.from_pretrained(tmp_path / "merged")(**batch).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_what_would_go_wrong_in_silence_is_refused(llava):
    folder, _, model, batch = llava
    own, _ = zoo.load(f"dir:{folder}", "adapter=[lora]", "adapter.lora.rank=2")
    config = peft.LoraConfig(r=2, target_modules=ATTENTION, task_type="CAUSAL_LM")
    merged = copy.deepcopy(own)
    both_lora = peft.get_peft_model(own, config)
    for call in (lambda: both_lora(**batch), lambda: both_lora.generate(**batch, max_new_tokens=1)):
        with pytest.raises(ZooError, match=r"'default'.* switches the model's own adapter 'lora' off"):
            call()
    merged.adapter["lora"].merge()
    peft.get_peft_model(merged, config)(**batch)
    sizes = {"num_layers": 3, "token_dim": 48, "num_attention_heads": 4, "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match="num_layers"):  # PEFT's own: it reads sizes from configs that it knows
        peft.get_peft_model(copy.deepcopy(model), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    prompted = peft.get_peft_model(copy.deepcopy(model), peft.PromptTuningConfig(num_virtual_tokens=3, **sizes))
    with pytest.raises(ZooError, match="cannot be replaced, as PEFT's prompt and prefix methods do"):
        prompted.generate(**batch, max_new_tokens=1)
