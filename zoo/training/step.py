"""One optimiser step of a stage: forward passes, weighted losses, gradients over all processes, optimisers.

The answer loss is a mean over all labels of the step, in every pass and process, so that accumulation and the number of
processes change only the speed. The same holds for losses that a distiller names in `per_label`; those in `per_image`
are means over all images. Other losses are means over forward passes.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from zoo.composed.masters import widen
from zoo.composed.outputs import LOSS_ALONE, DistillView
from zoo.registry import IGNORE_INDEX, Distiller, ZooError, unknown
from zoo.runs.checkpoint import tensors_of
from zoo.runs.kept_features import KeptFeatures
from zoo.runs.optim import build_optimizers, parts_of, rate_at, set_rate
from zoo.runs.order import keyed
from zoo.runs.processes import launcher_alone
from zoo.runs.sharding import is_sharded, require_one_format, shard, shard_like
from zoo.runs.tensor_parallel import clip_gradients, reader_of, tensor_size
from zoo.runs.zero import Zero, is_zero
from zoo.settings.parallel import ParallelConfig
from zoo.settings.stage import Stage
from zoo.storage.precision import autocast, resolve_precision
from zoo.teaching.teacher import Teacher, forward_options
from zoo.text.batch import TEACHER_ROWS, to_device
from zoo.training.hidden_tokens import hide_image_tokens
from zoo.training.short_weights import ShortWeights, release
from zoo.training.unused import require_gradients, why_unused
from zoo.vision.images.processors import FEATURES

NOTHING = "nothing"  # name of the loss of a pass that has none; not logged


@dataclass
class Counts:
    """Denominators of the losses of a step: its labels, images and passes, divided by the number of processes."""

    labels: float
    images: float
    passes: float = 1.0


class TrainStep(nn.Module):
    """Model, distiller and the sum of their losses as one module, so that DDP averages every trained parameter."""

    def __init__(self, model: Any, distiller: Distiller | None, teacher: Any, stage: Stage) -> None:
        super().__init__()
        self.model = model
        self.distiller = distiller
        self.teacher = teacher  # not an nn.Module, so that it is neither trained nor saved nor sharded with the student
        self.features: KeptFeatures | None = None  # of a frozen encoder, where the run keeps them
        self.loss_weights = dict(stage.loss_weights)
        self.keep_range = stage.keep_range
        needs: frozenset[str] = frozenset() if distiller is None else distiller.needs
        # What the encoder gives in this stage alone; see `Engine.release`.
        self.asked = frozenset({"prefix_tokens"} if "student.prefix" in needs else ()) - model.requested
        model.requested |= self.asked
        # A stage that trains an encoder on dense targets alone skips the LLM, and its batches have no text.
        self.run_llm = stage.runs_llm(needs)
        self.student_options = LOSS_ALONE | ({} if distiller is None else forward_options(needs, "student"))
        if stage.loss_weights.get("answer", 1.0) == 0 and not self.student_options["all_logits"]:
            self.student_options["run_head"] = False  # the vocabulary's logits are the largest tensor of a pass
        self.runs_head = self.student_options.get("run_head", True)
        if isinstance(teacher, Teacher):
            teacher.share_vision(model)

    def forward(self, batch: Mapping[str, Any], counts: Counts) -> dict[str, Tensor]:
        """Return the unweighted losses of one forward pass by name.

        Args:
            batch: of `ZooProcessor.collate`, on this device.
            counts: denominators of the losses over labels and over images.
        """
        own = {key: value for key, value in batch.items() if key != TEACHER_ROWS}
        if self.keep_range and count_images(own):
            slots = self.model._placeholders(own["input_ids"])
            own["attention_mask"] = hide_image_tokens(own["attention_mask"], slots, self.keep_range)
        if self.features is not None:
            own = self.features.fill(own)
        out = self.model(**own, num_items_in_batch=counts.labels, run_llm=self.run_llm, **self.student_options)
        losses = dict(out.losses or {})
        if self.distiller is not None:
            seen = None if self.teacher is None else self.teacher.outputs_for(batch, out)
            # Distillers sum over the tokens of one pass; they divide by the counts of the whole step.
            numbers = {"num_labels": counts.labels, "num_images": counts.images}
            if self.teacher is not None and self.teacher.vocab_size:
                numbers["vocab_size"] = self.teacher.vocab_size
            given = self.distiller(DistillView(out, self.model.llm), seen, {**own, **numbers})
            losses |= _as_losses(given, losses)
            if not losses and not count_images(batch):  # a text alone, where all losses are of images
                losses = self._nothing(out)
        return losses

    def _nothing(self, out: Any) -> dict[str, Tensor]:
        """Return a loss of 0 that reaches all that trains, for which other processes may wait."""
        reached = [p for p in self.parameters() if p.requires_grad and not hasattr(p, "full_tensor")]
        reached += [] if out.last_hidden_state is None else [out.last_hidden_state]
        return {NOTHING: torch.stack([x.sum(dtype=torch.float32) for x in reached]).sum() * 0.0} if reached else {}

    @property
    def weights(self) -> dict[str, float]:
        """Loss weights other than 1: those of the stage, times those of the distiller at this step."""
        own = weights_of(self.distiller)
        return {n: self.loss_weights.get(n, 1.0) * own.get(n, 1.0) for n in [*self.loss_weights, *own]}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Sum the losses, weighted."""
        weights = self.weights
        weighted = [weights.get(name, 1.0) * value for name, value in losses.items()]
        if not weighted:
            raise ZooError("The stage has no loss: the answer loss has weight 0 and no distiller gives another.")
        # Summed in float32: terms of 1e-3 beside one of 10 would be rounded away in bfloat16.
        return torch.stack([w.float() for w in weighted]).sum()


