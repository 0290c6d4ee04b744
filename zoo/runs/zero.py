"""DeepSpeed's ZeRO through accelerate: a process holds a share of AdamW's states, and of gradients, and whole weights.

Stages 0 (as DDP), 1 (states) and 2 (gradients, too). DeepSpeed's engine sums gradients over the processes, clips them
and takes the step; what a loss counts, its passes, rates and number formats stay those of the run's stage.

Paper: Rajbhandari et al., ZeRO, arXiv:1910.02054.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ZooError
from zoo.settings.parallel import ParallelConfig
from zoo.settings.stage import Stage
from zoo.storage.precision import autocast

ASKED = "ACCELERATE_USE_DEEPSPEED"
COUNT = "step"  # of AdamW's states the one that is not of a parameter's shape
BUCKET = 50_000_000  # numbers that are reduced or gathered at a time: 200 MB of float32
# Sections of DeepSpeed's config that the run's own config has in another place.
ELSEWHERE = {
    "optimizer": "stages.<stage>.optimizer",
    "scheduler": "stages.<stage>.schedule",
    "fp16": "precision",
    "bf16": "precision and master_weights",
    "amp": "precision",
    "torch_autocast": "precision",
    "activation_checkpointing": "stages.<stage>.gradient_checkpointing",
    "data_types": "precision",
}
# Those that would train something else: layers or batches divided by DeepSpeed itself, gradients that are not averaged.
ALTERING = (
    "tensor_parallel", "expert_parallel", "pipeline", "data_efficiency", "curriculum_learning", "compression_training",
    "progressive_layer_drop", "autotuning", "hybrid_engine", "gradient_allreduce_op", "managed_gradient_accumulation",
)  # fmt: skip
FULL = (
    "ZeRO stage 3 leaves weights empty behind a pass and keeps its own flat shares of them, and checkpoints, "
    "evaluations and the next stage read the weights themselves. FSDP2 shares them out in a form that all of these "
    "know: parallel.shard=fsdp2"
)


def zero_plugin(parallel: ParallelConfig) -> Any:
    """Return accelerate's plugin where the launcher of several processes asks for DeepSpeed, else None.

    Raises:
        ZooError: DeepSpeed is not installed, or its config asks for what the loop does not do.
    """
    asked = os.environ.get(ASKED, "").lower() in ("1", "true", "yes", "on") and parallel.shard == "launcher"
    if not asked or os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    for name in ("tensor", "replicate"):
        if (given := getattr(parallel, name)) > 1:
            raise ZooError(
                f"parallel.{name}={given} is for FSDP2, and the launcher asks for DeepSpeed ({ASKED}="
                f"{os.environ[ASKED]}): set parallel.shard=fsdp2, or leave parallel.{name} out."
            )
    from accelerate import DeepSpeedPlugin

    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ZooError(
            f"The launcher asks for DeepSpeed ({ASKED}={os.environ[ASKED]}), which cannot be imported ({error}): "
            "pip install deepspeed, or choose DDP or FSDP2 by parallel.shard=none or fsdp2."
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it prints each of its settings
    plugin: Any = DeepSpeedPlugin()
    require_run_by_us(plugin.deepspeed_config)
    plugin.asked = deepcopy(plugin.deepspeed_config)  # stages fill in what is theirs, each anew
    return plugin


def require_run_by_us(config: Mapping[str, Any]) -> None:
    """Refuse what a config of DeepSpeed asks for and the loop does otherwise, or not at all.

    Raises:
        ZooError: it does.
    """
    zero = config.get("zero_optimization") or {}
    if (level := zero.get("stage", 0)) not in (0, 1, 2):
        raise ZooError(f"{FULL}. DeepSpeed's config has zero_optimization.stage={level}; 0, 1 and 2 train here.")
    for name, place in ELSEWHERE.items():
        section = config.get(name)
        if isinstance(section, Mapping) and section.get("enabled", True) in (True, "true"):
            raise ZooError(f"DeepSpeed's config has {name!r}, which is {place} of the run: take it out.")
    for name in ALTERING:
        if (given := config.get(name)) not in (None, "auto", "mean", True, {}) and not (
            isinstance(given, Mapping) and given.get("enabled") in (False, "false")
        ):
            raise ZooError(f"DeepSpeed's config has {name!r}, which would train something else: take it out.")
    for name in ("offload_optimizer", "offload_param"):
        if str((zero.get(name) or {}).get("device", "none")) != "none":
            raise ZooError(
                f"DeepSpeed's config has zero_optimization.{name}: it replaces the stage's optimiser by one of its "
                "own, whose states no checkpoint here holds. Take it out, or use FSDP2 with accelerate's offloading."
            )


def use_zero(accelerator: Any, plugin: Any) -> None:
    """Choose DeepSpeed on CPUs too, where accelerate ignores the plugin and would train by DDP."""
    from accelerate.utils import DistributedType

    accelerator.state.deepspeed_plugins = plugin
    accelerator.state.distributed_type = DistributedType.DEEPSPEED


def is_zero(accelerator: Any) -> bool:
    """Whether DeepSpeed trains in these processes."""
    return accelerator.num_processes > 1 and getattr(accelerator, "deepspeed_plugin", None) is not None


class Zero:
    """A stage in DeepSpeed's engine: forward, backward, and an optimiser that looks like the stage's.

    Args:
        accelerator: of the run.
        step: the module of a pass, with all that trains.
        optimizers: of the stage.
        stage: its settings.
        precision: of its products, fp32 or bf16.

    Raises:
        ZooError: the stage has several optimisers, or DeepSpeed's config contradicts it.
    """

    def __init__(self, accelerator: Any, step: nn.Module, optimizers: list[Any], stage: Stage, precision: str) -> None:
        if len(optimizers) != 1:
            raise ZooError("DeepSpeed takes one optimiser for a stage: set optimizer=adamw, or use DDP or FSDP2.")
        (inner,) = optimizers
        plugin, world = accelerator.deepspeed_plugin, accelerator.num_processes
        asked = deepcopy(plugin.asked)
        ours = {
            "train_micro_batch_size_per_gpu": stage.batch_size // (world * stage.accumulate),
            "gradient_accumulation_steps": stage.accumulate,
            "train_batch_size": stage.batch_size,
            "gradient_clipping": float(stage.clip),
        }
        for name, value in ours.items():
            if (given := asked.get(name, "auto")) not in ("auto", None, value):
                raise ZooError(
                    f"DeepSpeed's config has {name}={given}, the stage needs {value}: leave it out, or auto."
                )
        zero = {k: v for k, v in (asked.get("zero_optimization") or {}).items() if v != "auto"}
        trained = sum(p.numel() for p in step.parameters() if p.requires_grad)
        for name in ("reduce_bucket_size", "allgather_bucket_size"):
            zero.setdefault(name, min(BUCKET, trained + trained % 2))  # DeepSpeed wants an even one
        zero["overlap_comm"] = False  # see `reduce_in_order`
        plugin.deepspeed_config.clear()
        plugin.deepspeed_config.update({**asked, **ours, "zero_optimization": zero, "steps_per_print": 10**9})
        accelerator.gradient_accumulation_steps = stage.accumulate
        self.optimizer = ZeroOptimizer(inner)
        self.engine, _ = accelerator.prepare(_Within(step, precision, accelerator.device), inner)
        self.optimizer.engine = self.engine
        if self.optimizer.zero is not None:
            reduce_in_order(self.optimizer.zero)

    def __call__(self, *args: Any, last: bool) -> Any:
        """Run a pass; `last`: the optimiser steps behind it."""
        self.engine.set_gradient_accumulation_boundary(last)
        return self.engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Add up gradients of a loss that is divided by the counts of its step already."""
        self.engine.backward(loss, scale_wrt_gas=False)


