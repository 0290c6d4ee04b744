"""What `zoo bench processes` trains: each adapter and each distiller in a tiny model, in this process or in several.

The forward passes of a step are the same on any number of processes: with fewer, each runs more of them.
"""

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zoo.composed.assembly import build_distiller
from zoo.composed.model import ZooModel
from zoo.loading.build import processor_for
from zoo.model_config import ZooConfig
from zoo.registry import Dialog, Sample
from zoo.runs.processes import start_accelerator
from zoo.runs.sharding import gathers_short, shard_layers
from zoo.runs.tensor_parallel import reader_of
from zoo.settings.parallel import ParallelConfig
from zoo.settings.stage import Stage
from zoo.storage.weights import state_of
from zoo.teaching.teacher import Teacher, TeacherRows
from zoo.text.tokenizer import train_tokenizer
from zoo.training.step import Engine, reseed

PASSES = 4  # of a step, over all processes
_TOWER = {"name": "timm", "image_size": 32, "patch_size": 8, "width": 32, "heads": 2, "depth": 2, "layer": -1}
_LLM = {"name": "hf", "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
_LLM |= {"max_positions": 256}
_WORDS = [("is there a red circle?", "yes, on the left"), ("what is it?", "a blue square"), ("how many?", "two")]


@dataclass(frozen=True)
class Composition:
    """A model and a stage, as they differ from a tiny LLaVA whose projector and adapters train."""

    slots: dict[str, Any] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)
    train: tuple[str, ...] = ("projector", "adapter")
    stage: dict[str, Any] = field(default_factory=dict)
    distiller: dict[str, Any] | None = None
    teacher: bool = False
    bfloat16: bool = False


def _adapter(name: str, **options: Any) -> Composition:
    return Composition({"adapter": {name: {"name": name, **options}}})


def _native(family: str) -> Composition:
    """Images that keep their shapes; Qwen3-VL with features for three layers."""
    three = family.startswith("qwen3")
    extra: dict[str, Any] = {"window_size": 16} if family == "qwen2_5_vl" else {}
    vision = {"name": "qwen_vision", "model_type": family, "width": 32, "heads": 2, "depth": 4, "patch_size": 4}
    vision |= {"min_pixels": 64, "max_pixels": 1024, "extra": {"num_position_embeddings": 16} if three else extra}
    llm = {"model_type": f"{family}_text", "num_layers": 3}
    llm |= {"num_experts": 4, "top_k": 2} if family.endswith("moe") else {}
    slots = {"vision": vision, "projector": {"name": "identity"}, "layout": {"name": "native"}}
    return Composition(slots, llm=llm, train=("vision", "llm"))


def _peft(method: str, **options: Any) -> Composition:
    return _adapter("peft", method=method, options=options)


