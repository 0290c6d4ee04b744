"""A model with other pruners on the same weights: each kind of pruner gives what a model loaded with it gives."""

import pytest
import torch

import zoo
from tests import published_builders as build
from tests.conftest import picture
from zoo.loading.other_pruners import Pruned, words_for
from zoo.registry import ZooError

ASKED = ("is there a red circle?", picture(3, 64))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "llava"
    build.llava(folder)
    return f"dir:{folder}"


# in front of the encoder, before, behind and in place of the projector's tokens, inside the LLM, a chain
@pytest.mark.parametrize("pruner", ["downsample", "fastervlm", "visionzip", "pool", "dart", "fastv", "random+aim"])
def test_each_kind_of_pruner(llava, pruner):
    pruned = Pruned(llava)
    before = pruned.model.chat(*ASKED, max_new_tokens=6)
    model, _ = pruned.get(pruner)
    assert model.chat(*ASKED, max_new_tokens=6) == zoo.load(llava, *words_for(pruner))[0].chat(*ASKED, max_new_tokens=6)
    assert pruned.model.chat(*ASKED, max_new_tokens=6) == before
    ours = {name: tensor.data_ptr() for name, tensor in pruned.model.named_parameters()}
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == ours
    assert pruned.get(pruner)[0] is model


def test_ratios_names_and_what_is_kept(llava):
    pruned = Pruned(llava, ["pruner=random", "pruner.random.keep_ratio=0.5"], most=2)
    assert pruned.get()[0] is pruned.model and pruned.model.num_image_tokens == 8
    assert pruned.get(None, 0.25)[0].num_image_tokens == 4
    first = pruned.get("none")[0]
    assert first.num_image_tokens == 16
    assert pruned.get("hiprune", 0.5)[0].num_image_tokens == 8  # the third: the first one made is dropped
    assert pruned.get("none")[0] is first and len(pruned._made) == 2
    for pruner, ratio, message in (
        ("rndom", None, "Did you mean 'random'"),
        ("pool", 0.5, "no option keep_ratio"),
        ("none", 0.5, "there is none"),
        ("random", 1.5, "keep_ratio"),
        ("prumerge", None, "needs"),
    ):
        with pytest.raises(ZooError, match=message):
            pruned.get(pruner, ratio)
    assert len(pruned._made) == 2


def test_another_ratio_of_its_own_pruners_leaves_their_other_options(llava, tmp_path):
    """Of the command line, and of a saved model."""
    words = ["pruner=[random]", "pruner.random.seed=7", "pruner.random.keep_ratio=0.75"]
    pruned = Pruned(llava, words, device="cpu")
    pruned.model.save_pretrained(tmp_path)
    pruned.processor.save_pretrained(tmp_path)
    for one in (pruned, Pruned(f"dir:{tmp_path}", device="cpu")):
        model, _ = one.get(None, 0.25)
        node = one.model.config.slots["pruner"]["random"]
        assert model.config.slots["pruner"] == {"random": node | {"keep_ratio": 0.25}} and node["seed"] == 7


def test_weights_that_a_pruner_would_change_are_refused(llava):
    pruned = Pruned(llava)
    pruned.model.vision.register_parameter("more", torch.nn.Parameter(torch.zeros(1)))
    pruned.get("random")  # more than is needed
    projector = pruned.model.projector
    name, weight = next(iter(projector.named_parameters()))
    owner = projector.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(weight[:1].detach().clone()))
    with pytest.raises(ZooError, match="load it with this pruner"):
        pruned.get("hiprune")
    pruned.model.llm.lm.is_loaded_in_4bit = True
    with pytest.raises(ZooError, match="quantized"):
        pruned.get("aim")
