"""Rules for a part in a whole model of tiny parts: checked, trained, asked, saved and loaded."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.checking.plan import Plan
from zoo.contracts.case import Case, attributes_of, expect_same
from zoo.contracts.rules import NotForThisPart, Rules, expect, expect_close
from zoo.contracts.trial import PROMPT, Trial, refusal_of
from zoo.registry import Dialog, Sample
from zoo.registry.table import NAMED_CHILDREN

RULES = Rules()
INSIDE = Rules()  # of pruners: what they do inside the LLM
# Other encoders, for parts that need what the usual one does not give.
_ENCODERS = ({"vision": "hf clip"}, {"vision": "hf siglip"}, {"vision": "open_clip"})
# A model whose images keep their shapes, for a layout or an encoder that is of such.
_NATIVE: dict[tuple[str, str], dict[str, Any]] = {
    ("vision", "qwen_vision"): {"name": "qwen_vision", "model_type": "qwen2_vl", "width": 32, "heads": 2, "depth": 2}
    | {"patch_size": 4, "out_width": 32, "max_pixels": 64 * 64, "min_pixels": 64},
    ("llm", "qwen2_vl_text"): {"name": "hf", "model_type": "qwen2_vl_text", "hidden_size": 32, "num_layers": 4}
    | {"num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48, "max_positions": 256}
    | {"extra": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}},
}
_BESIDE = {"projector": "identity", "llm": "qwen2_vl_text"}
_NATIVES = {
    "layout": ({"vision": "qwen_vision", **_BESIDE},),
    "vision": ({"layout": "native", **_BESIDE},),
}
_SIZES = ((20, 48), (64, 28))  # height and width of two pictures


@dataclass
class ComposedCase(Case):
    """A part in a model; what a rule leaves, the ones behind it go on with."""

    folder: Path = field(default_factory=Path)
    seen: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def trial(self) -> Trial:
        nodes = {**_NATIVE, (self.kind, self.name): self.node}
        return Trial(self.folder, nodes, (*_ENCODERS, *_NATIVES.get(self.kind, ())))

    @cached_property
    def plan(self) -> Plan:
        return self.trial.plan([(self.kind, self.name)])

    def reached(self, *words: str) -> dict[str, Any]:
        """What earlier rules left."""
        if missing := [word for word in words if word not in self.seen]:
            raise NotForThisPart(f"a rule before it broke: there is no {missing[0]}")
        return self.seen


@RULES.add("fits", "`zoo check` takes a model that has it")
def fits(case: ComposedCase) -> str:
    refusal = refusal_of(case.plan)
    expect(not refusal, refusal, "a model that fits")
    case.seen |= case.trial.start(case.plan)
    slots = case.plan.slots
    names = [slots[k]["name"] for k in ("vision", "projector", "llm") if slots[k] and k != case.kind]
    return f"with {', '.join(names)}" + (" and a teacher" if _has_teacher(case.plan) else "")


def _has_teacher(plan: Plan) -> bool:
    return any(stage.teacher for stage in plan.stages.values())


@RULES.add("learns", "losses are finite, and a gradient reaches every weight that trains")
def learns(case: ComposedCase) -> str:
    seen = case.reached("model")
    case.trial.forward(seen)
    case.trial.backward(seen)
    if "taught" in seen:  # by a distiller that is a module
        _require_taught(seen["taught"], seen["distiller"])
    return f"loss {float(seen['loss'].detach()):.2f}"


def _require_taught(losses: dict[str, torch.Tensor], distiller: Any) -> None:
    """Break the rule where the losses of a distiller teach nothing, or are none that it declares."""
    bare = [name for name, loss in losses.items() if not loss.requires_grad]
    expect(not bare, f"no gradient follows from its loss {', '.join(bare)}", "one that reaches the student")
    if distiller.losses is not None:
        declared = {*distiller.losses, *distiller.weights}
        other = ", ".join(name for name in losses if name not in declared)
        expect(not other, f"it gives {other}, and declares {', '.join(sorted(declared))}", "what it declares")


@RULES.add("answers", "generate answers a padded batch of a prompt with an image and one without")
def answers(case: ComposedCase) -> str:
    case.trial.generate(case.reached("loss"))
    return f"{tuple(case.seen['said'].shape)}"


@RULES.add("saved", "saved and loaded it gives the same logits to the bit, and the same answers")
def saved(case: ComposedCase) -> str:
    case.trial.save_and_load(case.reached("said"))
    return "equal logits"


def _asked(size: tuple[int, int], seed: int) -> Sample:
    content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    answer = [{"type": "text", "text": "a blue square" if seed else "yes"}]
    dialog = Dialog([{"role": "user", "content": content}, {"role": "assistant", "content": answer}])
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Sample(f"s{seed}", [pixels], [dialog])


@RULES.add("two pictures", "two pictures of unlike size in a batch give the logits that each gives alone")
@torch.no_grad()
def two_pictures(case: ComposedCase) -> str:
    seen = case.reached("model")
    model, processor = seen["model"].eval(), seen["processor"]
    samples = [_asked(size, i) for i, size in enumerate(_SIZES)]
    rows = [processor.encode_prompt(s, s.dialogs[0]) for s in samples]
    lengths = [len(row.input_ids) for row in rows]

    def last(some: list[Any]) -> torch.Tensor:
        batch = processor.collate(some, padding_side="left")
        logits: torch.Tensor = model(**{k: v for k, v in batch.items() if k in PROMPT}, all_logits=True).logits
        return logits[:, -1]

    both = last(rows)
    for i, row in enumerate(rows):
        expect_close(last([row])[0], both[i], f"the picture of {_SIZES[i][1]} x {_SIZES[i][0]} alone", 1e-4)
    return f"prompts of {lengths[0]} and {lengths[1]} tokens"


@RULES.add("shared", "behind a pass its modules hold what they held: threads share them, unless it is not `concurrent`")
@torch.no_grad()
def shared(case: ComposedCase) -> str:
    seen = case.reached("model")
    model, processor = seen["model"].eval(), seen["processor"]
    own = getattr(model, case.kind)[case.name] if case.kind in NAMED_CHILDREN else None
    if own is not None and (case.kind == "adapter" or own.inside) and not own.concurrent:
        raise NotForThisPart("threads take turns on its account")
    before: dict[str, Any] = {}
    for i, size in enumerate(_SIZES):
        sample = _asked(size, i)
        row = processor.encode_prompt(sample, sample.dialogs[0])
        model(**{k: v for k, v in processor.collate([row]).items() if k in PROMPT})
        if before:
            expect_same(before, attributes_of(model))
        before = attributes_of(model)
    return f"{len(before)} attributes"


@INSIDE.add("layers", "inside the LLM it keeps as many tokens in each layer as tokens_per_layer counts")
@torch.no_grad()
def layers(case: ComposedCase) -> str:
    seen = case.reached("model")
    pruner = seen["model"].pruner[case.name]
    if not pruner.inside or not pruner.shortens:
        raise NotForThisPart("it drops nothing inside the LLM")
    model, processor = seen["model"].eval(), seen["processor"]
    row = processor.encode_prompt(sample := _asked(_SIZES[0], 0), sample.dialogs[0])
    batch = {k: v for k, v in processor.collate([row]).items() if k in PROMPT}
    out = model(**batch, all_logits=True)
    images = batch["input_ids"][0] == processor.image_token_id
    kept = [int((layer[0, : len(images)] & images).sum()) for layer in pruner.kept(out.passed)]
    counted = list(pruner.tokens_per_layer(int(images.sum()), model.llm.num_layers))
    expect(kept == counted, f"it keeps {kept}", f"{counted}, as tokens_per_layer counts")
    return " ".join(map(str, kept))


@INSIDE.add("without it", "detached, and attached again, the model is what it was")
@torch.no_grad()
def without_it(case: ComposedCase) -> str:
    seen = case.reached("model")
    pruner = seen["model"].pruner[case.name]
    if not pruner.inside:
        raise NotForThisPart("it is not inside the LLM")
    model = seen["model"].eval()
    ids = torch.arange(5, 13)[None]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.llm.lm.modules()]
    before = model.llm.lm(input_ids=ids).logits
    pruner.detach()
    expect_close(model.llm.lm(input_ids=ids).logits, before, "detached, logits of text alone", 0.0)
    pruner.attach(model.llm)
    again = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.llm.lm.modules()]
    expect(again == hooks, f"attached again there are {sum(again)} hooks", f"{sum(hooks)}")
    return f"{sum(hooks)} hooks"
