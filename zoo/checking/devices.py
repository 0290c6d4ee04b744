"""What each of many devices holds and sends in a step of training: whole copies (DDP), shards (FSDP2, HSDP), or parts
of layers (tensor parallelism).

Activations come from the model's own code, run without numbers on the rows of one device, with the weights in the form
in which products read them; weights, optimiser and gradients follow from the shards of `zoo.runs.sharding`: a unit for
each decoder layer, and the root for all else, which is gathered for a whole pass. Not counted: what the allocator
rounds up and leaves unused, the CUDA context and buffers of its libraries (some GB together), a teacher.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from zoo.checking.dry_run import Trace, Unit, trace_step
from zoo.checking.memory import assumed_batch, by_formula, options_of, set_up
from zoo.checking.plan import Plan
from zoo.composed.masters import to_widen
from zoo.registry import IGNORE_INDEX
from zoo.runs.optim import matrices_in
from zoo.runs.tensor_parallel import DIVIDED, planned
from zoo.settings.parallel import ParallelConfig
from zoo.settings.scale import Devices
from zoo.storage.precision import resolve_precision
from zoo.text.sizes import seconds_text, size_text

GPU = torch.device("cuda")  # precision `auto` is what it is on one


@dataclass
class OnDevice:
    """Bytes of one device, and what it sends in an optimiser step.

    Attributes:
        weights: its share, with master weights.
        gathered: weights of other devices that it holds for a while.
        gradients: its share, and those that are not divided yet.
        optimizer: moments of its share.
        activations: for the backward pass, and in it.
        logits: of the answers, and their gradients.
        sent: bytes of an optimiser step by what they are for, and the seconds that they take.
        flops: of an optimiser step.
        rows: of a pass, and their positions.
        passes: of a step.
        notes: what keeps the plan from running as it is written.
    """

    weights: int = 0
    gathered: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    sent: dict[str, tuple[int, float]] = field(default_factory=dict)
    flops: int = 0
    rows: tuple[int, int] = (0, 0)
    passes: int = 1
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.weights + self.gathered + self.gradients + self.optimizer + self.activations + self.logits

    def seconds(self, scale: Devices) -> tuple[float, float]:
        """Return the seconds of a step's operations, and of what it sends; 0 where a speed is not given."""
        operations = self.flops / (scale.tflops * 1e12) if scale.tflops else 0.0
        return operations, sum(seconds for _, seconds in self.sent.values())

    def bound(self, scale: Devices) -> str:
        """Say what bounds the step: memory, the network or operations."""
        operations, network = self.seconds(scale)
        if self.total > scale.memory * 1e9:
            return "memory"
        return "network" if network > operations else "operations"

    def lines(self, scale: Devices) -> list[str]:
        """Say in words what a device holds and sends."""
        b, t = self.rows
        held = {name: getattr(self, name) for name in ("weights", "gathered", "gradients", "optimizer")}
        held |= {"activations": self.activations, "logits": self.logits}
        parts = ", ".join(f"{size_text(n)}B {name}" for name, n in held.items())
        lines = [f"each of {scale.devices} devices: {size_text(self.total)}B of {scale.memory:.0f} GB ({parts})"]
        lines[0] += f", {self.passes} pass{'es' * (self.passes > 1)} of {b} x {t} positions"
        for name, (size, seconds) in self.sent.items():
            lines.append(
                f"a step sends {size_text(size)}B to {name}" + (f", {seconds_text(seconds)}" if seconds else "")
            )
        operations, network = self.seconds(scale)
        if operations and network:
            both = f"{seconds_text(operations)} of operations, {seconds_text(network)} of network"
            lines.append(f"a step: {both}, side by side in part; bound by {self.bound(scale)}")
        return lines + self.notes


def on_device(
    stage: Any,
    model: Any,
    plan: Plan,
    scale: Devices,
    parallel: ParallelConfig,
    batch: Any = None,
    needs: frozenset[str] = frozenset(),
) -> OnDevice:
    """Return what a device of many holds and sends in a stage.

    Args:
        stage: its settings.
        model: on the meta device, with the parameters that train set.
        plan: of the run.
        scale: the devices.
        parallel: how they share the model; `none`: DDP, else FSDP2.
        batch: rows of one device and pass, of `ZooProcessor.collate`; None: they are assumed.
        needs: words of the stage's distiller.

    Raises:
        ZooError: the LLM has no plan for tensor parallelism, or its heads do not divide.
    """
    found = OnDevice()
    samples, found.passes = share_of(stage, scale, found.notes)
    precision = resolve_precision(stage.precision or plan.precision, GPU)
    batch = batch if batch is not None else assumed_batch(stage, model, samples)
    set_up(model, stage, plan, GPU, precision)
    weights = _Weights(model, stage, plan, scale, parallel, precision)
    options = options_of(stage, needs)
    weights.runs_llm = options["run_llm"]
    given = {"passes": found.passes, "options": options, **weights.of_trace()}
    try:
        trace = trace_step(model, batch, precision, weights.wide, **given)
    except Exception:  # of any part that asks for numbers
        labels = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        held = by_formula(stage, model, batch, labels)
        trace = Trace(held, {"activations": held})
        found.notes.append("a part asks for numbers: activations follow from a formula, and operations are not known")
    found.rows = tuple(batch["labels"].shape)
    found.flops = trace.flops * found.passes
    weights.fill(found, trace)
    _send(found, weights, scale, model, found.rows, short=precision == "bf16", stage=stage)
    return found


