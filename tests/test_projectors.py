"""The linear, MLP and resampler projectors beyond what every projector must do."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.fusion_builders import features
from zoo import registry
from zoo.fusion.projectors.resampler import sine_positions
from zoo.registry import ZooError


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    return registry.build("projector", {"name": name, **options}, vision_dim=24, text_dim=40, grid=(4, 4))


def test_linear_is_one_matrix():
    image = features()
    projector = build("linear")
    wanted = image.tokens @ projector.proj.weight.T + projector.proj.bias
    assert torch.allclose(projector(image), wanted, atol=1e-6)
    assert build("linear", bias=False).proj.bias is None


def test_mlp_is_llavas_by_default():
    layers = list(build("mlp").net)
    assert [type(m) for m in layers] == [nn.Linear, nn.GELU, nn.Linear]
    assert [m.weight.shape for m in layers[::2]] == [(40, 24), (40, 40)]
    assert layers[1].approximate == "none"


@pytest.mark.parametrize(("depth", "shapes"), [(1, [(40, 24)]), (3, [(16, 24), (16, 16), (40, 16)])])
def test_mlp_depth_and_width(depth, shapes):
    layers = list(build("mlp", depth=depth, hidden_size=16 if depth > 1 else 0).net)
    assert [m.weight.shape for m in layers[::2]] == shapes


def naive_layer(layer, queries, x):
    """One resampler layer with loops over images and heads, in float64."""
    own = layer.norm1(queries)
    keys = torch.cat([x, own], dim=1)
    q, (k, v) = layer.q(own), layer.kv(keys).chunk(2, dim=-1)
    out = torch.zeros_like(q)
    d = q.shape[-1] // layer.heads
    for i in range(len(q)):
        for h in range(layer.heads):
            part = slice(h * d, (h + 1) * d)
            weights = (q[i, :, part] @ k[i, :, part].T / d**0.5).softmax(-1)
            out[i, :, part] = weights @ v[i, :, part]
    queries = queries + layer.out(out)
    return queries + layer.mlp(layer.norm2(queries))


def test_resampler_layer_is_its_equation():
    projector = build("resampler", num_queries=5, num_heads=3).double()
    image = features()
    x = projector.norm_in(projector.proj_in(image.tokens.double())) + sine_positions((4, 4), 24, torch.device("cpu"))
    queries = projector.queries.expand(3, -1, -1)
    for layer in projector.layers:
        queries = naive_layer(layer, queries, x)
    wanted = projector.proj_out(projector.norm_out(queries))
    got = projector(replace(image, tokens=image.tokens.double()))
    assert torch.allclose(got, wanted, atol=1e-10)


@pytest.mark.parametrize("norm", [True, False])
def test_resampler_may_hear_how_loud_tokens_are(norm):
    projector = build("resampler", input_norm=norm)
    torch.nn.init.zeros_(projector.proj_in.bias)
    image = replace(features(), grid=None)
    louder = replace(image, tokens=3 * image.tokens)
    assert torch.allclose(projector(image), projector(louder), atol=1e-3) == norm


def test_resampler_sees_places_where_there_is_a_grid():
    projector = build("resampler")
    image = features()
    turned = replace(image, tokens=image.tokens.flip(1))
    assert not torch.allclose(projector(image), projector(turned), atol=1e-3)
    no_grid = [projector(replace(x, grid=None)) for x in (image, turned)]
    assert torch.allclose(*no_grid, atol=1e-5)


def test_sine_positions_tell_all_places_apart_and_run_row_by_row():
    table = sine_positions((5, 7), 30, torch.device("cpu"))
    assert table.shape == (35, 30)
    assert torch.cdist(table, table).add(torch.eye(35) * 9).min() > 0.1
    table = sine_positions((5, 7), 32, torch.device("cpu"))
    assert torch.equal(table[0, :16], table[6, :16]) and torch.equal(table[0, 16:], table[7, 16:])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {"depth": 0}, "depth must be at least 1, got 0"),
        ("mlp", {"dept": 2}, "'dept'. Did you mean 'depth'"),
        ("resampler", {"num_queries": 0}, "num_queries must be at least 1, got 0"),
        ("resampler", {"num_heads": 5}, "width 24 is not a multiple of num_heads 5"),
    ],
)
def test_options_that_cannot_be_are_refused(name, options, message):
    with pytest.raises(ZooError, match=message):
        build(name, **options)