class Engine:
    """The state of one stage on the device: trained parameters, optimisers, precision, wrapped modules.

    Args:
        accelerator: of the run.
        model: the composed model; only parameters that the stage trains will require a gradient.
        stage: its settings.
        steps: optimiser steps of the stage.
        seed: of the run.
        precision, master_weights: of the run; used if the stage does not set them.
        parallel: how processes share the model, with FSDP2.
        gather_short: whether FSDP2 gathers layers in bfloat16.
    """

    def __init__(
        self,
        accelerator: Any,
        model: Any,
        stage: Stage,
        steps: int,
        *,
        seed: int = 0,
        precision: str = "auto",
        master_weights: str = "fp32",
        distiller: Distiller | None = None,
        teacher: Any = None,
        parallel: ParallelConfig | None = None,
        gather_short: bool = False,
    ) -> None:
        accelerator.free_memory()  # releases the model wrapped by the previous stage
        self.accelerator, self.model, self.stage, self.steps, self.seed = accelerator, model, stage, steps, seed
        self.distiller, self.device = distiller, accelerator.device
        # Before set_trainable: attaching wraps layers, and so changes the names that `train` and `freeze` match.
        model.detach_only(list(stage.detach))
        self.trainable = model.set_trainable(list(stage.train), list(stage.freeze))  # numbers by part
        self.precision = resolve_precision(stage.precision or precision, self.device)
        if (stage.master_weights or master_weights) == "fp32":
            widen(model, self.precision)
        self.resume_training()
        if distiller is not None:
            distiller.to(self.device) if isinstance(distiller, nn.Module) else None
        step = TrainStep(model, distiller, teacher, stage)
        # FSDP2 replaces parameters by sharded ones, so it comes before the optimisers are built.
        if getattr(accelerator, "is_fsdp2", False):
            shard(accelerator, model, parallel or ParallelConfig(), short=gather_short)
            require_one_format(model)
        self.sharded, self.tensor = is_sharded(model), tensor_size(accelerator)
        if self.sharded and isinstance(distiller, nn.Module):
            shard_like(distiller, accelerator)
        self.unused = why_unused(model, stage, distiller, run_llm=step.run_llm, run_head=step.runs_head)
        zero = is_zero(accelerator)
        if accelerator.ddp_handler is not None:
            accelerator.ddp_handler.find_unused_parameters = self.unused is not None
        with launcher_alone():
            # DDP wraps it to average gradients; FSDP has sharded the model in place above, and DeepSpeed comes below.
            self.wrapped: Any = step if self.sharded or zero else accelerator.prepare_model(step)
        self.unwrapped, self.run_llm = step, step.run_llm
        self.unseen = set(stage.loss_weights)  # weights whose loss has not occurred yet; see `_expect`
        self.summed = frozenset({"answer"})  # losses that are divided by `Counts` inside the pass
        if distiller is not None:
            self.summed |= distiller.per_label | distiller.per_image
        aside = self.sharded or zero or stage.gradient_checkpointing or stage.compile
        release(model)  # what an earlier engine left
        self.short = ShortWeights(model) if self.precision == "bf16" and not aside else None
        modules = {"": model}
        if isinstance(distiller, nn.Module):
            modules["distiller"] = distiller
        self.optimizers: list[Any] = build_optimizers(modules, stage, parts_of(model))
        self.peak, self.factor = stage.lr if isinstance(self.optimizers[-1], AdamW) else stage.matrix_lr, 1.0
        self.zero: Zero | None = None
        if zero:
            with launcher_alone():
                self.zero = Zero(accelerator, step, self.optimizers, stage, self.precision)
            self.optimizers = [self.zero.optimizer]
        self.clipped = _params(self.optimizers[-1])  # AdamW's: Muon's update does not depend on the gradient's norm
        self.adapters = [adapter for name, adapter in model.adapter.items() if name not in stage.detach]
        for adapter in self.adapters:
            adapter.begin_stage(steps)

    def run(
        self,
        number: int,
        global_step: int,
        batches: Sequence[dict[str, Any] | None],
        stop: bool,
        spares: Sequence[dict[str, Any] | None] = (),
    ) -> tuple[dict[str, Tensor], bool]:
        """Take optimiser step `number` of the stage.

        Args:
            number: counted from 0 within the stage.
            global_step: counted over the run; the model's randomness is a function of it.
            batches: one per forward pass, still on the CPU; None if each of its samples is left out.
            stop: whether this process received SIGTERM.
            spares: with several processes, a batch per pass that replaces None, so that all processes run the same
                number of passes; its losses are multiplied by 0.

        Returns:
            Losses by name, and whether any process received SIGTERM.
        """
        # Dropout and router noise depend on (seed, step, process) only, so that a resumed run draws the same numbers.
        reseed(self.seed, global_step, reader_of(self.accelerator)[0])
        if self.distiller is not None:
            self.distiller.begin_step(number, self.steps)
        there = [b for b in batches if b is not None]
        counts, stop = self._agree(sum(map(count_labels, there)), sum(map(count_images, there)), len(there), stop)
        if not counts.passes:
            return {}, stop  # every sample of the step is left out, in all processes
        # FSDP and DDP communicate in every pass: a process with fewer passes would leave the others waiting.
        passes: list[tuple[Any, bool]] = [(b, True) for b in there]
        if spares:
            passes = [(s, False) if b is None else (b, True) for b, s in zip(batches, spares, strict=True)]
        self.factor = rate_at(number, self.steps, self.stage)
        set_rate(self.optimizers, self.factor)
        if self.short is not None:
            self.short.ready()
        sums: dict[str, Tensor] = {}
        world = self.accelerator.num_processes
        for turn, (batch, counted) in enumerate(passes):
            last = turn + 1 == len(passes)
            with contextlib.nullcontext() if last else self._no_sync():
                given = to_device(batch, self.device), counts
                with autocast(self.precision, self.device):
                    losses = self.wrapped(*given) if self.zero is None else self.zero(*given, last=last)
                self._expect(losses, batch)
                losses = {k: v if k in self.summed else v / counts.passes for k, v in losses.items()}
                losses = losses if counted else {k: v * 0.0 for k, v in losses.items()}
                # Not accelerator.backward, which would divide by the number of passes; `counts` has done so.
                total = self.unwrapped.total(losses)
                if self.zero is not None:
                    self.zero.backward(total)
                elif total.requires_grad or world > 1:  # a text teaches nothing to an adapter that reads images
                    total.backward()
            if self.unused is None and last and not self.sharded and self.zero is None and world > 1:
                require_gradients(self.unwrapped)
            losses.pop(NOTHING, None)
            for name, value in losses.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        if self.stage.clip and self.tensor > 1:
            clip_gradients(self.clipped, self.stage.clip)
        elif self.stage.clip and self.zero is None:
            torch.nn.utils.clip_grad_norm_(self.clipped, self.stage.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        for adapter in self.adapters:
            adapter.end_step(number)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return sums, stop

    def _expect(self, losses: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Refuse a weight whose loss does not exist.

        Checked on the first batch with images: a batch of text alone lacks losses over images.
        """
        if self.unseen and count_images(batch):
            there = {*losses, *weights_of(self.distiller)}  # a distiller does not compute a term of weight 0
            for name in self.unseen.difference(there, ("answer",)):
                raise unknown("loss in this stage (loss_weights)", name, there)
            self.unseen.clear()

    def resume_training(self) -> None:
        """Set attention kernels and train mode, at the beginning and after an evaluation, which changes both."""
        with autocast(self.precision, self.device):
            self.attention = self.model.set_attention(self.model.config.attention)
        _set_mode(self.model, self.stage)

    @property
    def weights(self) -> dict[str, float]:
        """Loss weights at this step, other than 1."""
        return self.unwrapped.weights

    @property
    def rate(self) -> float:
        """The current learning rate of AdamW, or of Muon if no parameter is left for AdamW, ahead of `lr_scale`."""
        return self.peak * self.factor

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the stage trains, by the names that checkpoints use."""
        named: dict[str, Any] = {f"model.{n}": p for n, p in tensors_of(self.model).items() if p.requires_grad}
        if isinstance(self.distiller, nn.Module):
            named |= {f"distiller.{n}": p for n, p in self.distiller.named_parameters()}
        return named

    def release(self) -> None:
        """Leave the model as it was ahead of the stage, but for what it learnt, and hold its teacher no longer."""
        release(self.model)
        self.model.requested -= self.unwrapped.asked
        self.unwrapped.asked, self.unwrapped.teacher = frozenset(), None  # the accelerator holds the step for now

    def _no_sync(self) -> Any:
        """Postpone what only the last pass of a step has to send: DDP's gradients add up locally.

        Those of FSDP2 are divided among the processes in every pass: whole gradients, kept until the last one, would
        take as much memory as the model.
        """
        aside = self.sharded or self.zero is not None
        return contextlib.nullcontext() if aside else self.accelerator.no_sync(self.wrapped)

    def _agree(self, labels: int, images: int, passes: int, stop: bool) -> tuple[Counts, bool]:
        """Add up counts and stop requests over the processes.

        Each process divides its losses by the mean count, since DDP and FSDP average gradients over processes: the
        result is the gradient of the loss over the whole step.
        """
        world = self.accelerator.num_processes
        if world > 1:
            all_of = torch.tensor([labels, images, passes, int(stop)], dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(all_of)
            labels, images, passes, stop = int(all_of[0]), int(all_of[1]), int(all_of[2]), bool(all_of[3] > 0)
        return Counts(max(1, labels) / world, max(1, images) / world, passes / world), stop


def _as_losses(given: Any, others: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return what a distiller gave, if that is losses by name, none of them one of the model's own."""
    if not isinstance(given, Mapping):
        raise ZooError(f"The distiller gives a {type(given).__name__}, and has to give losses by name: a dict.")
    for name, loss in given.items():
        if not isinstance(loss, Tensor) or loss.ndim:
            what = f"of the shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ZooError(
                f"The distiller's loss {name!r} is {what}, and has to be a tensor with one number: the mean."
            )
        if name in others:
            raise ZooError(f"The distiller calls a loss {name!r}, as one of the model's own is called: choose another.")
    return given


def weights_of(distiller: Distiller | None) -> Mapping[str, float]:
    """Return the current weights of a distiller's losses, by name."""
    weights = {} if distiller is None else distiller.weights
    return weights if isinstance(weights, Mapping) else {}  # a plug-in's module may have a parameter of that name


def reseed(seed: int, global_step: int, rank: int) -> None:
    """Make the model's randomness a function of (seed, step, process)."""
    torch.manual_seed(int(keyed(seed, 3, global_step, rank).integers(2**63)))


def count_labels(batch: Mapping[str, Any]) -> int:
    """Count the labels of a batch's answer loss. Labels are shifted by 1, so the first position has no prediction."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def count_images(batch: Mapping[str, Any]) -> int:
    """Count the images of a batch, each crop and frame by itself."""
    if (shown := batch.get(FEATURES)) is not None:
        return sum(shown["rows"])
    cuts = batch.get("cuts") or ()
    if any(cut.patches != (0, 0) for cut in cuts):  # pixels are the patches of all images
        return sum(cut.rows for cut in cuts)
    return len(batch.get("pixel_values", ()))


def _set_mode(model: Any, stage: Stage) -> None:
    """Set train mode in parts that train and eval mode in frozen ones; set checkpointing and compilation.

    Parts without weights are in train mode: a pruner may draw anew there.
    """
    model.train()
    parts = [part for name, part in model.named_children() if name not in ("pruner", "adapter")]
    for part in [*parts, *model.pruner.values(), *model.adapter.values()]:
        trains = [p.requires_grad for p in part.parameters()]
        if trains and not any(trains):
            part.eval()  # no dropout, and running statistics stay those of the checkpoint
    if stage.gradient_checkpointing:
        model.activation_checkpointing_enable()
    elif any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        model.activation_checkpointing_disable()
    model.compile_parts(stage.compile)


def _params(optimizer: Any) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
