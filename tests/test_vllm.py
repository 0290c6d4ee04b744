"""The plug-in for vLLM, with stand-ins of the classes that it uses (tests/stand_ins): its engine does not run here."""

import copy
import importlib
import logging
import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zoo
from tests import published_builders as build

ROOT = Path(__file__).resolve().parents[1]
STAND_INS = ROOT / "tests" / "stand_ins"


@pytest.fixture
def plugin(monkeypatch):
    """The entry point's module, in a process that has vLLM."""
    forget()
    monkeypatch.syspath_prepend(str(STAND_INS))
    from zoo import vllm_plugin

    vllm_plugin.register.cache_clear()
    yield vllm_plugin
    vllm_plugin.register.cache_clear()
    forget()


def forget():
    for name in [n for n in sys.modules if n.partition(".")[0] == "vllm" or n == "zoo.serving.vllm_llava"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm") / "llava"
    return folder, *build.llava(folder)


def served(plugin, llava, pruner, rate=None, section=None):
    """The class as vLLM makes it: its model, its processor."""
    assert plugin.register()
    _, theirs, processor = llava
    module, _, name = importlib.import_module("vllm").ModelRegistry.registered[plugin.ARCHITECTURE].partition(":")
    cls = getattr(importlib.import_module(module), name)
    stand_in = importlib.import_module(plugin.MODULE)
    config = copy.deepcopy(theirs.config)
    config.zoo_pruner = pruner
    if section:
        config.text_config.rope_parameters["mrope_section"] = section
    processor_class, info, dummies = cls.parts
    assert dummies is stand_in.LlavaDummyInputsBuilder
    model = cls(vllm_config=stand_in.config_for(config, theirs, rate)).eval()
    return model, processor_class(info(SimpleNamespace(config=config, processor=processor)))


def prefilled(model, ids, embeds, chunk):
    """The prompt's image embeddings and positions, as vLLM's model runner gathers them, `chunk` tokens at a time."""
    token, k = model.config.image_token_index, embeds.shape[1]
    places = [i for i, x in enumerate(ids) if x == token]
    cached = embeds.flatten(0, 1)
    positions, delta = model.get_mrope_input_positions(ids, [])
    merged = []
    for start in range(0, len(ids), chunk):
        inside = [number for number, i in enumerate(places) if start <= i < start + chunk]
        of_images = [[n for n in inside if n // k == image] for image in range(len(places) // k)]
        items = [cached[numbers] for numbers in of_images if numbers]
        items, new, delta = model.recompute_mrope_positions(
            input_ids=ids, multimodal_embeddings=items, mrope_positions=positions, num_computed_tokens=start
        )
        merged += items
        positions.copy_(new)
    return torch.cat(merged), positions, delta


PROMPT = "USER: <image>\nis there a red circle? <image>\nyes ASSISTANT:"


@pytest.mark.parametrize("chunk", [1000, 5])
@pytest.mark.parametrize("positions", ["kept", "dense"])
@pytest.mark.parametrize(
    "node",
    [
        {"name": "fastervlm", "keep_ratio": 0.25},
        {"name": "fastervlm", "score": "column_mean", "num_keep": 5},
        {"name": "visionzip", "keep_ratio": 0.5},
        {"name": "hiprune", "keep_ratio": 0.5, "alpha": 1.0, "object_layer": 2},
        {"name": "random", "keep_ratio": 0.4},
    ],
    ids=lambda node: f"{node['name']}-{node.get('score', '')}",
)
def test_the_llm_gets_what_the_composed_model_gives_it(plugin, llava, node, positions, chunk):
    folder, theirs, _ = llava
    model, processor = served(plugin, llava, {**node, "positions": positions}, rate=0.5, section=[2, 2, 2])
    photos = [build.photo(40, 60, seed=i) for i in range(2)]
    ids, pixels = processor.apply(PROMPT, photos)
    options = [f"pruner.{node['name']}.{key}={value}" for key, value in node.items() if key != "name"]
    composed, ours = zoo.load(f"dir:{folder}", f"pruner=[{node['name']}]", *options, f"positions={positions}")
    given = ours(images=photos, text=PROMPT, return_tensors="pt")
    assert given["input_ids"][0].tolist() == ids  # the placeholders are those that are left

    with torch.no_grad():
        embeds, found, delta = prefilled(model, ids, model.embed_multimodal(pixel_values=pixels), chunk)
        shown = torch.tensor([ids]) == model.config.image_token_index
        text = theirs.get_input_embeddings()(torch.tensor([ids]))
        assert (found == found[0]).all() and delta == int(found[0, -1]) + 1 - len(ids)
        assert (delta > 0) == (positions == "kept")
        out = theirs.model.language_model(
            inputs_embeds=text.masked_scatter(shown[..., None], embeds),
            position_ids=found[:1],
            attention_mask=torch.ones_like(shown).long(),
        )
        expected = composed(**given).logits
    assert torch.allclose(theirs.lm_head(out.last_hidden_state), expected, atol=2e-4)
    assert not [m for m in model.vision_tower.modules() if m._forward_hooks]


def test_sixteen_bits_carry_positions_exactly(plugin, llava):
    """400 patches, of which many have a place above 256."""
    _, theirs, processor = llava
    config = copy.deepcopy(theirs.config)
    config.vision_config.image_size = 160
    wide = type(theirs)(config).to(torch.bfloat16).eval()
    wide.set_attn_implementation("sdpa")
    model, _ = served(
        plugin, (None, wide, processor), {"name": "random", "keep_ratio": 0.5}, rate=0.1, section=[6, 0, 0]
    )
    with torch.no_grad():
        embeds = model.embed_multimodal(pixel_values=torch.rand(1, 3, 160, 160, dtype=torch.bfloat16))
    ids = [5] + [config.image_token_index] * 200 + [6]
    found = prefilled(model, ids, embeds, 64)[1][0]
    expected = zoo.pruner("random", keep_ratio=0.5, grid=(20, 20))
    assert model.kept and found[0] == 0 and found[-1] == 401
    assert (found.diff() > 0).all() and found[1:-1].max() > 300 and expected.kept == 200


def test_ranks_share_their_heads_scores(plugin, llava, monkeypatch):
    """Two ranks with a head each, whose scores are added up by vLLM."""
    model, _ = served(plugin, llava, {"name": "fastervlm", "positions": "dense"})
    qkv = torch.randn(2, 17, 3, 2, 16)
    whole = SimpleNamespace(num_heads_per_partition=2, head_dim=16, scale=0.25, tp_size=1)
    rank = SimpleNamespace(num_heads_per_partition=1, head_dim=16, scale=0.25, tp_size=2)
    module = sys.modules["zoo.serving.vllm_llava"]
    for word in ("cls_attention", "key_attention"):
        monkeypatch.setattr(module, "tensor_model_parallel_all_reduce", lambda x: x)
        halves = [model._score(word, qkv[:, :, :, head].flatten(2), rank) for head in range(2)]
        both = model._score(word, qkv.flatten(2), whole)
        assert both.shape == (2, 16) and torch.allclose(halves[0] + halves[1], both, atol=1e-6)
    with pytest.raises(zoo.ZooError, match="keys in vLLM with 2 ranks"):
        model._score("keys", qkv[:, :, :, 0].flatten(2), rank)


def test_what_the_server_was_started_with_decides_the_positions(plugin, llava, caplog, monkeypatch):
    node = {"name": "fastervlm"}
    assert served(plugin, llava, node, rate=0.5, section=[2, 2, 2])[0].kept
    for given in ({}, {"rate": 0.5}, {"section": [2, 2, 2]}, {"rate": 0.0, "section": [2, 2, 2]}):
        caplog.clear()
        assert not served(plugin, llava, node, **given)[0].kept and "positions are dense" in caplog.text
        with pytest.raises(zoo.ZooError, match="positions=kept needs mrope_section and --video-pruning-rate"):
            served(plugin, llava, {**node, "positions": "kept"}, **given)
    caplog.clear()
    assert not served(plugin, llava, {**node, "positions": "dense"})[0].kept and not caplog.text
    monkeypatch.setattr(
        sys.modules[plugin.MODULE], "config_for", without_pruning(sys.modules[plugin.MODULE].config_for)
    )
    assert not served(plugin, llava, node, section=[2, 2, 2])[0].kept


def without_pruning(config_for):
    """Configs of a vLLM from before it could compute positions again."""

    def made(*given):
        config = config_for(*given)
        config.model_config.multimodal_config = SimpleNamespace()
        return config

    return made


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (None, 'Set "zoo_pruner"'),
        ({"keep_ratio": 0.5}, 'Set "zoo_pruner"'),
        ({"name": "fastrvlm"}, "Did you mean 'fastervlm'"),
        ({"name": "fastervlm", "keep_ratio": 1.5}, r"keep_ratio must be in \(0, 1\]"),
        ({"name": "fastv"}, "acts between layers of the LLM"),
        ({"name": "fastervlm", "positions": "sparse"}, "No positions named 'sparse'"),
    ],
)
def test_mistakes_of_the_overrides_are_named(plugin, llava, node, message):
    with pytest.raises(zoo.ZooError, match=message):
        served(plugin, llava, node)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("evs", {}, "keeps another number of each image"),
        ("divprune", {"needs": frozenset({"question", "projected"})}, "needs projected, question, which is not given"),
    ],
)
def test_what_vllm_cannot_give_is_refused_when_a_server_starts(plugin, llava, monkeypatch, name, given, message):
    cls = zoo.registry.get("pruner", name).cls
    for attribute, value in given.items():
        monkeypatch.setattr(cls, attribute, value)
    with pytest.raises(zoo.ZooError, match=message):
        served(plugin, llava, {"name": name})