def share_of(stage: Any, scale: Devices, notes: list[str]) -> tuple[int, int]:
    """Return the samples of a device's pass, and the passes of a step: as the stage has them, or as fit."""
    passes = stage.accumulate
    while passes > 1 and stage.batch_size % (scale.readers * passes):
        passes -= 1
    if stage.batch_size < scale.readers:
        notes.append(
            f"batch_size={stage.batch_size} has no sample for each of {scale.readers}: one is assumed, which is "
            f"batch_size={scale.readers}"
        )
    elif stage.batch_size % scale.readers:
        notes.append(f"batch_size={stage.batch_size} is not a multiple of {scale.readers}: it is rounded down")
    elif passes != stage.accumulate:
        notes.append(f"accumulate={passes}, since accumulate={stage.accumulate} leaves less than a sample for a pass")
    return max(1, stage.batch_size // (scale.readers * passes)), passes


class _Weights:
    """The weights of a model over devices."""

    def __init__(
        self, model: Any, stage: Any, plan: Plan, scale: Devices, parallel: ParallelConfig, precision: str
    ) -> None:
        self.scale, self.sharded = scale, parallel.shard != "none"
        self.runs_llm = True  # else its layers are not gathered
        self.wide = to_widen(model, precision) if (stage.master_weights or plan.master_weights) == "fp32" else {}
        wide = {id(p) for p in self.wide.values()}
        self.named = dict(model.named_parameters(remove_duplicate=False))
        self.first = [n for n, _ in model.named_parameters()]  # of tied weights one
        self.stored = {n: torch.float32 if id(p) in wide else p.dtype for n, p in self.named.items()}
        self.shapes = local_shapes(model, scale.tensor) if scale.tensor > 1 else {}
        self.matrices = matrices_in({"": model}) if stage.optimizer == "muon_adamw" else set()
        layers = {id(p): number for number, layer in enumerate(model.llm.layers) for p in layer.parameters()}
        self.layer_of = {n: layers[id(p)] for n, p in self.named.items() if id(p) in layers and self.sharded}
        short = self.sharded and parallel.gather != "fp32" and precision == "bf16"
        self.gathered_in = {
            n: torch.bfloat16 if short and n in self.layer_of else dtype for n, dtype in self.stored.items()
        }
        self.layers = list(model.llm.layers) if short else []
        self.reduced_in = 2 if parallel.reduce == "bf16" else 4

    def trained(self) -> list[str]:
        return [n for n in self.first if self.named[n].requires_grad]

    def numel(self, name: str) -> int:
        """Numbers of a weight on a device, before it is divided into shards."""
        return prod(self.shapes.get(name) or self.named[name].shape)

    def shard(self, name: str) -> int:
        """Numbers of the largest shard: FSDP2 divides the first dimension, rounded up."""
        if not self.sharded:
            return self.numel(name)
        shape = tuple(self.shapes.get(name) or self.named[name].shape) or (1,)
        return -(-shape[0] // self.scale.shards) * prod(shape[1:])

    def whole(self, names: Sequence[str], dtypes: Mapping[str, torch.dtype]) -> int:
        return sum(self.numel(n) * dtypes[n].itemsize for n in names)

    def units(self) -> list[list[str]]:
        """The weights of each layer."""
        found: dict[int, list[str]] = defaultdict(list)
        for name in self.first:
            if name in self.layer_of:
                found[self.layer_of[name]].append(name)
        return list(found.values())

    def run(self) -> list[list[str]]:
        """The weights of each layer that is gathered in a pass."""
        return self.units() if self.runs_llm else []

    def root(self) -> list[str]:
        return [n for n in self.first if n not in self.layer_of]

    def of_trace(self) -> dict[str, Any]:
        """How the trace is to treat them."""
        trained, units = set(self.trained()), []
        for names in self.units() if self.sharded else []:
            mine = [n for n in names if n in trained]
            share = sum(self.shard(n) * self.stored[n].itemsize for n in mine)
            units.append(Unit(mine, sum(self.numel(n) for n in mine) * self.reduced_in, share))
        return {"units": units, "dtypes": self.gathered_in, "shapes": self.shapes, "short": self.layers}

    def fill(self, found: OnDevice, trace: Trace) -> None:
        """Fill in what a device holds."""
        trained = self.trained()
        found.weights = sum(self.shard(n) * self.stored[n].itemsize for n in self.first)
        moments = {n: 1 if n in self.matrices else 2 for n in trained}
        found.optimizer = sum(self.shard(n) * self.stored[n].itemsize * moments[n] for n in trained)
        found.activations, found.logits = trace.kinds.get("activations", 0), trace.kinds.get("logits", 0)
        found.gradients = trace.kinds.get("gradients", 0)
        if not self.sharded:
            found.gradients += self.whole(trained, self.stored)  # DDP's buckets
            return
        root, mine = self.whole(self.root(), self.gathered_in), [n for n in self.root() if self.named[n].requires_grad]
        # With the largest moment of the passes: the root, a layer, and the next one as it comes.
        found.gathered = root + 2 * max((self.whole(names, self.gathered_in) for names in self.run()), default=0)
        # As the root comes it is there twice, in the buffer and in its place. At the end its gradients are there, and
        # again in the buffer in which they are reduced, beside the shares of the others; its weights are gone.
        ends = self.whole(mine, self.stored) + sum(self.numel(n) for n in mine) * self.reduced_in
        ends += sum(self.shard(n) * self.stored[n].itemsize for n in trained if n in self.layer_of)
        if max(2 * root, ends) > found.gathered + trace.most:
            found.activations = found.logits = 0
            found.gathered, found.gradients = (2 * root, 0) if 2 * root > ends else (0, ends)


def _send(
    found: OnDevice, weights: _Weights, scale: Devices, model: Any, rows: tuple[int, int], short: bool, stage: Any
) -> None:
    """Fill in what a step sends, as rings do: to gather or reduce n bytes over s devices, each sends n (s - 1) / s."""
    trained, passes = weights.trained(), found.passes

    def add(name: str, size: float, group: int, stride: int) -> None:
        if size and group > 1:
            rate = scale.rate(group, stride)
            found.sent[name] = (int(size), size / rate if rate else 0.0)

    if weights.sharded:
        part = (scale.shards - 1) / scale.shards
        layers = sum(weights.whole(names, weights.gathered_in) for names in weights.run())
        times = 2 if any(p.requires_grad for p in model.parameters()) else 1  # forward and backward
        root = weights.whole(weights.root(), weights.gathered_in)
        add("gather weights", part * passes * (times * layers + root), scale.shards, scale.tensor)
        whole = sum(weights.numel(n) for n in trained) * weights.reduced_in
        add("reduce gradients", part * passes * whole, scale.shards, scale.tensor)
        mine = sum(weights.shard(n) for n in trained) * weights.reduced_in
        r = scale.replicate
        add("reduce over copies", 2 * (r - 1) / r * passes * mine, r, scale.tensor * scale.shards)
    else:
        n = scale.readers
        whole = sum(weights.numel(name) * weights.stored[name].itemsize for name in trained)
        add("reduce gradients", 2 * (n - 1) / n * whole, n, scale.tensor)
    if scale.tensor > 1:
        t, (b, length) = scale.tensor, rows
        one = 2 * (t - 1) / t * b * length * model.llm.hidden_size * (2 if short else 4)
        # transformers sums behind each linear layer of rows, and backward in front of each one of columns: seven sums
        # of a layer of Llama, as counted on two processes (56 in four passes of two layers).
        ways = list(planned(model.llm, t).values())
        times = ways.count("rowwise") * (2 if stage.gradient_checkpointing else 1) + ways.count("colwise")
        add("sum over tensor parallel devices", one * times * passes, t, 1)


def scale_text(scale: Devices, parallel: ParallelConfig) -> str:
    """Say in words how devices share a model."""
    parts = [f"{scale.devices} devices"]
    if parallel.shard == "none":
        parts.append("a whole copy each (DDP)")
    else:
        parts.append(
            f"shards over {scale.shards} (FSDP2)" + (f", {scale.replicate} copies (HSDP)" * (scale.replicate > 1))
        )
    parts += [f"layers over {scale.tensor} (tensor parallelism)"] if scale.tensor > 1 else []
    return ", ".join(parts)


def local_shapes(model: Any, tensor: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a device's part of the LLM's layers, by the plan that transformers has for the family.

    Raises:
        ZooError: there is no plan, or heads or rows do not divide.
    """
    found = {}
    for name, way in planned(model.llm, tensor).items():
        for key, weight in model.llm.lm.get_submodule(name).named_parameters(recurse=False):
            dim = DIVIDED.get(way)
            if dim is not None and dim < weight.dim():  # a bias of rows is whole
                shape = list(weight.shape)
                shape[dim] //= tensor
                found[f"llm.lm.{name}.{key}"] = tuple(shape)
    return found
