"""MoExtend's rows: a training step with one expert added to four, against the same mixture without it."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from zoo.benches.fusion import FusionPlace
from zoo.benches.fusion_mole import training_step
from zoo.benches.measure import Value
from zoo.benches.report import Row
from zoo.fusion.adapters import extended_layer

SIZES: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "num_layers": 1, "num_heads": 16}
MIXTURE: dict[str, Any] = {"model_type": "mixtral", "num_experts": 4, "top_k": 2}
ROWS, LENGTH = 2, 1024
MOST = 1.15


def rows(place: FusionPlace) -> list[Row]:
    """Time a step where every layer is extended; what trains otherwise is a gradient to the input."""
    tiny = place.options.sizes == "tiny"
    sizes, shape = (MIXTURE, (2, 16)) if tiny else ({**SIZES, **MIXTURE}, (ROWS, LENGTH))
    node = {"name": "moextend", "layers": list(range(sizes.get("num_layers", 4)))}
    steps: dict[str, Any] = {
        "base": training_step(place, sizes, shape, None),
        "new": training_step(place, sizes, shape, node),
        "beside": _without_counts(training_step(place, sizes, shape, node)),
        "whole": training_step(place, sizes, shape, None, most=lambda llm: llm.layers.parameters()),
    }
    times = place.time(steps)
    kept = {name: step(count=True) for name, step in steps.items()}
    what = f"moextend, 1 expert added to 4, {shape[0] * shape[1]} tokens"
    return [
        Row(f"{what}: step against the unextended", times.ratio("new", "base"), bound=MOST, at_most=True),
        Row(
            f"{what}: step where counts cannot be read, against the unextended",
            times.ratio("beside", "base"),
            note="the way on an accelerator",
        ),
        Row(f"{what}: step against training every weight", times.ratio("new", "whole")),
        Row(f"{what}: activations against the unextended", Value.of([kept["new"] / kept["base"]])),
        Row(f"{what}: activations against training every weight", Value.of([kept["new"] / kept["whole"]])),
    ]


def _without_counts(step: Callable[..., float]) -> Callable[..., float]:
    """Run a step as on an accelerator: old experts by the family's own kernel, the new one beside it."""

    def run(**given: Any) -> float:
        with patch.object(extended_layer, "_may_read_counts", lambda x: False):
            return step(**given)

    return run