def reduce_in_order(zero: Any) -> None:
    """Let DeepSpeed's optimiser reduce the gradients of a pass in one order, all of them, in every process.

    It fills buckets in the order in which gradients arise, and leaves out weights that have none. Both depend on the
    batch (one of text alone, in one of the processes), and buckets of unlike content were added up.
    """

    def filled() -> None:
        for group in zero.bit16_groups:
            for parameter in group:
                if zero.get_gradient_for_reduction(parameter) is None:
                    parameter.grad = torch.zeros_like(parameter)
        if zero.use_grad_accum_attribute:  # of weights of 16 bits in stage 1
            zero.fill_grad_accum_attribute()

    if not zero.partition_gradients:  # stage 1, which goes through all weights behind the last pass
        reduce = zero.reduce_gradients

        def all_of_a_step(**options: Any) -> None:
            filled()
            reduce(**options)

        zero.reduce_gradients = all_of_a_step
        return
    take, finish = zero.process_gradients, zero.overlapping_partition_gradients_reduce_epilogue

    def all_of_a_pass() -> None:
        filled()
        for number, group in enumerate(zero.bit16_groups):
            for parameter in group:
                take(parameter, number)
        finish()

    zero.process_gradients = lambda *_: None  # called as each gradient arises
    zero.overlapping_partition_gradients_reduce_epilogue = all_of_a_pass


