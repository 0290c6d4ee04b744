"""Options of FSDP2: what is refused, and in which number format layers are gathered."""

import pytest
import torch

from zoo.registry import ZooError
from zoo.runs.sharding import gathers_short, require_one_format
from zoo.settings.parallel import ParallelConfig


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shard": "fsdp"}, "parallel.shard.*'fsdp'. Did you mean 'fsdp2'"),
        ({"gather": "bf61"}, "parallel.gather.*Did you mean 'bf16'"),
        ({"reduce": "auto"}, "parallel.reduce"),
    ],
)
def test_a_misspelt_value_is_refused(options, message):
    with pytest.raises(ZooError, match=message):
        ParallelConfig(**options)


@pytest.mark.parametrize(
    "gather, precisions, short",
    [
        ("auto", ["bf16"], True),
        ("auto", ["bf16", "fp32"], False),
        ("fp32", ["bf16"], False),
        ("bf16", ["bf16", "bf16"], True),
    ],
)
def test_layers_are_gathered_as_their_products_need(gather, precisions, short):
    assert gathers_short(ParallelConfig(gather=gather), precisions) is short


def test_short_gathers_beside_float32_products_are_refused():
    with pytest.raises(ZooError, match=r"parallel\.gather=auto"):
        gathers_short(ParallelConfig(gather="bf16"), ["bf16", "fp32"])


def test_weights_of_two_formats_that_train_are_refused_by_name():
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2).bfloat16()})
    with pytest.raises(ZooError, match=r"b.bias in bfloat16, a.bias in float32.*master_weights=fp32"):
        require_one_format(module)
    module["b"].requires_grad_(False)
    require_one_format(module)


@pytest.mark.parametrize("options", [{"replicate": 0}, {"replicate": 2, "shard": "none"}])
def test_groups_that_cannot_be_are_refused(options):
    with pytest.raises(ZooError, match=r"parallel\.replicate"):
        ParallelConfig(**options)
