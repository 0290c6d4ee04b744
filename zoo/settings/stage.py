"""One stage of a recipe: trained parts, data, length, optimiser, losses. Plain values, without torch.

A recipe is a dict of named stages that run one after the other; each starts with a new optimiser on the weights of the
previous stage. `batch_size` counts the samples of one optimiser step over all processes and forward passes, so that a
recipe trains the same model with one process and with eight.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from zoo.registry import ZooError, unknown
from zoo.registry.devices import require_device

OPTIMIZERS = ("muon_adamw", "adamw")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("", "auto", "fp32", "bf16")
MASTER_WEIGHTS = ("", "fp32", "none")
PACKS = ("dialogs", "none")
TOO_LONG = ("refuse", "cut")
_DTYPES = ("", "float32", "bfloat16", "float16")
# Options of a teacher, and their defaults.
TEACHER: dict[str, Any] = {
    "model": "",  # as in `model=`
    "options": [],  # further options of it, as on the command line: ["pruner=null"]
    "dtype": "",  # of its weights: float32, bfloat16, float16; empty: bfloat16 in bf16 stages, else as saved
    "device": "",  # empty: that of the run
    "attention": "auto",
    "bits": 0,  # 8 or 4: quantize the weights of its decoder; 0: do not
    "shard": True,  # where FSDP2 shares the student out, its decoder layers too; not with bits or a device of its own
    "store": "",  # folder of `zoo teach`, instead of a model
}


@dataclass
class Stage:
    # What trains
    train: list[str] = field(default_factory=lambda: ["all"])  # parts (vision, adapter.lora, ..., all) or globs
    freeze: list[str] = field(default_factory=list)  # parts or globs excluded from `train`
    # Adapters without effect in this stage; one that copies base weights, as upcycle, copies them when it is attached
    detach: list[str] = field(default_factory=list)
    # Data and length
    data: dict[str, float] = field(default_factory=dict)  # data name -> weight in the mix; empty: all samples equally
    steps: int | None = None  # optimiser steps; give this or `epochs`
    epochs: float | None = None  # passes over the data; give this or `steps`
    batch_size: int = 16  # samples of one optimiser step, over all processes and forward passes
    accumulate: int = 1  # forward passes per optimiser step and process
    pack: str = "dialogs"  # dialogs: those of a sample share its images in one sequence; none: one sequence for each
    pack_length: int | None = None  # maximum tokens of a row that several samples share; null: a row for each sample
    length_buckets: bool = False  # batch samples of similar length, to reduce padding
    balance: bool = False  # deal samples by cost, so that no process waits; each process reads all records of a step
    workers: int = 0  # processes that read data; 0: one thread, best for small images
    skip_broken: bool | None = None  # leave out broken records, and list them; null: as the run
    max_length: int | None = None  # tokens of a dialog, its images included; null: the LLM's positions
    too_long: str = "refuse"  # refuse: such a record is broken | cut: remove the text behind the last position
    # Optimiser
    optimizer: str = "adamw"  # adamw, or muon_adamw: Muon on the matrices, AdamW on the rest
    lr: float = 1e-3  # peak learning rate of AdamW
    matrix_lr: float = 0.02  # peak learning rate of Muon
    momentum: float = 0.95  # of Muon
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])  # of AdamW
    weight_decay: float = 0.01  # decoupled; not on norms, biases and embeddings
    clip: float = 1.0  # maximum norm of the gradient of AdamW's parameters; 0: no clipping
    lr_scale: dict[str, float] = field(default_factory=dict)  # part or glob -> factor on its learning rate
    schedule: str = "linear"  # constant | linear | cosine: how the rate falls after the flat part
    warmup_ratio: float = 0.03  # share of the steps over which the rate rises from 0
    flat_ratio: float = 0.0  # share of the steps, warm-up included, before the rate falls
    final_ratio: float = 0.0  # rate at the end as a share of the peak
    # Image tokens
    # Shares, [least, greatest]: each row draws one, and the LLM attends to as many of its image tokens; empty: to all
    keep_range: list[float] = field(default_factory=list)
    # Losses
    loss_weights: dict[str, float] = field(default_factory=dict)  # loss -> weight, else 1; answer: 0 skips the LLM
    allow_nonfinite: bool = False  # continue if a loss is NaN or infinite; else the run stops, with its last checkpoint
    distiller: Any = None  # null, the name of a distiller, or {name: ..., options}
    teacher: Any = ""  # model name, as in `model=`; {store: folder} of `zoo teach`; {model:, ...}; empty: none
    # Speed and memory
    precision: str = ""  # auto | fp32 | bf16; empty: as the run
    master_weights: str = ""  # of weights in 16 bits that train: fp32 | none, they train as they are; empty: as the run
    compile: bool = False  # torch.compile; pays after a few hundred steps
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    # Intervals, in optimiser steps
    checkpoint_every: int = 500  # 0: only at the end of the stage
    eval_every: int = 0  # scores 100 samples of each data set; 0: only at the end of the run

    def __post_init__(self) -> None:
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("master_weights", self.master_weights, MASTER_WEIGHTS)
        _one_of("pack", self.pack, PACKS)
        _one_of("too_long", self.too_long, TOO_LONG)
        if (self.steps is None) == (self.epochs is None):
            raise ZooError(f"A stage needs either steps or epochs, got steps={self.steps} and epochs={self.epochs}.")
        if not self.train:
            raise ZooError("A stage must train something: 'train' is empty. Allowed: parts, globs, or [all].")
        if self.distiller is not None and not (
            isinstance(self.distiller, str) or (hasattr(self.distiller, "keys") and "name" in self.distiller)
        ):
            raise ZooError(f"A distiller is a name or a mapping with a `name`, got {self.distiller!r}.")
        _check_teacher(self.teacher)
        if self.too_long == "cut" and self.teacher:
            raise ZooError(
                "too_long=cut would cut the answers of student and teacher differently: with a teacher, set "
                "too_long=refuse and skip_broken=true, which leave long records out."
            )
        self._check_counts()
        self._check_numbers()

    def _check_counts(self) -> None:
        for name in ("batch_size", "accumulate"):
            _at_least(name, getattr(self, name), 1)
        for name in ("steps", "pack_length", "max_length"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        for name in ("workers", "checkpoint_every", "eval_every"):
            _at_least(name, getattr(self, name), 0)
        if self.batch_size % self.accumulate:
            raise ZooError(
                f"batch_size={self.batch_size} does not split evenly into accumulate={self.accumulate} passes."
            )
        if self.pack == "none" and self.pack_length is not None:
            raise ZooError("pack_length puts several samples into a row: it needs pack=dialogs, got pack=none.")

    def _check_numbers(self) -> None:
        if self.epochs is not None and not 0 < self.epochs < inf:
            raise ZooError(f"epochs must be more than 0 and finite, got {self.epochs}.")
        for name in ("lr", "matrix_lr", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < inf:
                raise ZooError(f"{name} must be at least 0 and finite, got {getattr(self, name)}.")
        for name in ("warmup_ratio", "flat_ratio", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ZooError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if self.keep_range and not (len(self.keep_range) == 2 and 0 < self.keep_range[0] <= self.keep_range[1] <= 1):
            raise ZooError(f"keep_range must be two shares in (0, 1], the lower first, got {list(self.keep_range)}.")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ZooError(f"betas must be two numbers in [0, 1), got {list(self.betas)}.")
        if not 0 <= self.momentum < 1:
            raise ZooError(f"momentum must be in [0, 1), got {self.momentum}.")
        for name in ("data", "lr_scale", "loss_weights"):
            if low := {k: v for k, v in getattr(self, name).items() if not 0 <= v < inf}:
                raise ZooError(f"Values of {name} must be at least 0 and finite, got {low}.")
        if self.data and not any(self.data.values()):
            raise ZooError(f"The mix has no data: all weights are 0 in {dict(self.data)}.")

    @property
    def distiller_node(self) -> dict[str, Any] | None:
        """The distiller as a config node, or None."""
        if self.distiller is None:
            return None
        return {"name": self.distiller} if isinstance(self.distiller, str) else dict(self.distiller)

    def runs_llm(self, needs: Iterable[str] = ()) -> bool:
        """Whether passes run the LLM: for answers, or for what a distiller with these needs compares."""
        inside = any(n.startswith("teacher.") or n in ("student.hidden", "student.logits") for n in needs)
        return self.loss_weights.get("answer", 1.0) > 0 or inside

    @property
    def teacher_node(self) -> dict[str, Any] | None:
        """The teacher as a mapping with all of `TEACHER`, or None."""
        if not self.teacher:
            return None
        given = {"model": self.teacher} if isinstance(self.teacher, str) else dict(self.teacher)
        return TEACHER | given


def stages_of(cfg: Any) -> dict[str, Any]:
    """Return the stages of a composed config, by name, with the run's `skip_broken` where a stage does not set it."""
    from omegaconf import OmegaConf

    stages: dict[str, Any] = {str(name): OmegaConf.to_object(node) for name, node in cfg.stages.items()}
    for stage in stages.values():
        stage.skip_broken = cfg.skip_broken if stage.skip_broken is None else stage.skip_broken
    return stages


