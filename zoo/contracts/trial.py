"""Tiny parts of every kind, and one composition of them really run: forward, backward, generate, save, load."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.checking.checker import RefusedError, check
from zoo.checking.fixes import AND
from zoo.checking.plan import Plan
from zoo.composed.assembly import build_distiller
from zoo.composed.model import ZooModel
from zoo.loading.build import load, processor_for
from zoo.model_config import ZooConfig
from zoo.registry import Dialog, Sample, ZooError, names
from zoo.settings.stage import Stage
from zoo.teaching.teacher import Teacher, TeacherRows
from zoo.text.tokenizer import train_tokenizer
from zoo.training.step import Counts, TrainStep, count_images, count_labels

KINDS = ("vision", "pruner", "projector", "adapter", "llm", "distiller")  # of pairs; layouts need images that are cut

_TOWER = {"image_size": 32, "patch_size": 8, "width": 32, "heads": 2, "depth": 2, "layer": -1}  # 4 x 4 patches
_TOWERS = ("hf", "open_clip", "timm")  # others, from plugins, have options of their own
_LLM = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "intermediate_size": 48, "max_positions": 256}
_EXPERTS = {"num_experts": 4, "top_k": 2}
DENSE = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "smollm3")
MOE = ("mixtral", "qwen2_moe", "qwen3_moe")
# Options of parts whose defaults are of a size for large models; the others keep their defaults.
_SMALL: dict[tuple[str, str], dict[str, Any]] = {
    ("pruner", "cdpruner"): {"relevance": "embeddings"},
    ("projector", "resampler"): {"num_queries": 4, "num_heads": 2},
    ("pruner", "prumerge"): {"score": "column_mean"},  # its own score reads the block behind the last one here
    ("adapter", "lora"): {"rank": 2},
    ("adapter", "mole"): {"rank": 2},
    ("adapter", "moextend"): {"calibration_width": 4},
    ("adapter", "peft"): {"method": "dora", "options": {"r": 2}},
    ("layout", "anyres"): {"pinpoints": [[32, 64], [64, 32]]},
    ("adapter", "vlora"): {"rank": 4, "skip": 2, "width": 16, "depth": 2, "num_heads": 2},
}
# What other slots may hold in place of the defaults (timm, mlp, llama, no teacher), where a part does not fit these.
_NATIVE = {"layout": "native"}  # of encoders whose images keep their shapes
_OTHERS: tuple[dict[str, str], ...] = ({}, {"teacher": "yes"}, {"llm": "mixtral"}, {"projector": ""}, _NATIVE)
_OTHERS += ({**_NATIVE, "projector": "identity"},)
PROMPT = ("input_ids", "attention_mask", "pixel_values", "images_per_row", "questions", "cuts")
_QUESTIONS = ("is there a red circle?", "what is it?")
_ANSWERS = ("yes", "a blue square")

Part = tuple[str, str]  # a kind, and the name that a member of it has on the page


def members(kind: str) -> list[str]:
    """Names of the members of a kind: of components, of encoders with their families, of families of LLMs."""
    if kind == "llm":
        return [*DENSE, *MOE, *(name for name in names("llm") if name != "hf")]
    if kind == "vision":
        native = ("qwen2_5_vl", "qwen3_vl", "glm4v", "paddleocr_vl")
        families = {"hf": ("hf clip", "hf siglip"), "qwen_vision": tuple(f"qwen_vision {name}" for name in native)}
        alone = [name for name in names("vision") if name != "fused"]  # of others: `benches/check_valid.py` draws it
        return [n for name in alone for n in families.get(name, (name,))]
    return [name for name in names(kind) if (kind, name) != ("projector", "identity")]


def node_of(kind: str, name: str) -> dict[str, Any]:
    """The tiny node of a member."""
    if kind == "llm" and name in (*DENSE, *MOE):
        groups = {} if name == "phi3" else {"num_kv_heads": 2}
        return {"name": "hf", "model_type": name, **_LLM, **groups, **(_EXPERTS if name in MOE else {})}
    library, _, family = name.partition(" ")
    if kind == "vision" and library == "qwen_vision" and family:
        sizes = {"width": 32, "heads": 2, "depth": 4, "patch_size": 4, "min_pixels": 64, "max_pixels": 1024}
        return {"name": library, "model_type": family, "out_width": _LLM["hidden_size"], **sizes}
    if kind == "vision" and library in _TOWERS:
        return {"name": library, **_TOWER, **({"model_type": family} if family == "siglip" else {})}
    return {"name": name, **_SMALL.get((kind, name), {})}


@dataclass
class Verdict:
    """What became of a composition: `yes`, `no` (the check refuses it) or `broken` (it lets through what fails)."""

    word: str
    reason: str = ""  # of a refusal, the names in it left out; of what is broken, where and how
    fix: str = ""  # that was tried and fits
    plan: Plan | None = field(default=None, repr=False)


class Trial:
    """Runs compositions, each once.

    Args:
        folder: takes what they save.
        nodes: options of members that are not to have those of `node_of`.
        others: further choices of the other slots, for parts that do not fit the usual ones.
    """

    def __init__(
        self,
        folder: Path,
        nodes: Mapping[Part, Mapping[str, Any]] | None = None,
        others: Sequence[dict[str, str]] = (),
    ) -> None:
        self.folder, self.nodes, self.others = folder, dict(nodes or {}), (*_OTHERS, *others)
        self.tokenizer = train_tokenizer([f"{q} {a}" for q in _QUESTIONS for a in _ANSWERS], 320)
        self._known: dict[str, Verdict] = {}
        self._alone: dict[Part, dict[str, str]] = {}
        self._teachers: dict[str, Any] = {}

    def run(self, parts: Sequence[Part]) -> Verdict:
        """Run a composition that has these parts, the other slots as each of them needs it to be by itself."""
        plan = self.plan(parts)
        if refusal := refusal_of(plan):
            return Verdict("no", _plain(refusal), plan=plan)
        key = repr((plan.slots, plan.stages))
        if key not in self._known:
            self._known[key] = self._run(plan)
        return self._known[key]

    def plan(self, parts: Sequence[Part]) -> Plan:
        """A composition that has these parts, the other slots as each of them needs it to be by itself."""
        return self._plan(parts, self._needed(parts))

    def start(self, plan: Plan) -> dict[str, Any]:
        """Build what a plan holds, on which the steps are taken: each reads what those before it left."""
        model, processor = self._model(plan.slots, plan.attention)
        _move(model)
        return {"model": model, "processor": processor, "stage": plan.stages.get("main")}

    def fix(self, verdict: Verdict, parts: Sequence[Part]) -> str:
        """A change that makes a refused composition fit, of one of the parts if there is such; else empty."""
        assert verdict.plan is not None, "only refused ones keep their plan"
        try:
            check(verdict.plan)
        except RefusedError as error:
            fixes = [fix.replace(f"dir:{self.folder}/", "").replace(AND, " ") for fix in error.fixes]
            own = [fix for fix in fixes if any(f".{name}." in fix for _, name in parts)]
            return next(iter([*own, *fixes]), "")
        return ""

    def _needed(self, parts: Sequence[Part]) -> dict[str, str]:
        """What other slots have to hold that the defaults do not, for any of the parts alone."""
        for part in parts:
            if part not in self._alone:
                free = [other for other in self.others if part[0] not in other]
                self._alone[part] = next((o for o in free if not refusal_of(self._plan([part], o))), {})
        return {slot: name for part in parts for slot, name in self._alone[part].items()}

    def _plan(self, parts: Sequence[Part], others: Mapping[str, str]) -> Plan:
        given = {kind: [name for k, name in parts if k == kind] for kind in (*KINDS, "layout")}
        chosen = {"vision": "timm", "projector": "mlp", "llm": "llama", **others}
        chosen |= {kind: some[0] for kind, some in given.items() if some}
        slots: dict[str, Any] = {
            k: self._node(k, chosen[k]) if chosen.get(k) else None for k in ("vision", "projector", "layout", "llm")
        }
        slots |= {kind: {name: self._node(kind, name) for name in given[kind]} for kind in ("pruner", "adapter")}
        stages = {}
        if "distiller" in chosen:
            seen = (chosen["vision"], chosen["projector"] or "mlp", chosen.get("layout", ""))
            teacher = self._teacher(*seen) if "teacher" in chosen else ""
            stages["main"] = Stage(steps=1, distiller=self._node("distiller", chosen["distiller"]), teacher=teacher)
        return Plan(
            slots,
            attention="sdpa",
            vocab_size=len(self.tokenizer),
            made=self.tokenizer,
            stages=stages,
        )

    def _node(self, kind: str, name: str) -> dict[str, Any]:
        return dict(self.nodes.get((kind, name)) or node_of(kind, name))

    def _teacher(self, vision: str, projector: str, layout: str) -> str:
        """Save a model with this encoder, projector and layout, once; returns its name."""
        folder = self.folder / f"teacher-{vision}-{projector}-{layout}".replace(" ", "-")
        if not folder.exists():
            slots: dict[str, Any] = {
                "vision": self._node("vision", vision),
                "projector": self._node("projector", projector),
                "layout": self._node("layout", layout) if layout else None,
            }
            model, processor = self._model({**slots, "llm": node_of("llm", "llama")})
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        return f"dir:{folder}"

    def _model(self, slots: dict[str, Any], attention: str = "sdpa") -> tuple[ZooModel, Any]:
        torch.manual_seed(0)
        special = {"pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": self.tokenizer.eos_token_id}
        ids = {"image_token_id": self.tokenizer.image_token_id, "text_vocab_size": len(self.tokenizer)}
        model = ZooModel(ZooConfig(slots=slots, attention=attention, **ids, **special)).eval()
        return model, processor_for(model, self.tokenizer)

    def failure(self, plan: Plan) -> str:
        """Compose, learn from a batch and generate, without asking the check: where it failed and how, or nothing."""
        return self._run(plan, (self.forward, self.backward, self.generate)).reason

    def _run(self, plan: Plan, steps: Sequence[Callable[[dict[str, Any]], None]] = ()) -> Verdict:
        steps = steps or (self.forward, self.backward, self.generate, self.save_and_load)
        try:
            seen = self.start(plan)
        except Exception as error:
            return _broken("built", error)
        for step in steps:
            try:
                step(seen)
            except Exception as error:  # whatever it is: the check let this composition through
                return _broken(step.__name__.replace("_", " "), error)
        return Verdict("yes")

    def forward(self, seen: dict[str, Any]) -> None:
        """Losses of a row with an image and a row of text, in training."""
        model, processor, stage = seen["model"], seen["processor"], seen["stage"]
        cells = model.vision.num_tokens if model.vision is not None else 16
        samples = [sample_of(0, images=1, cells=cells), sample_of(1, images=0)]
        rows = [processor.encode(s) for s in samples]
        distiller = teacher = None
        if stage is not None and stage.distiller:
            distiller = build_distiller(model, stage.distiller_node)
            if stage.teacher:
                taught_by, theirs = self._loaded(stage.teacher)
                teacher = Teacher(taught_by, distiller.needs, len(self.tokenizer))
                beside = TeacherRows(theirs, processor)
                rows = [row for s, r in zip(samples, rows, strict=True) for row in beside.add(s, [s], [r])]
        seen["batch"] = processor.collate(rows)
        model.train().set_trainable(["all"])
        if isinstance(distiller, nn.Module):
            distiller.register_forward_hook(lambda module, args, given: seen.update(taught=given))
        seen["distiller"] = distiller
        step = TrainStep(model, distiller, teacher, stage or Stage(steps=1))
        losses = step(seen["batch"], Counts(count_labels(seen["batch"]), count_images(seen["batch"])))
        seen["loss"] = step.total(losses)
        if not all(bool(loss.isfinite()) for loss in losses.values()):
            raise ZooError(f"The losses are {losses}.")

    def backward(self, seen: dict[str, Any]) -> None:
        """Every parameter that trains has a gradient; experts that no token chose may have none."""
        seen["loss"].backward()
        model = seen["model"]
        trains = [(n, p.grad) for n, p in model.named_parameters() if p.requires_grad]
        bad = [n for n, grad in trains if (grad is None or not grad.isfinite().all()) and "experts" not in n]
        if bad:
            raise ZooError(f"{len(bad)} parameters have no gradient, {bad[0]} for one.")

    @torch.no_grad()
    def generate(self, seen: dict[str, Any]) -> None:
        """Greedy answers to a prompt with an image and one without, padded on the left."""
        model, processor = seen["model"].eval(), seen["processor"]
        samples = [sample_of(0, images=1), sample_of(1, images=0)]
        batch = processor.collate([processor.encode_prompt(s, s.dialogs[0]) for s in samples], padding_side="left")
        inputs = {k: v for k, v in batch.items() if k in PROMPT}
        seen["prompts"] = inputs
        seen["said"] = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        if seen["said"].shape[0] != 2:
            raise ZooError(f"generate gave {tuple(seen['said'].shape)} for two prompts.")

    @torch.no_grad()
    def save_and_load(self, seen: dict[str, Any]) -> None:
        """The saved model gives the same logits, to the bit, and the same answers."""
        model, batch = seen["model"], {k: v for k, v in seen["batch"].items() if k not in ("teacher", "targets")}
        folder = self.folder / "model"
        model.save_pretrained(folder)
        again = ZooModel.from_pretrained(folder).eval()
        ours, theirs = (m(**batch, all_logits=True).logits for m in (model, again))
        if not torch.equal(ours, theirs):
            raise ZooError(f"The loaded model differs by {(ours - theirs).abs().max():.1e}.")
        if not torch.equal(seen["said"], again.generate(**seen["prompts"], max_new_tokens=3, do_sample=False)):
            raise ZooError("The loaded model generates something else.")

    def _loaded(self, name: str) -> Any:
        if name not in self._teachers:
            self._teachers[name] = load(name, device="cpu")
        return self._teachers[name]


def refusal_of(plan: Plan) -> str:
    """Why the check refuses a plan; empty where it does not."""
    try:
        check(plan, fixes=0)
    except RefusedError as error:
        return error.reason
    return ""


def _plain(reason: str) -> str:
    """A reason without what differs from pair to pair: names, counts, and what else holds there."""
    reason = re.sub(r" What holds there:.*", "", " ".join(reason.split()))
    reason = re.sub(r"\b\w+ForCausalLM\b", "the LLM", re.sub(r"\b\d+ (?=modules)", "", reason))
    return re.sub(r"(?<!\w)'[^']*'", "'...'", reason).rstrip(".")


def _broken(where: str, error: Exception) -> Verdict:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return Verdict("broken", f"{where}: {type(error).__name__}: {first.rstrip('.')}")


def _move(model: ZooModel) -> None:
    """Weights of adapters as training would leave them: a zero that they start with hides mistakes."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.part_of(name).startswith("adapter"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g).to(parameter))


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def sample_of(i: int, images: int, cells: int = 16) -> Sample:
    content = [{"type": "image"}] * images + [{"type": "text", "text": _QUESTIONS[i]}]
    answer = [{"type": "text", "text": _ANSWERS[i]}]
    dialog = Dialog([{"role": "user", "content": content}, {"role": "assistant", "content": answer}])
    labels = np.random.default_rng(i).integers(0, 3, (images, cells, 7))  # of each cell, as `dense` reads them
    return Sample(f"s{i}", [picture(i)] * images, [dialog], {"patch_labels": labels} if images else {})