def test_a_model_that_takes_other_features_is_refused(plugin, llava):
    folder, theirs, processor = llava
    other = copy.copy(theirs)
    other.config = copy.deepcopy(theirs.config)
    other.config.vision_feature_select_strategy = "full"
    with pytest.raises(zoo.ZooError, match="the patches of one block"):
        served(plugin, (folder, other, processor), {"name": "fastervlm"})


def test_vllms_own_classes_give_the_same(tmp_path):
    """Its configuration, processor, tower and projector, in a process of their own; its engine is not started."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; tests/vllm_itself.py ran with 0.33.0")
    build.llava(tmp_path)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    code = [sys.executable, str(ROOT / "tests" / "vllm_itself.py"), str(tmp_path)]
    done = subprocess.run(code, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0 and "placeholders and positions equal" in done.stdout, done.stderr[-3000:]


# ---- the entry point ---------------------------------------------------------------------------------------------


def test_the_entry_point_is_light_and_needs_no_vllm():
    point = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    assert point == {"zoo": "zoo.vllm_plugin:register"}
    code = """
import sys
from importlib.metadata import EntryPoint
register = EntryPoint("zoo", "zoo.vllm_plugin:register", "vllm.general_plugins").load()
assert not {"torch", "transformers", "vllm"} & set(sys.modules)
print(register(), register())
assert not {"torch", "transformers"} & set(sys.modules)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0 and done.stdout.split() == ["False", "False"], done.stderr
    assert done.stderr.count("pruners are not registered with vLLM: ModuleNotFoundError: No module named 'vllm'") == 1
    env["PYTHONPATH"] = f"{ROOT}:{STAND_INS}"
    done = subprocess.run(
        [sys.executable, "-c", code.replace('"torch", ', "")], capture_output=True, text=True, env=env, check=False
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            ("def _process_image_pixels", "def _process_pixels"),
            "no LlavaForConditionalGeneration._process_image_pixels",
        ),
        (("class LlavaDummyInputsBuilder", "class LlavaInputs"), "has no LlavaDummyInputsBuilder"),
        (("class LlavaProcessingInfo(", "class LlavaInfo("), "has no LlavaProcessingInfo"),
    ],
)
def test_another_interface_is_left_alone_with_one_warning(plugin, tmp_path, monkeypatch, caplog, change, why):
    source = STAND_INS / "vllm" / "model_executor" / "models" / "llava.py"
    changed = tmp_path / "llava.py"
    changed.write_text(source.read_text().replace(*change))
    monkeypatch.setattr(plugin, "find_spec", lambda name: SimpleNamespace(origin=str(changed)))
    with caplog.at_level(logging.WARNING):
        assert not plugin.register() and not plugin.register()
    assert importlib.import_module("vllm").ModelRegistry.registered == {}
    assert len(caplog.records) == 1 and why in caplog.text