def _check_teacher(given: Any) -> None:
    if not given or isinstance(given, str):
        return
    if not hasattr(given, "keys"):
        raise ZooError(f"A teacher is a model's name or a mapping with `model` or `store`, got {given!r}.")
    for key in given:
        if key not in TEACHER:
            raise unknown("option of a teacher", str(key), TEACHER)
    if given.get("bits", 0) not in (0, 4, 8):
        raise ZooError(f"A teacher's bits are 8, 4 or 0 (not quantized), got {given['bits']!r}.")
    if given.get("dtype") not in (None, *_DTYPES):
        raise unknown("dtype of a teacher", str(given["dtype"]), _DTYPES[1:])
    require_device(given.get("device") or None, "device of a teacher")
    if not isinstance(given.get("shard", True), bool):
        raise ZooError(f"A teacher's shard is true or false, got {given['shard']!r}.")
    if bool(given.get("model")) == bool(given.get("store")):
        raise ZooError("A teacher is either a model (model: NAME) or a store of zoo teach (store: FOLDER): give one.")


def _one_of(field_name: str, given: str, allowed: Iterable[str]) -> None:
    if given not in allowed:
        raise unknown(field_name, given, [a for a in allowed if a])


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ZooError(f"{name} must be at least {least}, got {value}.")
