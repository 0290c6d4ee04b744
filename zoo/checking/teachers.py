"""Whether a teacher fits a student, checked before a weight is loaded: tokenizers, image tokens, widths, identity.

Losses on answers need the same vocabulary. Losses on image tokens need more: each image token of the student must cover
the same patches as one of the teacher. That holds where both encoders have the same grid over the same part of the
picture, dropped tokens are known (`ImageFeatures.keep`), and tokens are merged alike on both sides.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.checking.plan import device_of, plan_for
from zoo.composed.assembly import Parts, assemble
from zoo.composed.quantized import quantize
from zoo.registry import Distiller, ImageFeatures, ZooError, config_of
from zoo.settings.source import source_named, tokenizer_at
from zoo.storage.precision import resolve_precision
from zoo.teaching.teacher_store import STORED, read_about
from zoo.text.tokenizer import OF_MODEL, set_template_options, shared_tokens, tokens_hash

ON_IMAGES = frozenset({"teacher.visual", "teacher.relation"})  # needs of losses on image tokens
_ALIKE = 0.95  # of the words of a tokenizer; another that has as many is of its family, with other words added
_ROW = (4, 6)  # tokens of an image, where images keep their shapes


def check_teacher(name: str, stage: Any, distiller: Distiller, model: Any, plan: Any) -> tuple[int, Parts]:
    """Refuse a teacher that cannot teach this student; returns the bytes of its weights, and its parts.

    Args:
        name: of the stage.
        stage: its settings, with a teacher that is a model.
        distiller: built for the student.
        model: the student on the meta device.
        plan: of the student (`zoo.checking.plan.Plan`).
    """
    node = stage.teacher_node
    theirs, tokenizer = _teacher(node["model"], tuple(node["options"]))
    # Equal parts with equal weights give equal outputs: its losses begin at 0, and then hold the student back. Behind
    # an earlier stage the weights differ, and a student that is given some of its image tokens computes something else.
    itself = theirs.origin and theirs.origin == plan.origin and theirs.slots == plan.slots
    apart = distiller.own_reference or stage.keep_range or name != next(iter(plan.stages), name)
    if itself and not apart:
        raise ZooError(
            f"the teacher {node['model']!r} is the student itself: the same parts with the same weights have nothing "
            f"to learn from each other. Give the student a pruner or other parts, hide image tokens from it "
            f"(stages.{name}.keep_range), or name another teacher"
        )
    shared = _check_tokens(node["model"], plan, tokenizer)
    with torch.device("meta"):
        parts = assemble(theirs.slots, vocab_size=shared)
    needs: frozenset[str] = distiller.needs
    if needs & ON_IMAGES:
        _check_images(name, stage, needs, model, plan.slots, parts, theirs.slots)
    if distiller.equal_widths and parts.llm.hidden_size != model.llm.hidden_size:
        raise ZooError(
            f"the loss on hidden states needs LLMs of one width: the student has {model.llm.hidden_size}, the teacher "
            f"{parts.llm.hidden_size}. Leave it out with ~stages.{name}.distiller.hidden_layers"
        )
    device = torch.device(device_of(plan))
    if node["device"] and _elsewhere(torch.device(node["device"]), device):
        return 0, parts  # its memory is not that of the stage
    return _bytes_loaded(parts, node, resolve_precision(stage.precision or plan.precision, device)), parts


def _elsewhere(own: torch.device, run: torch.device) -> bool:
    """Whether a teacher's device is another than that of the run."""
    return own.type != run.type or (own.index or 0) != (run.index or 0)


