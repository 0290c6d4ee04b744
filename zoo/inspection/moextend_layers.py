"""`zoo shift base=<model> probe=<model>`: find the layers of a mixture of experts whose routing new data shifts most.

The first model is the one to extend, the second a copy whose routers were tuned on the new data. Prints the two options
of adapter `moextend` that follow: layers to extend, and experts to copy. See `zoo.fusion.adapters.expert_shift`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from zoo.composed.outputs import LOSS_ALONE
from zoo.registry import RecordError, ZooError, naming
from zoo.runs.data import RunData, spread_over
from zoo.text.batch import to_device
from zoo.text.command_line import Parser


def main(words: Sequence[str]) -> int:
    """Count routed tokens in both models and print the options."""
    parser = Parser(
        "shift",
        "Find the layers of a mixture of experts whose routing new data shifts most, for adapter moextend.",
        "zoo shift base=dir:runs/x probe=last data=[scenes]",
        usage="base=<model> probe=<model> [key=value ...] [flags]",
        options="as for zoo eval: data=[...] of the train split; default: the data of the probe",
    )
    parser.add_argument(
        "--base", required=True, metavar="model", help="the one to extend, as model= takes it: dir:runs/x"
    )
    parser.add_argument(
        "--probe", required=True, metavar="model", help="the same with tuned routers, as by recipe=moextend_probe"
    )
    parser.add_argument(
        "--samples", type=int, default=1000, metavar="N", help="at equal distances in the data; default: 1000"
    )
    parser.add_argument(
        "--share", type=float, default=0.5, metavar="S", help="of the layers with experts, rounded down; default: 0.5"
    )
    args = parser.read(words)
    if args.samples < 1:
        raise ZooError(f"samples must be at least 1, got {args.samples}.")
    print(options_for(args.base, args.probe, args.options, samples=args.samples, share=args.share))
    return 0


def options_for(
    base: str, probe: str, overrides: Sequence[str] = (), *, samples: int = 1000, share: float = 0.5
) -> str:
    """Return the options of adapter `moextend` as words for the command line."""
    from zoo.fusion.adapters.expert_shift import select
    from zoo.settings import config as configs

    data = RunData(configs.compose("load", [f"model={probe}", *overrides]).data).training
    if not data:
        raise ZooError("There is no data to count tokens on: give data=[...] of the train split.")
    before, after = (_counts(name, data, samples) for name in (base, probe))
    layers, sources = select(before, after, share)
    return " ".join(
        f"adapter.moextend.{n}=[{','.join(map(str, v))}]" for n, v in (("layers", layers), ("sources", sources))
    )


@torch.no_grad()
def _counts(name: str, data: dict[str, Any], samples: int) -> dict[int, torch.Tensor]:
    from zoo.fusion.adapters.expert_shift import counted
    from zoo.loading.build import load

    model, processor = load(name)
    each = max(1, samples // len(data))
    with counted(model.llm) as counts:
        for data_name, dataset in data.items():
            for sample in spread_over(data_name, dataset, each):
                if isinstance(sample, RecordError):
                    raise sample
                with naming(data_name, sample.where, sample.id, "text"):
                    batch = processor.collate([processor.encode(sample)])
                model(**to_device(batch, model.device), **LOSS_ALONE)
    return counts
