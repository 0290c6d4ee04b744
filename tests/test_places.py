"""A model on several devices: what a map may say, how `auto` shares weights out, and that inputs follow the weights."""

import pytest
import torch

import zoo
from tests import published_builders as build
from zoo.published.places import balance, move_inputs, place_of
from zoo.registry import ZooError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places") / "llava"
    build.llava(folder)
    return folder


def test_the_longest_prefix_decides():
    cpu, one, two = torch.device("cpu"), torch.device("cuda", 1), torch.device("cuda", 2)
    places = {"llm": one, "llm.lm.model.layers.1": two}
    assert place_of("llm.lm.model.layers.10.mlp.up_proj.weight", places, cpu) == one
    assert place_of("llm.lm.model.layers.1.mlp.up_proj.weight", places, cpu) == two
    assert place_of("vision.tower.x", places, cpu) == cpu


def test_auto_shares_out_layers_in_their_order_and_cuts_none():
    sizes = {"vision.tower.encoder.layers.0.w": 30, "projector.net.0.weight": 5, "llm.lm.model.embed_tokens.weight": 40}
    sizes |= {f"llm.lm.model.layers.{i}.{w}": 50 for i in range(12) for w in ("a", "b")}
    sizes |= {"llm.lm.lm_head.weight": 40}
    devices = [torch.device("cuda", i) for i in range(3)]
    found = balance(sizes, devices)
    order = ["vision", "projector", "llm", *[f"llm.lm.model.layers.{i}" for i in range(12)], "llm.lm.lm_head"]
    assert list(found) == order
    numbers = [found[unit].index for unit in order]
    assert numbers == sorted(numbers)
    loads = [sum(s for n, s in sizes.items() if place_of(n, found, devices[0]).index == i) for i in range(3)]
    assert sum(loads) == sum(sizes.values()) and max(loads) - min(loads) <= 2 * 100


@pytest.mark.parametrize(
    ("device_map", "words"),
    [
        ({"": "cpu", "llm": "disk"}, r"device_map\['llm'\] is 'disk': weights are held by devices"),
        ({"": "cpu", "llm": "gpuu"}, r"device_map\['llm'\] must be a device, got 'gpuu'"),
        ({"": "cpu", "lm": "cpu"}, r"No part of the model in device_map named 'lm'. Did you mean 'llm'"),
        ({}, "device_map is empty"),
    ],
)
def test_what_is_no_place_is_refused(folder, device_map, words):
    with pytest.raises(ZooError, match=words):
        zoo.load(f"dir:{folder}", device_map=device_map)


def test_inputs_follow_the_weights(folder):
    """The meta device stands for an accelerator: what is left behind on the CPU would be an error there."""
    model, processor = zoo.load(f"dir:{folder}", "adapter=[lora]", "pruner=[pool]", attention="eager")
    batch = processor(images=[build.photo(40, 40)], text="<image> a")
    whole = model(**batch).logits
    for last in (model.llm.layers[-1], model.llm.lm.model.norm, model.llm.lm.lm_head):
        last.to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(**batch)
    move_inputs(model)
    logits = model(**batch).logits
    assert logits.device.type == "meta" and logits.shape == whole.shape
    before = model(**batch, output_hidden_states=True).hidden_states[2]
    assert before.device.type == "cpu" and before.isfinite().all()


def test_several_devices_give_what_one_gives(folder):
    """As far as a CPU goes: under two names of it, the way of several devices is taken."""
    plain, processor = zoo.load(f"dir:{folder}")
    split, _ = zoo.load(f"dir:{folder}", device_map={"": "cpu", "llm.lm.model.layers.1": "cpu:0"})
    assert split.llm.layers[1]._forward_pre_hooks and not plain.llm.layers[1]._forward_pre_hooks
    batch = processor(images=[build.photo(40, 40)], text="<image> a")
    assert torch.equal(split(**batch).logits, plain(**batch).logits)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(split.generate(**batch, **options), plain.generate(**batch, **options))