class _Within(nn.Module):
    """A pass in the number format of the stage: DeepSpeed's engine turns autocast off that is not of its config."""

    def __init__(self, step: nn.Module, precision: str, device: torch.device) -> None:
        super().__init__()
        self.step, self.precision, self.device = step, precision, device

    def forward(self, *args: Any) -> Any:
        with autocast(self.precision, self.device):
            return self.step(*args)


class ZeroOptimizer:
    """The stage's optimiser as checkpoints and schedules see it: by parameter, whole, whatever each process holds.

    Args:
        inner: the stage's optimiser, whose parameters DeepSpeed replaces by flat shares.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.engine: Any = None
        self.param_groups = [dict(group) for group in inner.param_groups]  # with the parameters as they were

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimiser of shares; None: the stage's own works on whole parameters."""
        found = self.engine.optimizer
        return found if hasattr(found, "single_partition_of_fp32_groups") else None

    def step(self) -> None:
        """Clip, step and clear gradients, in the engine."""
        for mine, group in zip(self.param_groups, self.inner.param_groups, strict=True):
            group |= {k: v for k, v in mine.items() if k != "params"}
        if self.zero is not None:  # adapters and checkpoints change weights, of which DeepSpeed has float32 copies
            self.zero.refresh_fp32_params()
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing is left by the engine's step."""

    @property
    def state(self) -> Mapping[Any, dict[str, Tensor]]:
        """State by parameter, whole; all processes ask for it together."""
        if self.zero is None:
            return self.inner.state  # type: ignore[no-any-return]
        return dict(self._gathered())

    def _gathered(self) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_get_full_optimizer_state

        for group, flat in zip(self.param_groups, self.zero.single_partition_of_fp32_groups, strict=True):
            own = self.inner.state.get(flat, {})
            # Behind the step of the first group DeepSpeed (0.19) links the states of all, which the others do not have.
            lazy_init_hp_params_optimizer_state(group["params"], flat, self.inner.state)
            for parameter in group["params"] if own else ():
                shared = {key: safe_get_full_optimizer_state(parameter, key) for key in own if key != COUNT}
                yield parameter, {COUNT: own[COUNT].clone(), **shared}

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint, by parameter and whole."""
        for mine, group in zip(self.param_groups, stored["param_groups"], strict=True):
            mine |= {k: v for k, v in group.items() if k != "params"}
        if self.zero is None:
            self.inner.load_state_dict(stored)
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

        parameters = [p for group in self.param_groups for p in group["params"]]
        states = {parameters[index]: state for index, state in stored["state"].items()}
        for group, flat in zip(self.param_groups, self.zero.single_partition_of_fp32_groups, strict=True):
            first = states.get(group["params"][0], {})
            self.inner.state[flat] = {k: v if k == COUNT else torch.zeros_like(flat) for k, v in first.items()}
            lazy_init_hp_params_optimizer_state(group["params"], flat, self.inner.state)
        for parameter, state in states.items():
            for key, value in state.items():
                if key != COUNT:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
