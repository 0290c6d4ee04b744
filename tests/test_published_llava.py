"""LLaVA-1.5 as published: imported to the bit, saved, pruned, adapted, and exported again."""

import json
import shutil

import pytest
import torch

import zoo
from tests import published_builders as build
from tests.published_builders import ASK, CASES, said
from zoo.registry import ZooError


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Folder, transformers' model and processor, ours."""
    folder = tmp_path_factory.mktemp("published") / "llava"
    reference, processor = build.llava(folder)
    ours, mine = zoo.load(f"dir:{folder}")
    return folder, reference, processor, ours, mine


def inputs(processor, case, side="left"):
    """What transformers' own processor makes of the case."""
    texts = [processor.apply_chat_template(said(n, q), add_generation_prompt=True) for n, q in CASES[case]]
    images = [build.photo(30 + 9 * i, 50, seed=i) for i in range(sum(n for n, _ in CASES[case]))]
    processor.tokenizer.padding_side = side
    return texts, images, processor(images=images or None, text=texts, padding=True, return_tensors="pt")


def test_the_chat_template_is_the_published_one(llava):
    _, _, theirs, _, mine = llava
    for talk in (said(1), said(0), [*said(2), {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(talk, add_generation_prompt=prompt)
            assert mine.apply_chat_template(talk, add_generation_prompt=prompt) == expected


def test_prompts_begin_as_the_familys(llava):
    """The tokenizer puts <s> in front where the template does not: in talks, evaluation and training alike."""
    from zoo.registry import Dialog, Sample

    _, _, theirs, _, mine = llava
    image = build.photo(40, 60)
    text = theirs.apply_chat_template(said(1), add_generation_prompt=True)
    expected = theirs(images=[image], text=[text], return_tensors="pt")["input_ids"][0].tolist()
    assert expected[0] == theirs.tokenizer.bos_token_id
    row = mine.encode_prompt(Sample("a", [image], []), Dialog(said(1)))
    assert row.input_ids.tolist() == expected
    asked = mine.apply_chat_template(said(1), images=[image], tokenize=True, add_generation_prompt=True)
    assert asked[0].tolist() == expected
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    learnt = mine.encode(Sample("a", [image], [Dialog([*said(1), answer])]))
    assert learnt.input_ids[: len(expected)].tolist() == expected


def test_export_is_loaded_by_transformers_alone(llava, tmp_path):
    _, reference, processor, ours, mine = llava
    zoo.export(ours, mine, tmp_path / "out")
    again, info = type(reference).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    texts, images, batch = inputs(processor, "unlike samples")
    torch.testing.assert_close(again.eval()(**batch).logits, reference(**batch).logits, atol=0, rtol=0)
    theirs = type(processor).from_pretrained(tmp_path / "out")
    same = theirs(images=images, text=texts, padding=True, return_tensors="pt")
    assert torch.equal(same["input_ids"], batch["input_ids"])
    assert torch.equal(same["pixel_values"], batch["pixel_values"])
    for name, value in reference.state_dict().items():  # blocks that we do not run are those of the checkpoint
        assert torch.equal(again.state_dict()[name], value), name
    assert zoo.load(f"dir:{tmp_path / 'out'}")[0].config.slots == ours.config.slots  # and it can be imported again


def test_an_export_without_the_checkpoint_is_as_shallow_as_the_encoder(llava, tmp_path):
    folder, reference, processor, _, _ = llava
    shutil.copytree(folder, tmp_path / "gone")
    ours, mine = zoo.load(f"dir:{tmp_path / 'gone'}")
    shutil.rmtree(tmp_path / "gone")
    zoo.export(ours, mine, tmp_path / "out")
    again, info = type(reference).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.vision_config.num_hidden_layers == 3
    batch = inputs(processor, "one image")[2]
    torch.testing.assert_close(again.eval()(**batch).logits, reference(**batch).logits, atol=0, rtol=0)


def test_an_imported_model_is_pruned_adapted_saved_and_loaded(llava, tmp_path):
    from safetensors.torch import load_file

    folder, _, _, _, _ = llava
    words = ["pruner=[pool]", "adapter=[lora]", "adapter.lora.rank=2"]
    model, processor = zoo.load(f"dir:{folder}", *words)
    assert processor.num_image_tokens == 4
    with torch.no_grad():
        for name, p in model.named_parameters():
            if model.part_of(name) == "adapter.lora":
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert all("lora" in name for name in load_file(tmp_path / "model.safetensors"))
    again, same = zoo.load(f"dir:{tmp_path}")
    batch = same(images=[build.photo(40, 40)], text=same.apply_chat_template(said(1)))
    assert torch.equal(batch["pixel_values"], processor(images=[build.photo(40, 40)], text="<image>")["pixel_values"])
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    plain = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert plain.llm.lm.config._attn_implementation == "eager"
    torch.testing.assert_close(plain(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)

    with pytest.raises(ZooError, match=r"has no pruner, and the model has pool"):
        zoo.export(again, same, tmp_path / "out")
    flat, same = zoo.load(f"dir:{tmp_path}", "pruner=[]")
    batch = same(images=[build.photo(40, 40)], text=same.apply_chat_template(said(1)))
    before = flat(**batch).logits
    zoo.export(flat, same, tmp_path / "out")  # LoRA merges
    from transformers import LlavaForConditionalGeneration

    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(**batch).logits, before, atol=1e-5, rtol=0)


def test_a_whole_model_needs_no_checkpoint_any_more(llava, tmp_path):
    folder, _, processor, _, _ = llava
    shutil.copytree(folder, tmp_path / "base")
    model, mine = zoo.load(f"dir:{tmp_path / 'base'}")
    model.save_pretrained(tmp_path / "whole", include_base=True)
    mine.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "thin")
    shutil.rmtree(tmp_path / "base")
    again, _ = zoo.load(f"dir:{tmp_path / 'whole'}")
    batch = inputs(processor, "one image")[2]
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    with pytest.raises(ZooError, match="There is no folder"):
        zoo.ZooModel.from_pretrained(tmp_path / "thin")


def test_training_lowers_the_loss_and_learns_answers_only(llava):
    from tests.conftest import sample

    folder, _, _, _, _ = llava
    model, processor = zoo.load(f"dir:{folder}")
    batch = processor.collate(
        [processor.encode(sample((ASK, "yes"))), processor.encode(sample(("yes", "no"), images=0))]
    )
    text = processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0])
    assert text.strip() == "yes</s>"  # the published template ends answers with a space: a model would unlearn to stop
    model.set_trainable(["projector"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_files_of_older_repositories_are_read(llava, tmp_path):
    """Image processor and chat template in files of their own, sizes as numbers, a slow-path class name."""
    folder = tmp_path / "old"
    shutil.copytree(llava[0], folder)
    content = json.loads((folder / "processor_config.json").read_text())
    pixels = {**content["image_processor"], "crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    pixels |= {"processor_class": "LlavaProcessor", "image_processor_type": "CLIPImageProcessorFast"}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    for name in ("processor_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    model, processor = zoo.load(f"dir:{folder}")
    assert model.config.slots == llava[3].config.slots
    image = build.photo(90, 40)
    text = processor.apply_chat_template(said(1))
    one, two = processor(images=[image], text=text), llava[4](images=[image], text=text)
    assert torch.equal(one["pixel_values"], two["pixel_values"]) and torch.equal(one["input_ids"], two["input_ids"])


def test_of_several_files_that_differ_the_one_of_transformers_counts(llava, tmp_path):
    """A folder that was saved again has files of several versions; some name no class of image processor."""
    from transformers import AutoProcessor

    folder, image = tmp_path / "old", build.photo(90, 40)
    shutil.copytree(llava[0], folder)
    pixels = json.loads((folder / "processor_config.json").read_text())["image_processor"]

    def agree():
        theirs, ours = AutoProcessor.from_pretrained(folder), zoo.load(f"dir:{folder}")[1]
        text = theirs.apply_chat_template(said(1))
        one, two = ours(images=[image], text=text), theirs(images=[image], text=text, return_tensors="pt")
        assert torch.equal(one["pixel_values"], two["pixel_values"])
        assert ours.apply_chat_template(said(1)) == text
        return text

    (folder / "preprocessor_config.json").write_text(json.dumps({**pixels, "image_mean": [0.1, 0.2, 0.3]}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": build.LLAVA_CHAT.replace(": ", "| ")}))
    assert "|" in agree()
    content = json.loads((folder / "processor_config.json").read_text())
    del content["image_processor"]
    (folder / "processor_config.json").write_text(json.dumps(content))
    agree()
    for name in ("image_processor_type", "image_mean", "resample", "do_pad"):
        pixels.pop(name, None)
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    agree()
    older = {**pixels, "feature_extractor_type": "SiglipFeatureExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(older))
    agree()


@pytest.fixture
def cache(llava, tmp_path, monkeypatch):
    """A hub cache that holds the tiny model under the published name; nothing else can be reached."""
    repository = tmp_path / "hub" / "models--llava-hf--llava-1.5-7b-hf"
    shutil.copytree(llava[0], repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.parametrize("name", ["llava15_7b", "hub:llava-hf/llava-1.5-7b-hf"])
def test_a_published_name_loads_from_the_cache(llava, cache, name):
    """Preset -> repository -> cache; the checkpoint's own config decides, not the sizes that the preset states."""
    model, processor = zoo.load(name, "adapter=[lora]")
    batch = inputs(llava[2], "one image")[2]
    assert torch.equal(model(**batch).logits, llava[3](**batch).logits)
    assert model.config.base["model"]["checkpoint"] == "llava-hf/llava-1.5-7b-hf"
    assert model.config.base["model"]["revision"] == "a" * 40, "the commit that was read"
    model.save_pretrained(cache / "saved")
    processor.save_pretrained(cache / "saved")
    again, _ = zoo.load(f"dir:{cache / 'saved'}")
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_a_published_name_that_is_not_in_the_cache_says_so(cache):
    with pytest.raises(ZooError, match=r"llava-hf/llava-1\.5-13b-hf"):
        zoo.load("llava15_13b")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_data_types_are_those_of_the_file_or_those_asked_for(llava, tmp_path, dtype):
    from tests.published_builders import llava as build_llava

    folder = tmp_path / "half"
    build_llava(folder, dtype=getattr(torch, dtype))
    model, _ = zoo.load(f"dir:{folder}")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    places = {"": "cpu", "llm": "cpu"}
    model, _ = zoo.load(f"dir:{folder}", dtype="float32", device_map=places, attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.llm.lm.config._attn_implementation == "eager"
    with pytest.raises(ZooError, match="dtype must be a torch dtype"):
        zoo.load(f"dir:{folder}", dtype="half16")
    with pytest.raises(ZooError, match="device_map must be"):
        zoo.load(f"dir:{folder}", device_map="gpuu")


# ---- what goes wrong ---------------------------------------------------------------------------------------------


WRONG = [
    (["vision.extra.hidden_act=gelu"], r"vision.extra.hidden_act is 'gelu', the checkpoint states 'quick_gelu'"),
    (["vision.layer=-1"], r"vision.layer is -1, the checkpoint states -2"),
    (["vision.mean=[0.5,0.5,0.5]"], r"vision.mean is \[0.5, 0.5, 0.5\], the checkpoint states \[0.48"),
    (["vision.std=[0.5,0.5,0.5]"], r"vision.std is \[0.5, 0.5, 0.5\], the checkpoint states \[0.26"),
    (["projector.activation=relu"], r"projector.activation is 'relu', the checkpoint states 'gelu'"),
    (["projector=linear"], r"projector=linear, the checkpoint has mlp"),
    (["llm.extra.rms_norm_eps=0.1"], r"llm.extra.rms_norm_eps is 0.1"),
]


@pytest.mark.parametrize(("overrides", "words"), WRONG, ids=[w[0][0].partition("=")[0] for w in WRONG])
def test_a_wrong_variant_is_refused(llava, overrides, words):
    with pytest.raises(ZooError, match=words):
        zoo.load(f"dir:{llava[0]}", *overrides)


def test_a_part_that_is_meant_to_differ_starts_fresh(llava):
    model, _ = zoo.load(f"dir:{llava[0]}", "projector=linear", fresh=["projector"])
    assert model.fresh_parts == ["projector"]
    assert torch.equal(model.llm.lm.lm_head.weight, llava[3].llm.lm.lm_head.weight)


def test_another_part_is_saved_beside_the_checkpoint(llava, tmp_path):
    from safetensors.torch import load_file

    model, processor = zoo.load(f"dir:{llava[0]}", "projector=linear", fresh=["projector"])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert {n.partition(".")[0] for n in load_file(tmp_path / "model.safetensors")} == {"projector"}
    again, same = zoo.load(f"dir:{tmp_path}")
    batch = same(images=[build.photo(40, 40)], text=same.apply_chat_template(said(1)))
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def changed_weights(folder, to, change):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    state = load_file(to / "model.safetensors")
    change(state)
    save_file(state, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_missing_unknown_and_misshapen_weights_are_reported_by_part(llava, tmp_path):
    def change(state):
        del state["language_model.model.layers.1.mlp.up_proj.weight"]
        del state["multi_modal_projector.linear_1.bias"]
        state["multi_modal_projector.linear_9.bias"] = torch.zeros(3)
        state["audio_tower.weight"] = torch.zeros(3)
        state["language_model.lm_head.weight"] = torch.zeros(3, 48)

    folder = changed_weights(llava[0], tmp_path / "broken", change)
    with pytest.raises(ZooError) as caught:
        zoo.load(f"dir:{folder}")
    text = str(caught.value)
    assert "missing in llm: 1 tensors, first llm.lm.model.layers.1.mlp.up_proj.weight" in text
    assert "missing in projector: 1 tensors, first projector.net.0.bias" in text
    assert "unknown in audio_tower" in text and "unknown in multi_modal_projector" in text
    assert "llm.lm.lm_head.weight: (3, 48) in the file" in text


def test_quantised_weights_are_refused_as_such(llava, tmp_path):
    def pack(state):
        name = "language_model.model.layers.1.mlp.up_proj.weight"
        state[name.replace("weight", "qweight")] = state.pop(name).to(torch.int32)

    folder = changed_weights(llava[0], tmp_path / "packed", pack)
    build.edit_json(folder, "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ZooError, match=r"states that they are quantised \(awq\).*bits=4"):
        zoo.load(f"dir:{folder}")


def test_a_first_patch_is_never_taken_for_cls(llava, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(llava[0], folder)
    build.edit_json(folder, "config.json", vision_feature_select_strategy="full")
    with pytest.raises(ZooError, match=r"keeps the \[CLS\] token"):
        zoo.load(f"dir:{folder}")
    content = json.loads((folder / "config.json").read_text())
    content["vision_config"]["model_type"] = "siglip_vision_model"
    content["vision_feature_select_strategy"] = "default"
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ZooError, match="that would be a patch"):
        zoo.load(f"dir:{folder}")


@pytest.mark.parametrize("layout", ["in memory", "hub", "old"])
def test_every_way_of_naming_the_weights_is_read(llava, tmp_path, layout):
    """As transformers 5 has them in memory, as hub repositories do, and with buffers that old versions saved."""

    def change(state):
        for name in list(state):
            value = state.pop(name)
            if layout == "in memory":
                if name.startswith("language_model.lm_head"):
                    new = name.removeprefix("language_model.")
                else:
                    new = "model." + name.replace("language_model.model.", "language_model.")
            else:
                nested = "vision_tower.vision_model." in name or not name.startswith("vision_tower.")
                new = name if nested else name.replace("vision_tower.", "vision_tower.vision_model.")
            state[new] = value
        if layout == "old":
            state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
            state["vision_tower.vision_model.embeddings.position_ids"] = torch.zeros(1, 17, dtype=torch.int64)

    folder = changed_weights(llava[0], tmp_path / "renamed", change)
    model, _ = zoo.load(f"dir:{folder}")
    batch = inputs(llava[2], "one image")[2]
    assert torch.equal(model(**batch).logits, llava[3](**batch).logits)