def _bytes_loaded(parts: Parts, node: Mapping[str, Any], precision: str) -> int:
    """Return the bytes of a teacher's weights as `zoo.loading.build.load_teacher` holds them."""
    some = [parts.vision, parts.projector, parts.llm, *parts.pruner.values(), *parts.adapter.values()]
    modules = [part for part in some if isinstance(part, nn.Module)]
    dtype = node["dtype"] or ("bfloat16" if precision == "bf16" else "")
    for module in modules if dtype else ():
        module.to(getattr(torch, dtype))
    weights = {id(p): p.nbytes for module in modules for p in module.parameters()}  # each once
    if not node["bits"]:
        return sum(weights.values())
    path = next(name for name, module in parts.llm.lm.named_modules() if module is parts.llm.layers)
    own = [adapter.owns for adapter in parts.adapter.values()]
    with torch.device("meta"):
        saved = quantize(parts.llm.layers, int(node["bits"]), lambda name: any(owns(f"{path}.{name}") for owns in own))
    return sum(weights.values()) - saved


@lru_cache(maxsize=4)
def _teacher(name: str, options: tuple[str, ...]) -> tuple[Any, Any]:
    """Return the plan of a teacher by name, and its tokenizer; cached, since each fix that is tried needs them."""
    source = source_named(name, *options)
    found = tokenizer_at(f"{OF_MODEL}{name}", source.tokenizer["chat_template"])
    return plan_for(source), set_template_options(found, source.tokenizer["template_options"])


@lru_cache(maxsize=4)
def _tokenizer(source: str, template: str) -> Any:
    return tokenizer_at(source, template)


def check_storable(name: str, stage: Any, distiller: Distiller) -> None:
    """Refuse a teacher whose outputs a store cannot hold, before `zoo teach` runs it over the data.

    Args:
        name: of the stage.
        stage: its settings, with a teacher that is a model.
        distiller: built for any student.
    """
    needs: frozenset[str] = distiller.needs
    if distiller.live_only:
        raise ZooError(f"{distiller.live_only}, or train with the teacher itself.")
    if not needs & {f"teacher.{positions}" for positions in STORED}:
        asked = ", ".join(sorted(n for n in needs if n.startswith("teacher."))) or "nothing"
        raise ZooError(
            f"Distiller {stage.distiller_node['name']!r} asks for {asked}, and a store has predictions of "
            f"{', '.join(STORED)}: train with the teacher itself."
        )
    if "teacher.visual" not in needs:
        return
    theirs, tokenizer = _teacher(stage.teacher_node["model"], tuple(stage.teacher_node["options"]))
    slots = theirs.slots
    with torch.device("meta"):
        parts = assemble(slots, vocab_size=len(tokenizer))
    fix = f"{_without_images(name, stage, needs & {'teacher.visual'})}, or train with the teacher itself."
    if parts.vision is not None and parts.vision.native:
        raise ZooError(
            f"A store has as many image tokens of each image, and images of this teacher keep their shapes. {fix}"
        )
    if parts.layout is not None and not parts.layout.row_tokens:
        raise ZooError(
            f"A store has one grid of cells for each image or tile, and the teacher's layout "
            f"{slots['layout']['name']!r} makes something else of it. {fix}"
        )
    if parts.vision is not None and parts.num_image_tokens:
        dropping = [key for key, _, _ in _layout(parts.vision, parts.pruner, parts.projector, slots)[1]]
        dropping += [n for n, p in parts.pruner.items() if p.ragged or p.behind or p.shortens]
        if dropping:
            raise ZooError(
                f"A store has image tokens by their position in the whole grid, and the teacher has pruners "
                f"[{','.join(dict.fromkeys(dropping))}]: take them away with stages.{name}.teacher={{model: ..., "
                f"options: [pruner=null]}}. {fix}"
            )


