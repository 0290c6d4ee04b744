"""Published models whose language model is a mixture of experts, and files that contradict their config."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from tests import published_builders as build
from tests.published_builders import ASK, said
from zoo.registry import ZooError

KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "phimoe")


def seen(processor):
    """Text and image of a question, and what the family's own processor makes of them."""
    text, photo = processor.apply_chat_template(said(1), add_generation_prompt=True), build.photo(40, 56)
    return text, photo, processor(images=[photo], text=[text], return_tensors="pt")


@pytest.fixture(scope="module", params=[("llava", kind) for kind in KINDS] + [("internvl", "qwen3_moe")], ids="-".join)
def mixture(request, tmp_path_factory):
    """Folder, transformers' model and processor, ours."""
    family, kind = request.param
    folder = tmp_path_factory.mktemp("mixture") / kind
    options = {"tie": False} if family == "internvl" else {}
    reference, processor = getattr(build, family)(folder, text=kind, **options)
    return folder, reference, processor, *zoo.load(f"dir:{folder}")


def test_a_mixture_loads_and_answers_as_transformers_does(mixture):
    _, reference, processor, ours, mine = mixture
    text, photo, batch = seen(processor)
    got = mine(images=[photo], text=text)
    with torch.no_grad():
        torch.testing.assert_close(ours(**got).logits, reference(**batch).logits, atol=1e-5, rtol=0)
    options = {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(ours.generate(**got, **options), reference.generate(**batch, **options))
    assert ours.llm.num_experts == 4 and "moe" in ours.llm.provides


def test_a_mixture_goes_back_and_comes_again(mixture, tmp_path):
    _, reference, processor, ours, mine = mixture
    zoo.export(ours, mine, tmp_path)
    again, info = type(reference).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in reference.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    back, same = zoo.load(f"dir:{tmp_path}")
    assert back.config.slots == ours.config.slots
    text, photo, _ = seen(processor)
    batch = same(images=[photo], text=text)
    assert torch.equal(back(**batch).logits, ours(**batch).logits)


def test_a_mixture_is_read_in_another_data_type(mixture):
    folder, _, _, ours, _ = mixture
    half, _ = zoo.load(f"dir:{folder}", dtype="bfloat16")
    experts = [name for name, _ in ours.named_parameters() if "experts.gate_up_proj" in name]
    assert experts
    for name in experts:
        assert torch.equal(half.get_parameter(name), ours.get_parameter(name).bfloat16()), name


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stated") / "llava"
    build.llava(folder, text="qwen3_moe")
    return folder


def stated(folder, to, change=None, **values):
    """A copy of a checkpoint whose text config says something else, or whose files hold something else."""
    shutil.copytree(folder, to)
    content = json.loads((to / "config.json").read_text())
    content["text_config"] |= values.pop("text", {})
    content["vision_config"] |= values.pop("vision", {})
    (to / "config.json").write_text(json.dumps(content | values))
    if change is not None:
        state = load_file(to / "model.safetensors")
        change(state)
        save_file(state, to / "model.safetensors", metadata={"format": "pt"})
    return to


CONTRADICTIONS = {  # what the config says -> what is said of it
    "fewer layers": ({"text": {"num_hidden_layers": 2}}, r"text_config\.num_hidden_layers is 2, .* hold 3 layers"),
    "fewer blocks": ({"vision": {"num_hidden_layers": 3}}, r"vision_config\.num_hidden_layers is 3, .* hold 4 layers"),
    "fewer experts": ({"text": {"num_local_experts": 3}}, r"text_config states 3 experts, and the files hold 4"),
    "more experts": ({"text": {"num_local_experts": 5}}, r"missing in llm: 6 tensors, first .*experts\.down_proj"),
    "fewer rows": ({"text": {"vocab_size": 300}}, r"text_config\.vocab_size is 300, and the files hold \d+ rows"),
    "more layers": (
        {"text": {"num_hidden_layers": 4}},
        r"missing in llm: \d+ tensors, first llm\.lm\.model\.layers\.3",
    ),
    "tied": ({"tie_word_embeddings": True}, r"is true, and the files hold two different .*llm\.tie_embeddings=false"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_a_config_states_and_files_contradict_is_said_with_both(llava, tmp_path, case):
    values, words = CONTRADICTIONS[case]
    folder = stated(llava, tmp_path / "other", **values)
    with pytest.raises(ZooError, match=words):
        zoo.load(f"dir:{folder}")


def test_embeddings_are_tied_or_not_as_the_files_hold_them(llava, tmp_path):
    whole, processor = zoo.load(f"dir:{llava}")
    batch = processor(images=[build.photo(40, 56)], text=processor.apply_chat_template(said(1, ASK)))
    folder = stated(llava, tmp_path / "tied", tie_word_embeddings=True)
    kept, _ = zoo.load(f"dir:{folder}", "llm.tie_embeddings=false")
    assert torch.equal(kept(**batch).logits, whole(**batch).logits)
    for model in (kept, whole):
        with torch.no_grad():
            model.llm.lm.lm_head.weight.mul_(1.5)
    kept.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert torch.equal(zoo.load(f"dir:{tmp_path / 'saved'}")[0](**batch).logits, whole(**batch).logits)

    def one_matrix(state):
        del state["language_model.lm_head.weight"]

    folder = stated(llava, tmp_path / "untied", one_matrix)
    with pytest.raises(ZooError, match=r"is false, and the files hold input embeddings only.*tie_embeddings=true"):
        zoo.load(f"dir:{folder}")
    tied, _ = zoo.load(f"dir:{folder}", "llm.tie_embeddings=true")
    assert tied.llm.lm.lm_head.weight is tied.llm.lm.model.embed_tokens.weight


def test_an_expert_that_is_missing_or_of_another_shape_is_named(llava, tmp_path):
    names = [n for n in load_file(llava / "model.safetensors") if re.search(r"layers\.1\.mlp\.experts\.2\.up_proj", n)]
    assert len(names) == 1

    folder = stated(llava, tmp_path / "missing", lambda state: state.pop(names[0]))
    with pytest.raises(ZooError, match=r"missing in llm: 1 tensors, first .*layers\.1\.mlp\.experts\.gate_up"):
        zoo.load(f"dir:{folder}")

    def shorter(state):
        state[names[0]] = state[names[0]][:7].clone()

    folder = stated(llava, tmp_path / "shorter", shorter)
    with pytest.raises(ZooError, match=r"unknown in llm: 8 tensors, first .*layers\.1\.mlp\.experts\.0\.gate"):
        zoo.load(f"dir:{folder}")


def test_a_weight_under_two_names_is_refused(llava, tmp_path):
    def twice(state):
        state["lm_head.weight"] = state["language_model.lm_head.weight"] + 1

    folder = stated(llava, tmp_path / "twice", twice)
    with pytest.raises(ZooError, match=r"holds 'llm\.lm\.lm_head\.weight' twice, as"):
        zoo.load(f"dir:{folder}")
