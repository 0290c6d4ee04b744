"""`llm.keep_layers`: some decoder layers of a checkpoint, numbered anew, that compute what they did."""

from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import zoo
from tests.pretrained_builders import tiny_gguf
from zoo import ZooError
from zoo.registry import build

KEPT = [0, 2, 5]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 64, "head_dim": 8}
FAMILIES = {
    "llama": {},
    "gemma2": {"sliding_window": 4},  # every second layer has a window
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    | {"mlp_only_layers": [1, 2], "num_experts_per_tok": 2, "decoder_sparse_step": 1},
}


@pytest.fixture(params=FAMILIES)
def checkpoint(request, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **SIZES | FAMILIES[request.param]))
    model.eval().save_pretrained(tmp_path / "llm")
    return tmp_path / "llm", model


def test_they_compute_what_the_chosen_layers_compute(checkpoint):
    folder, whole = checkpoint
    llm = build("llm", {"name": "hf", "checkpoint": str(folder), "keep_layers": KEPT}, dtype=torch.float32).eval()
    ids = torch.randint(80, (2, 12), generator=torch.Generator().manual_seed(1))
    for i, layer in enumerate(whole.model.layers):
        if i not in KEPT:
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    with torch.no_grad():
        wanted = whole(input_ids=ids, use_cache=False).logits
        found = llm.lm(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert llm.num_layers == len(llm.layers) == 3
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = llm.lm.generate(ids, **greedy)  # keys of a layer are found by its new number
    with torch.no_grad():
        again = llm.lm(input_ids=cached[:, :-1], use_cache=False).logits[:, 11:].argmax(-1)
    assert torch.equal(cached[:, 12:], again)


def test_shapes_on_meta_are_those_of_the_loaded_model(checkpoint):
    node = {"name": "hf", "checkpoint": str(checkpoint[0]), "keep_layers": KEPT}
    with torch.device("meta"):
        empty = build("llm", node)
    loaded = build("llm", node)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}


@pytest.mark.parametrize("kept", [[0, 6], [-1], [2, 2], [3, 1]])
def test_layers_that_do_not_exist_or_do_not_ascend_are_refused(kept, tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ZooError, match=r"keep_layers of llm .* must ascend, without doubles, within 0 to 5, got"):
        build("llm", {"name": "hf", "checkpoint": str(tmp_path), "keep_layers": kept})


@pytest.mark.parametrize(
    ("family", "kept", "why"),
    [
        (
            "qwen2_moe",
            [1, 3, 5],
            r"layer 1 would be layer 0, .* 'qwen2_moe' .* \(mlp: .*MoeBlock for .*MLP\).*: 0, 2, 4",
        ),
        ("qwen2_moe", [0, 3, 4], ""),
        ("glm4_moe", [2, 4], r"layer 2 would be layer 0, .* Of that kind: 0\."),
        ("glm4_moe", [0, 4], ""),
        ("minimax", [1, 3], r"layer 1 would be layer 0, .*self_attn: num_hidden_layers=6 for 2"),
    ],
)
def test_kinds_of_layers_that_follow_from_their_numbers_have_to_stay_in_place(family, kept, why, tmp_path):
    """A rule of the config, such as a mixture in every second layer, puts another kind where one stays."""
    of = {"qwen2_moe": {"decoder_sparse_step": 2, "num_experts": 4, "shared_expert_intermediate_size": 16}}
    of["glm4_moe"] = {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    of["minimax"] = {"num_local_experts": 2}
    sizes = SIZES | of[family] | {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(family, **sizes, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "whole")
    node = {"name": "hf", "checkpoint": str(tmp_path / "whole"), "keep_layers": kept}
    if why:
        with pytest.raises(ZooError, match=why):
            build("llm", node)
        return
    lm = build("llm", node, dtype=torch.float32).lm.eval()
    lm.save_pretrained(tmp_path / "thin")
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path / "thin", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    ids = torch.arange(9)[None]
    assert torch.equal(again.eval()(input_ids=ids).logits, lm(input_ids=ids).logits)


def test_layers_in_few_bits_are_of_the_kind_that_they_were_made_of():
    """Their linear layers are of other classes, which no config describes."""
    from zoo.fusion.llm.kept_layers import keep_layers

    class Few(torch.nn.Linear):
        pass

    lm: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    for layer in lm.model.layers:
        layer.mlp.up_proj = Few(32, 24)
    lm.hf_quantizer = object()
    keep_layers(lm, KEPT, "mine")
    assert len(lm.model.layers) == 3 and type(lm.model.layers[2].mlp.up_proj) is Few


def test_they_are_for_checkpoints():
    with pytest.raises(ZooError, match=r"keep_layers is for a checkpoint; .* has num_layers"):
        build("llm", {"name": "hf", "keep_layers": [0]}, vocab_size=20)


def test_a_model_is_saved_thin_against_the_whole_checkpoint(tmp_path):
    """Its folder has nothing of the language model, or with `include_base` all that is left of it."""
    pytest.importorskip("gguf", reason="GGUF files are read by the package gguf: pip install gguf")
    words = [f"llm.checkpoint={tiny_gguf(tmp_path / 'llm.gguf', layers=6)}", f"llm.keep_layers={KEPT}".replace(" ", "")]
    words += ["vision=timm", "vision.image_size=16", "vision.patch_size=8", "vision.width=24", "vision.heads=2"]
    model, processor = zoo.compose(*words, "vision.depth=2", "projector=linear")
    ids = torch.arange(5, 25)[None]
    wanted = model.eval()(input_ids=ids, all_logits=True).logits
    for whole in (False, True):
        folder = tmp_path / str(whole)
        model.save_pretrained(folder, include_base=whole)
        processor.save_pretrained(folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            saved = [name for name in file.keys() if ".layers." in name and name.startswith("llm.")]  # noqa: SIM118
        assert {name.split(".layers.")[1].split(".")[0] for name in saved} == ({"0", "1", "2"} if whole else set())
        loaded, _ = zoo.load(f"dir:{folder}")
        assert torch.equal(loaded(input_ids=ids, all_logits=True).logits, wanted)