def check_store(name: str, stage: Any, folder: str, distiller: Distiller, model: Any, plan: Any) -> None:
    """Refuse a stored teacher without the outputs that the distiller needs, with other image tokens or other words.

    Args:
        name: of the stage.
        stage: its settings.
        folder: of the store.
        distiller: built for the student.
        model: the student on the meta device.
        plan: of the student (`zoo.checking.plan.Plan`).
    """
    needs, slots = distiller.needs, plan.slots
    about = read_about(Path(folder))
    if distiller.live_only:
        raise ZooError(f"{distiller.live_only}, or load the teacher")
    if unknown_data := sorted(n for n, weight in stage.data.items() if weight > 0 and n not in about["data"]):
        raise ZooError(f"the store {folder!r} is of {', '.join(about['data'])}, not of {unknown_data[0]!r}")
    _check_stored_tokens(about, plan)
    missing = sorted(n for n in needs if n.startswith("teacher.") and n.partition(".")[2] not in about["positions"])
    if missing:
        what = missing[0].partition(".")[2]
        off = f"Set stages.{name}.distiller={{name: {stage.distiller_node['name']}, {what}_weight: 0}}"
        if what == "hidden":  # an override merges mappings: an empty one changes nothing
            off = f"Leave them out with ~stages.{name}.distiller.hidden_layers"
        raise ZooError(
            f"the stored teacher in {folder!r} has {' and '.join(about['positions'])} positions, not {what}. "
            f"{off}, or load the teacher"
        )
    if needs & ON_IMAGES and model.vision is not None and model.vision.native:
        raise ZooError(
            "a store has as many image tokens of each image, and images of the student keep their shapes. "
            f"{_without_images(name, stage, needs)}, or load the teacher"
        )
    if needs & ON_IMAGES:
        with torch.device("meta"):
            parts = assemble(about["slots"], vocab_size=about["vocab_size"])
        _check_images(name, stage, needs, model, slots, parts, about["slots"])
        if steps := _layout(parts.vision, parts.pruner, parts.projector, about["slots"])[1]:
            raise ZooError(
                f"the teacher stored in {folder!r} has pruners {_names(steps)}, and a store has image tokens by "
                f"their position in the whole grid. {_without_images(name, stage, needs)}, or load the teacher"
            )


def _check_stored_tokens(about: Mapping[str, Any], plan: Any) -> None:
    """Refuse a student whose tokenizer is known to be another than that of a stored teacher."""
    teacher = about["teacher"]["model"]
    fix = f"Set tokenizer.checkpoint={OF_MODEL}{teacher}"
    if plan.made is None and plan.tokenizer is None:
        raise ZooError(
            f"the student would train a tokenizer of its own, which is not that of the stored teacher {teacher!r}. "
            f"{fix}"
        )
    if plan.made is not None or plan.trained or plan.slots.get("layout"):
        return  # tokens may be added, or a saved template kept: the run compares what it has then
    if tokens_hash(_tokenizer(plan.tokenizer, plan.template)) != about["tokens"]:
        raise ZooError(f"the stored teacher {teacher!r} has another tokenizer or chat template than the student. {fix}")


def _check_tokens(name: str, plan: Any, theirs: Any) -> int:
    """Refuse a tokenizer other than the teacher's; returns the number of tokens in common."""
    ours = plan.made
    if ours is None and plan.tokenizer is not None:
        ours = _tokenizer(plan.tokenizer, plan.template)
    if ours is None:
        raise ZooError(
            f"the student would train a tokenizer of its own, which is not that of the teacher {name!r}. "
            f"Set tokenizer.checkpoint={OF_MODEL}{name}"
        )
    try:
        return shared_tokens(ours, theirs)
    except ZooError as error:
        fix = f"Set tokenizer.checkpoint={OF_MODEL}{name}"
        if not _may_take(plan, ours, theirs):
            where = (plan.slots.get("llm") or {}).get("checkpoint") or "the model"
            fix = (
                f"The language model's weights ({where}) know the words of its own tokenizer alone: name a teacher, or "
                "a language model, so that both are of one family"
            )
        raise ZooError(f"{error}. {fix}") from error


def may_take_tokens(plan: Any, name: str, options: Sequence[str]) -> bool:
    """Whether the student may have the teacher's tokenizer: its LLM is new, or nearly all ids mean the same in both."""
    ours = plan.made or (_tokenizer(plan.tokenizer, plan.template) if plan.tokenizer is not None else None)
    return ours is None or _may_take(plan, ours, _teacher(name, tuple(options))[1])


def _may_take(plan: Any, ours: Any, theirs: Any) -> bool:
    if not (plan.trained or (plan.slots.get("llm") or {}).get("checkpoint")):
        return True
    own, other = ours.get_vocab(), theirs.get_vocab()
    return sum(other.get(word) == i for word, i in own.items()) >= _ALIKE * len(own)


