"""The memory of a training stage on one process: weights, master weights, optimiser, and the largest moment of a step.

A step is run without numbers (`zoo.checking.dry_run`), on a batch of the stage's own data where the caller has one,
else on rows of one image and some text. What is not counted: the interpreter and its libraries, processes that read
data and batches that are read ahead, activations of teacher and distiller, matrices that Muon stacks, buckets of DDP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.checking.dry_run import bytes_of_step
from zoo.checking.plan import Plan, device_of
from zoo.composed.answer_loss import LOGITS_AT_ONCE
from zoo.composed.masters import to_widen
from zoo.composed.outputs import LOSS_ALONE
from zoo.fusion.llm.attention import resolve_attention
from zoo.registry import IGNORE_INDEX, Cut
from zoo.runs.optim import matrices_in
from zoo.storage.precision import resolve_precision
from zoo.teaching.teacher import forward_options
from zoo.text.sizes import size_text

TEXT = 64  # tokens of text beside images, of a row that is assumed
LOGITS = 12  # bytes of a logit: in float32, of its softmax, of its gradient


@dataclass
class Memory:
    """Bytes that training takes on one process."""

    weights: int  # of model, distiller and teacher, as they are loaded
    masters: int  # what weights of 16 bits take more as they train in float32
    optimizer: int  # moments
    step: int  # the most at once of activations, logits and gradients
    rows: tuple[int, int]  # rows of a pass, and their positions
    labels: int
    estimated: bool  # the step did not run without numbers, so that its memory follows from a formula

    @property
    def total(self) -> int:
        return self.weights + self.masters + self.optimizer + self.step

    def describe(self) -> str:
        """Say what the memory is for."""
        parts = [f"{size_text(self.weights)}B weights"]
        parts += [f"{size_text(self.masters)}B to train them in float32"] if self.masters else []
        parts += [f"{size_text(self.optimizer)}B optimiser", f"{size_text(self.step)}B"]
        b, t = self.rows
        about = ", by a formula" if self.estimated else ""
        return f"{', '.join(parts)} a pass of {b} x {t} positions with {self.labels} labels{about}"


def memory_of(stage: Any, model: Any, plan: Plan, *, weights: int, distiller: Any, batch: Any = None) -> Memory:
    """Return the memory of a stage.

    Args:
        stage: its settings.
        model: on the meta device, with the parameters that train set.
        plan: of the run.
        weights: bytes of model and teacher.
        distiller: of the stage, or None.
        batch: of `ZooProcessor.collate`; None: one is assumed.
    """
    device = torch.device(device_of(plan))
    precision = resolve_precision(stage.precision or plan.precision, device)
    wide = to_widen(model, precision) if (stage.master_weights or plan.master_weights) == "fp32" else {}
    once = {id(p): p for p in wide.values()}
    masters = sum(4 * p.numel() - p.nbytes for p in once.values())
    heads = list(distiller.parameters()) if isinstance(distiller, nn.Module) else []
    matrices = matrices_in({"": model}) if stage.optimizer == "muon_adamw" else set()
    trained = {n: p.numel() * (4 if id(p) in once else p.element_size()) for n, p in _trained(model)}
    moments = sum(size * (1 if name in matrices else 2) for name, size in trained.items())
    head = sum(p.nbytes for p in heads)
    batch = batch if batch is not None else assumed_batch(stage, model)
    labels = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    set_up(model, stage, plan, device, precision)
    options = options_of(stage, frozenset() if distiller is None else frozenset(distiller.needs))
    try:
        step, _ = bytes_of_step(model, batch, precision, wide, passes=stage.accumulate, options=options)
        estimated = False
    except Exception:  # of any part that asks for numbers: a Python `if` on a loss, say
        step, estimated = by_formula(stage, model, batch, labels) + sum(trained.values()), True
    rows = tuple(batch["labels"].shape)
    return Memory(weights + head, masters, moments + 2 * head, step + head, (rows[0], rows[1]), labels, estimated)


def options_of(stage: Any, needs: frozenset[str]) -> dict[str, Any]:
    """Return the options of a training pass; the head runs for a distiller without answers too, which has its own.

    Args:
        stage: its settings.
        needs: words of its distiller; of none without one.
    """
    runs = stage.runs_llm(needs)
    return LOSS_ALONE | {"all_logits": False, "run_llm": runs, "run_head": runs} | forward_options(needs, "student")


def assumed_batch(stage: Any, model: Any, samples: int = 0) -> dict[str, Any]:
    """Return a batch of one image and `TEXT` tokens a sample, all of them learnt, in rows of `pack_length` if set.

    Args:
        stage: its settings.
        model: for the tokens of an image.
        samples: of the batch; 0: those of a pass of one process.
    """
    samples = samples or max(1, stage.batch_size // stage.accumulate)
    vision, layout = model.vision, model.layout
    cut = None if layout is None else Cut(size=vision.transform.size)
    image = model.num_image_tokens if layout is None or cut is None else layout.count(cut)
    one = image + TEXT
    together = max(1, (stage.pack_length or one) // one)
    rows = -(-samples // together)
    ids = torch.zeros(rows, together, one, dtype=torch.long)
    ids[:, :, :image] = model.config.image_token_id
    ids.view(-1, one)[samples:] = 0
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels.view(-1, one)[:samples, image:] = 0
    batch: dict[str, Any] = {"input_ids": ids.flatten(1), "labels": labels.flatten(1)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if together > 1:
        batch["segment_ids"] = torch.arange(together).repeat_interleave(one).expand(rows, -1).contiguous()
        batch["position_ids"] = torch.arange(one).repeat(together).expand(rows, -1).contiguous()
    if vision is not None:
        batch["pixel_values"] = torch.empty(samples, 3, *vision.transform.size)
        if cut is not None:
            batch["cuts"] = [cut] * samples
        if not image:  # images do not enter the sequence, and cannot be counted in it
            batch["images_per_row"] = [1] * samples
    return batch


def _trained(model: Any) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def set_up(model: Any, stage: Any, plan: Plan, device: torch.device, precision: str) -> None:
    """Set the model up as the stage would."""
    model.train()
    for part in model.children():
        if not any(p.requires_grad for p in part.parameters()):
            part.eval()
    if stage.gradient_checkpointing:
        model.activation_checkpointing_enable()
    elif any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        model.activation_checkpointing_disable()
    dtype = torch.bfloat16 if precision == "bf16" else next(model.llm.parameters()).dtype
    kernel = resolve_attention(plan.attention, device, dtype, lm=model.llm.lm)
    if "flash" in kernel or "flex" in kernel:
        kernel = "sdpa"  # as much memory, and no kernel of CUDA
    model.llm.lm.set_attn_implementation(kernel)
    if model.vision is not None:
        model.vision.set_attention(resolve_attention(kernel, device, dtype, model.vision.num_tokens))


def by_formula(stage: Any, model: Any, batch: Mapping[str, Any], labels: int) -> int:
    """Return the bytes of activations and logits of a pass, of a decoder as most are."""
    text, width = model.llm.lm.config.get_text_config(), model.llm.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * width
    experts = getattr(text, "num_experts_per_tok", None) or 1
    layer = (10 * width + 3 * inner * experts) * 4
    layers = model.llm.num_layers
    per_token = layers * 4 * width + layer if stage.gradient_checkpointing else layers * layer
    return batch["labels"].numel() * per_token + LOGITS * min(labels * model.llm.vocab_size, LOGITS_AT_ONCE)
