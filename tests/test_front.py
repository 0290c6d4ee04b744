"""Pruners in front of the encoder: encoders on smaller images, with the weights that they have."""

import copy

import pytest
import torch

from tests.vision_builders import (
    SIZED,
    TIMM,
    hf_model,
    open_clip_model,
    pixels,
    save_open_clip,
    save_timm,
    shake,
    timm_model,
)
from zoo.registry import ZooError, build

SMALL = pixels(size=16)
HF = ("clip", "siglip", "dinov2", "dinov2_registers", "dinov3")
NO_TABLES = {"hf_dinov3"}  # rotary positions, of any size
ONE_SIZE = ("beit_base_patch16_224",)


def resized(node):
    """An encoder of 4 x 4 patches of 8 pixels, run on 2 x 2 of them."""
    tower = shake(build("vision", node))
    tower.resize((2, 2))
    return tower


@pytest.mark.parametrize("kind", SIZED)
def test_every_encoder_runs_on_smaller_images_with_the_weights_that_it_has(kind):
    tower = shake(build("vision", SIZED[kind]))
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    whole = copy.deepcopy(tower)
    tower.resize((2, 2))
    assert (tower.grid, tower.num_tokens, tower.transform.size, tower.own_size) == ((2, 2), 4, (16, 16), (16, 16))
    need = frozenset(tower.provides - {"grid"})
    with torch.no_grad():
        seen, alone = tower(SMALL, need=need), tower(SMALL[1:], need=need)
    assert seen.tokens.shape == (2, 4, 32) and seen.grid == (2, 2)
    for word, value in vars(seen).items():
        if isinstance(value, torch.Tensor):  # of a batch as alone, scores and keys too
            torch.testing.assert_close(value[1:], getattr(alone, word), msg=word)
    assert before.keys() == tower.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())
    with pytest.raises(ZooError, match="takes images of 16 x 16, got 32 x 32"):
        tower(pixels())
    assert whole(pixels()).grid == (4, 4)  # a copy from before is as it was


@pytest.mark.parametrize("kind", [k for k in SIZED if k not in NO_TABLES])
def test_a_smaller_grid_learns_the_positions_of_the_whole_one(kind):
    tower = resized(SIZED[kind]).requires_grad_(True)
    tower(SMALL).tokens.square().sum().backward()
    table = next(p for n, p in tower.named_parameters() if "pos" in n and p.dim() > 1)
    assert table.grad is not None and int((table.grad.reshape(-1, 32).abs().sum(1) > 0).sum()) >= 16


@pytest.mark.parametrize("kind", HF)
def test_positions_of_a_checkpoint_are_interpolated_as_transformers_does_it(kind, tmp_path):
    model = hf_model(kind)
    model.save_pretrained(tmp_path)
    tower = build("vision", {"name": "hf", "checkpoint": str(tmp_path), "layer": -1}).eval()
    tower.resize((2, 2))
    more = {"interpolate_pos_encoding": True} if kind in ("clip", "siglip") else {}
    with torch.no_grad():
        ours = tower(SMALL).tokens
        theirs = model(SMALL, output_hidden_states=True, **more).hidden_states[-1][:, -4:]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in TIMM if n not in ONE_SIZE])
def test_an_encoder_of_timm_is_the_one_that_timm_makes_of_that_size(name, tmp_path):
    save_timm(timm_model(name), tmp_path)
    tower, wanted = (build("vision", {"name": "timm", "checkpoint": str(tmp_path), **more}).eval()
                     for more in ({}, {"image_size": 16}))  # fmt: skip
    tower.resize((2, 2))
    with torch.no_grad():
        torch.testing.assert_close(tower(SMALL).tokens, wanted(SMALL).tokens, atol=1e-5, rtol=1e-5)
    assert tower.transform == wanted.transform


@pytest.mark.parametrize("norm", [False, True])
def test_an_encoder_of_open_clip_is_the_one_that_it_makes_of_that_size(norm, tmp_path):
    save_open_clip(*open_clip_model(), tmp_path)
    node = {"name": "open_clip", "checkpoint": str(tmp_path), "norm": norm}
    tower, wanted = (build("vision", {**node, **more}).eval() for more in ({}, {"image_size": 16}))
    tower.resize((2, 2))
    with torch.no_grad():
        torch.testing.assert_close(tower(SMALL).tokens, wanted(SMALL).tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ONE_SIZE)
def test_encoders_with_tables_for_one_size_refuse(name, tmp_path):
    save_timm(timm_model(name), tmp_path)
    tower = build("vision", {"name": "timm", "checkpoint": str(tmp_path)})
    with pytest.raises(ZooError, match="is a Beit, which has tables for images of one size"):
        tower.resize((2, 2))
    assert tower.grid == (4, 4)