def _check_images(
    name: str,
    stage: Any,
    needs: frozenset[str],
    model: Any,
    our_slots: Mapping[str, Any],
    parts: Parts,
    their_slots: Mapping[str, Any],
) -> None:
    what = " and ".join(sorted(n.partition(".")[2] for n in needs & ON_IMAGES))
    fix = _without_images(name, stage, needs)
    for who, count in (("student", model.num_image_tokens), ("teacher", parts.num_image_tokens)):
        if not count:
            raise ZooError(
                f"the losses {what} need image tokens in the sequence, and the {who} has none. It can take losses on "
                f"the response only. {fix}"
            )
    for who, made in (("student", model.layout), ("teacher", parts.layout)):
        if made is not None and not made.row_tokens and not made.native:
            name = (our_slots if who == "student" else their_slots)["layout"]["name"]
            raise ZooError(
                f"the losses {what} compare one grid of cells for each image or tile, and the {who}'s layout "
                f"{name!r} makes something else of it. {fix}"
            )
    for who, pruners in (("student", model.pruner), ("teacher", parts.pruner)):
        if ragged := next((n for n, p in pruners.items() if p.ragged or p.behind), ""):
            raise ZooError(
                f"the losses {what} compare the same image tokens of student and teacher, and the {who}'s pruner "
                f"{ragged!r} keeps a number of its own of each image. {fix}"
            )
    if inside := next((n for n, p in parts.pruner.items() if p.shortens), ""):
        raise ZooError(
            f"the losses {what} compare image tokens that the student has, and the teacher's pruner {inside!r} drops "
            f"some inside its LLM. {fix}, or take it away with stages.{name}.teacher={{model: ..., options: "
            "[pruner=null]}"
        )
    layouts = [
        _options("layout", slots["layout"]) if slots.get("layout") else "none" for slots in (our_slots, their_slots)
    ]
    if layouts[0] != layouts[1]:
        raise ZooError(
            f"image tokens of student and teacher do not align: the student's layout is {layouts[0]}, the teacher's "
            f"{layouts[1]}. {fix}, or give both one layout"
        )
    ours = _layout(model.vision, model.pruner, model.projector, our_slots)
    theirs = _layout(parts.vision, parts.pruner, parts.projector, their_slots)
    if ours[0] != theirs[0]:
        raise ZooError(
            f"image tokens of student and teacher do not align: the student's encoder lays {_grid_text(ours[0])} over "
            f"the picture, the teacher's {_grid_text(theirs[0])}. {fix}, or give both encoders one grid"
        )
    if ours[2] != theirs[2]:
        raise ZooError(
            f"image tokens of student and teacher do not align: projector {_projector(our_slots)!r} and projector "
            f"{_projector(their_slots)!r} make other tokens of them. {fix}, or give both one projector"
        )
    steps, before = ours[1], theirs[1]  # the student may drop more: its tokens are looked up among the teacher's
    if before != steps[: len(before)]:
        raise ZooError(
            f"image tokens of student and teacher do not align: the teacher's pruners {_names(before)} are not those "
            f"that the student begins with, {_names(steps)}. {fix}, or take the teacher's pruners away with "
            f"stages.{name}.teacher={{model: ..., options: [pruner=null]}}"
        )
    if merging := [step for step in steps[len(before) :] if not step[1]]:
        raise ZooError(
            f"image tokens of student and teacher do not align: the student's pruner {merging[0][0]!r} makes new "
            f"tokens, which the teacher does not have. {fix}, or give the teacher that pruner too"
        )
    if ours[2] and steps[len(before) :]:
        raise ZooError(
            f"image tokens of student and teacher do not align: projector {_projector(our_slots)!r} mixes what the "
            f"student's pruners {_names(steps)} leave. {fix}, or give the teacher those pruners too"
        )