_EXPERTS = {"model_type": "mixtral", "num_experts": 4, "top_k": 2}
_VLORA = {"name": "vlora", "rank": 4, "skip": 1, "width": 16, "depth": 2, "num_heads": 2}
_ALL = ("projector", "llm")
PEFT: dict[str, dict[str, Any]] = {  # method -> options of a size for tiny models
    "boft": {"boft_block_size": 4},
    "dora": {"r": 4},
    "fourierft": {"n_frequency": 20},
    "ia3": {"target_modules": ["k_proj", "o_proj"], "feedforward_modules": ["o_proj"]},
    "ln_tuning": {"target_modules": ["input_layernorm"]},
    "loha": {"r": 2},
    "lokr": {"r": 2},
    "oft": {"oft_block_size": 4},
    "pissa": {"r": 4},
    "rslora": {"r": 4, "target_modules": "all-linear"},
    "vera": {"r": 4},
}
COMPOSITIONS: dict[str, Composition] = {
    "no adapter": Composition(train=_ALL),
    "no adapter, Muon": Composition(train=_ALL, stage={"optimizer": "muon_adamw"}),
    "qwen2": Composition(llm={"model_type": "qwen2"}, train=_ALL),
    "qwen3": Composition(llm={"model_type": "qwen3"}, train=_ALL),
    "experts": Composition(llm={**_EXPERTS, "router_aux_coef": 0.01}, train=_ALL),
    "lora": _adapter("lora", rank=4),
    "mole": _adapter("mole", rank=4, dropout=0.0),
    "moextend": replace(_adapter("moextend", calibration_width=4, guard=True), llm=_EXPERTS),
    "upcycle": _adapter("upcycle"),
    "vlora": Composition({"projector": None, "adapter": {"vlora": _VLORA}}, train=("adapter",)),
    **{f"peft {method}": _peft(method, **options) for method, options in PEFT.items()},
    "dense": Composition(
        train=("vision", "projector"), distiller={"name": "dense"}, stage={"loss_weights": {"answer": 0.0}}
    ),
    "kl": Composition(train=_ALL, distiller={"name": "kl"}, teacher=True),
    "llava_kd": Composition(train=_ALL, distiller={"name": "llava_kd"}, teacher=True),
    "llava_mod": Composition(train=_ALL, distiller={"name": "llava_mod"}, teacher=True),
    "native": _native("qwen3_vl"),
    **{f"native, {name}": _native(name) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl_moe")},
    "masters, bf16": Composition(train=_ALL, bfloat16=True, stage={"precision": "bf16"}),
}
DIVISIBLE = ("no adapter", "qwen2", "qwen3", "dense", "kl", "llava_kd", "llava_mod")  # by tensor parallelism
QUICK = ("mole", "vlora", "dense", "llava_kd", "native")  # in the tests


@dataclass
class Trained:
    """Losses of the steps, the weights behind them, and why DDP searched for unused ones."""

    losses: list[float]
    weights: dict[str, Tensor]
    unused: str = ""
    moved: dict[str, int] = field(default_factory=dict)  # bytes that a step moves, by kind
    gradients: int = 0  # bytes of gradients that a process holds behind the passes ahead of the last one

    def save(self, file: Path) -> None:
        torch.save([self.losses, self.weights, self.unused, self.moved, self.gradients], file)

    @classmethod
    def load(cls, file: Path) -> "Trained":
        return cls(*torch.load(file, weights_only=True))


def train(name: str, steps: int, parallel: ParallelConfig) -> Trained:
    """Train a composition in the processes that there are; each of them gets the losses and the whole weights."""
    this = COMPOSITIONS[name]
    accelerator = start_accelerator("cpu", parallel)
    tokenizer = train_tokenizer([f"{q} {a}" for q, a in _WORDS], 320)
    model, processor = _model(this, tokenizer, seed=0)
    (rank, world), every = reader_of(accelerator), accelerator.num_processes
    size: dict[str, Any] = {"batch_size": 2 * PASSES, "accumulate": PASSES // world}
    stage = Stage(steps=steps, train=list(this.train), lr=3e-4, warmup_ratio=0.0, **size, **this.stage)
    reseed(0, 0, -2)
    distiller = None if this.distiller is None else build_distiller(model, this.distiller)
    teacher = beside = None
    if this.teacher:
        taught_by, theirs = _model(Composition(), tokenizer, seed=5)
        if getattr(accelerator, "is_fsdp2", False):
            shard_layers(accelerator, taught_by)
        assert distiller is not None, "a teacher has one"
        teacher, beside = Teacher(taught_by, distiller.needs, len(tokenizer)), TeacherRows(theirs, processor)
    engine = Engine(
        accelerator, model, stage, steps, precision="fp32", distiller=distiller, teacher=teacher, parallel=parallel,
        gather_short=gathers_short(parallel, [stage.precision or "fp32"]),
    )  # fmt: skip
    losses = []
    for step in range(steps):
        turns = range(rank, PASSES, world)
        batches = [_batch(processor, beside, step, turn, text=engine.run_llm) for turn in turns]
        with Moved() as moved, _gradients(engine) as held:
            found, _ = engine.run(step, step, batches, False)
        losses.append(_mean(engine.unwrapped.total(found), every))
    weights = {n: t.clone() for n, t in state_of(model).items()}
    return Trained(losses, weights, engine.unused or "", moved.bytes, max(held, default=0))


class Moved(TorchDispatchMode):
    """Adds up what collective operations give this process, by their kind."""

    KINDS: ClassVar = {"allgather": "gathered", "reduce_scatter": "reduced", "allreduce": "reduced", "alltoall": "sent"}

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = next((k for word, k in self.KINDS.items() if word in func.__name__), "")
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if kind and tensors:  # the whole of a gather or a reduction is its larger side
                self.bytes[kind] = self.bytes.get(kind, 0) + max(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


@contextmanager
def _gradients(engine: Engine) -> Iterator[list[int]]:
    """Note the bytes of gradients that this process holds at the beginning of each pass."""
    held: list[int] = []

    def note(*_: Any) -> None:
        own = (p for o in engine.optimizers for g in o.param_groups for p in g["params"] if p.grad is not None)
        whole = sum((g._local_tensor if hasattr(g := p.grad, "_local_tensor") else g).nbytes for p in own)
        units = [m._get_fsdp_state() for m in engine.model.modules() if hasattr(m, "_get_fsdp_state")]
        params = (p for unit in units for group in unit._fsdp_param_groups for p in group.fsdp_params)
        whole += sum(p.unsharded_accumulated_grad.nbytes for p in params if p.unsharded_accumulated_grad is not None)
        held.append(whole)

    handle = engine.unwrapped.register_forward_pre_hook(note)
    try:
        yield held
    finally:
        handle.remove()


def differences(this: Trained, one: Trained) -> tuple[float, float]:
    """Return the largest difference of a step's loss, as a share of it, and of a weight, to those of one process."""
    losses = [abs(a - b) / max(1.0, abs(b)) for a, b in zip(this.losses, one.losses, strict=True)]
    wide = {name: weight for name, weight in one.weights.items() if weight.is_floating_point()}
    pairs = ((with_gradient(n, this.weights[n].double()), with_gradient(n, w.double())) for n, w in wide.items())
    return max(losses), max((a - b).abs().max().item() for a, b in pairs)


def with_gradient(name: str, weight: Tensor) -> Tensor:
    """Leave out the bias of keys in torch's attention, the middle third of its biases.

    It adds the same to all scores of a query, which softmax takes away: its gradient is rounding alone, of which AdamW
    makes a step of the learning rate's size, in another direction on other processes.
    """
    if not name.endswith("in_proj_bias"):
        return weight
    query, _, value = weight.chunk(3)
    return torch.cat([query, value])


def work(rank: int, world: int, port: int, folder: str, names: Sequence[str], steps: int, how: ParallelConfig) -> None:
    """Train compositions as process `rank` of `world`; the first one writes what came of each."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    for name in names:
        found = train(name, steps, how)
        if rank == 0:
            found.save(Path(folder) / f"{file_name(name)}.pt")
    import gc

    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def start(world: int, folder: Path, names: Iterable[str], steps: int, how: ParallelConfig, context: Any) -> list[Any]:
    """Start the processes of `work`, and return them."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    arguments = (world, port, str(folder), list(names), steps, how)
    children = [context.Process(target=work, args=(rank, *arguments)) for rank in range(world)]
    for child in children:
        child.start()
    return children


def file_name(composition: str) -> str:
    """Return the name of the file of a composition, without its ending."""
    return composition.replace(" ", "-").replace(",", "")


def _mean(loss: Tensor, world: int) -> float:
    """Return the loss of a step over all processes, each of which divided by its share of the counts."""
    loss = loss.detach().double()
    if world > 1:
        torch.distributed.all_reduce(loss)
        loss /= world
    return float(loss)


def _model(this: Composition, tokenizer: Any, seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    slots = {"vision": _TOWER, "pruner": {}, "projector": {"name": "mlp"}, "layout": None, "adapter": {}}
    slots |= {"llm": {**_LLM, **this.llm}, **this.slots}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids = {"image_token_id": tokenizer.image_token_id, "text_vocab_size": len(tokenizer)}
    model = ZooModel(ZooConfig(slots=slots, attention="sdpa", **ids, **special)).eval()
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.part_of(name).startswith("adapter"):  # a zero that they begin with hides mistakes
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=g))
        for adapter in model.adapter.values():
            for layer in getattr(adapter, "layers", {}).values():
                if getattr(getattr(layer, "router", None), "bias", None) is not None:
                    layer.router.bias[0] = -100.0  # an expert without tokens, in every process
    if this.bfloat16:
        model.to(torch.bfloat16)
    return model, processor_for(model, tokenizer)


def _batch(processor: Any, beside: Any, step: int, turn: int, *, text: bool) -> dict[str, Any]:
    """Two samples; every fourth pass is of text alone, so that one process has no image."""
    rows: list[Any] = []
    for i in range(2):
        unlike = processor.layout is not None and processor.layout.native
        sample = _sample(PASSES * 2 * step + 2 * turn + i, int(turn % 4 != 1 or not text), unlike)
        row = processor.encode(sample) if text else processor.encode_images(sample)
        rows += [row] if beside is None else beside.add(sample, [sample], [row])
    return processor.collate(rows)


def _sample(number: int, images: int, unlike: bool = False) -> Sample:
    question, answer = _WORDS[number % len(_WORDS)]
    random = np.random.default_rng(number)
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    dialog = Dialog(
        [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    )
    sides = random.integers(8, 60, 2).tolist() if unlike else (32, 32)
    picture = random.integers(0, 256, (*sides, 3), dtype=np.uint8)
    labels = random.integers(0, 3, (images, 16, 7))  # of each cell, as `dense` reads them
    return Sample(f"s{number}", [picture] * images, [dialog], {"patch_labels": labels} if images else {})