def _without_images(name: str, stage: Any, needs: frozenset[str]) -> str:
    off = ", ".join(f"{n.partition('.')[2]}_weight: 0" for n in sorted(needs & ON_IMAGES))
    return f"Set stages.{name}.distiller={{name: {stage.distiller_node['name']}, {off}}}"


Layout = tuple[tuple[Any, str], list[tuple[str, bool, str]], str]


def _layout(vision: Any, pruners: Any, projector: Any, slots: Mapping[str, Any]) -> Layout:
    """Return what image tokens consist of: grid and fit, pruners with whether they only drop, a projector that mixes.

    Pruners that keep all tokens and projectors that map each token by itself change nothing, and are left out.
    """
    h, w = _ROW if vision.native else vision.grid
    n = h * w
    score = torch.linspace(0, 9, n).sin().abs()[None]  # all tokens different, so that a pruner's choice is unique
    tokens = score.unsqueeze(-1) + torch.linspace(0, 5, n * vision.hidden_size).cos().view(1, n, -1)
    image = ImageFeatures(
        tokens,
        (h, w),
        cls_attention=score,
        prefix=tokens[:, :1],
        key_attention=score,
        pooling_attention=score,
        keys=tokens.unsqueeze(2),
        next_attention=score,
        next_keys=tokens,
        block_attention={word: score for p in pruners.values() for word in p.needs if "@" in word},
    )
    steps = []
    for key, pruner in pruners.items():
        after, drops = _after(pruner, image)
        if after is None or after.tokens.shape[1] != image.tokens.shape[1] or _cells(after) != _cells(image):
            steps.append((key, drops, _options("pruner", {**slots["pruner"][key], "name": key})))
        if after is None:
            break  # the input of later pruners is not known: they have to be equal on both sides
        image = after
    mixed = "" if _one_to_one(projector, image.tokens.shape[1]) else _options("projector", slots["projector"])
    apart = f", of {len(vision.members)} encoders" if vision.members and vision.token_grid is None else ""
    if vision.native:
        own = vision.pictures
        sides = f"{own['patch_size'] * own['merge_size']} pixels a side"
        least, most = own["size"]["shortest_edge"], own["size"]["longest_edge"]
        return (tuple(vision.grid), f"each of {sides}, by the shape of an image of {least} to {most}"), steps, mixed
    return ((h, w), vision.transform.fit + apart), steps, mixed


def _options(kind: str, node: Mapping[str, Any]) -> str:
    """Return a node with its defaults filled in, for comparison."""
    _, typed = config_of(kind, node)
    return repr(typed)


def _after(pruner: Any, image: ImageFeatures) -> tuple[ImageFeatures | None, bool]:
    """Run a pruner, and return whether it only drops; None for its output where it has weights, which are on meta."""
    try:
        with torch.no_grad():
            after = pruner(image)
        return after, not after.mixed and set(_cells(after)) <= set(_cells(image))
    except Exception:  # it needs more than these features: what it declares is taken
        return None, "grid" in pruner.destroys and "grid" not in pruner.provides


def _cells(image: ImageFeatures) -> list[tuple[int, ...]]:
    """Return the encoder's patches in each token."""
    count = image.tokens.shape[1]
    if image.groups is None:
        return [(int(i),) for i in (range(count) if image.keep is None else image.keep[0])]
    found: list[list[int]] = [[] for _ in range(count)]
    for cell, token in enumerate(image.groups[0].tolist()):
        if token >= 0:
            found[token].append(cell)
    return [tuple(cells) for cells in found]


def _one_to_one(projector: Any, count: int) -> bool:
    try:
        return all(projector.num_tokens(n) == n for n in {count, count + 1, 7})
    except ZooError:
        return False


def _grid_text(layout: tuple[Any, str]) -> str:
    (h, w), fit = layout
    return f"{h} x {w} cells ({fit})"


def _names(steps: Sequence[tuple[str, bool, str]]) -> str:
    return "[" + ",".join(key for key, _, _ in steps) + "]"


def _projector(slots: Mapping[str, Any]) -> str:
    """Registry name of the projector."""
    return str((slots.get("projector") or {}).get("name"))
