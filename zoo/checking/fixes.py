"""Changes of a composition that may make it fit, smallest first: each is tried before a refusal suggests it."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zoo import registry
from zoo.composed.own_checkpoints import encoder_paths, node_at, with_node
from zoo.published.folder import read_content
from zoo.registry import MISSING, ZooError
from zoo.text.tokenizer import CHAT_TEMPLATES, OF_MODEL

if TYPE_CHECKING:
    from zoo.checking.plan import Plan

AND = "\n"  # between the two overrides of a change that takes two


def candidates(plan: "Plan") -> Iterator[tuple[str, "Plan"]]:
    """Yield overrides as a user would write them, each with the plan that they make; not tried yet."""
    yield from _as_stored(plan)
    for name, stage in plan.stages.items():
        yield from _other_teaching(plan, name, stage)
    for key in ("device", "precision", "attention"):
        if getattr(plan, key) != "auto":
            auto: dict[str, Any] = {key: "auto"}
            yield f"{key}=auto", replace(plan, **auto)
    if plan.positions != "dense" and plan.slots.get("pruner"):
        yield "positions=dense", replace(plan, positions="dense")
    vision, layout = ((plan.slots.get(kind) or {}).get("name") for kind in ("vision", "layout"))
    known = vision in registry.names("vision")
    native = known and bool(getattr(registry.get("vision", str(vision)).cls, "native", False))
    if native != (layout == "native"):
        word, node = ("native", {"name": "native"}) if native else ("null", None)
        yield f"layout={word}", replace(plan, slots={**plan.slots, "layout": node})
    if plan.slots.get("projector") and any(_excludes_tokens(n) for n in plan.slots.get("adapter") or {}):
        yield "projector=null", replace(plan, slots={**plan.slots, "projector": None})
    for template in CHAT_TEMPLATES:
        # A tokenizer's own template may lack what answers need: then a built-in one is worth a try.
        if template != plan.template and (plan.template or plan.tokenizer):
            yield f"tokenizer.chat_template={template}", replace(plan, template=template)
    if plan.tokenizer is None and plan.vocab_size is not None and plan.vocab_size < 512:
        yield "tokenizer.vocab_size=512", replace(plan, vocab_size=512)
    for kind in ("pruner", "adapter"):
        members = plan.slots.get(kind) or {}
        if len(members) > 1:  # of two pruners, the first may destroy what the second needs
            turned = dict(reversed(members.items()))
            yield f"{kind}={_shown(turned)}", replace(plan, slots={**plan.slots, kind: turned})
    yield from _other_options(plan)
    yield from _options_without_grid(plan)
    yield from _other_stages(plan)
    lists: dict[str, dict[str, Any]] = {kind: dict(plan.slots.get(kind) or {}) for kind in ("pruner", "adapter")}
    for kind, members in lists.items():  # left out, before the many that could be in its place
        for name in members:
            rest = {n: node for n, node in members.items() if n != name}
            yield f"{kind}={_shown(rest or None)}", replace(plan, slots={**plan.slots, kind: rest})
    for kind, members in lists.items():
        for name in members:
            for other in registry.names(kind):
                if other not in members and (node := _default_node(kind, other)):
                    swapped = {(other if n == name else n): (node if n == name else v) for n, v in members.items()}
                    yield f"{kind}={_shown(swapped)}", replace(plan, slots={**plan.slots, kind: swapped})
    for kind in ("projector", "vision", "llm"):
        current = (plan.slots.get(kind) or {}).get("name")
        for other in registry.names(kind):
            if other != current and (node := _default_node(kind, other)):
                yield f"{kind}={other}", replace(plan, slots={**plan.slots, kind: node})
        if current and kind != "llm":
            yield f"{kind}=null", replace(plan, slots={**plan.slots, kind: None})


def _excludes_tokens(adapter: str) -> bool:
    return "image_tokens" in getattr(registry.get("adapter", adapter).cls, "excludes", ())


def _as_stored(plan: "Plan") -> Iterator[tuple[str, "Plan"]]:
    """Yield what trained weights were trained with: each option of their part, and adapters that are left out."""
    stated = read_content(plan.stored).get("slots") if plan.stored is not None else None
    for kind in registry.SINGLE_SLOTS:
        ours, theirs = plan.slots.get(kind) or {}, (stated or {}).get(kind) or {}
        if ours.get("name") != theirs.get("name"):
            continue
        for key, value in theirs.items():
            if ours.get(key, value) != value and not isinstance(value, Mapping):
                slots = {**plan.slots, kind: {**ours, key: deepcopy(value)}}
                yield f"{kind}.{key}={_shown(value)}", replace(plan, slots=slots)
    ours, theirs = plan.slots.get("adapter") or {}, (stated or {}).get("adapter") or {}
    if theirs.keys() - ours.keys():
        both = {**deepcopy(theirs), **ours}
        yield f"adapter={_shown(both)}", replace(plan, slots={**plan.slots, "adapter": both})


def _other_options(plan: "Plan") -> Iterator[tuple[str, "Plan"]]:
    """Yield each option that differs from its default set back to it, and the other values of options with choices."""
    # A slot's only part first, unless it holds trained weights, which another depth or another token does not fit.
    for kind in sorted(registry.MODEL_SLOTS, key=lambda kind: (kind in registry.MANY) != plan.trained):
        nodes = plan.slots.get(kind) or {}
        many = kind in registry.MANY
        held: list[tuple[tuple[str, ...], Any, str]] = [((kind, name), node, name) for name, node in nodes.items()]
        held = held if many else [((kind,), nodes, "")]
        if kind == "vision":
            held += [(path, node_at(plan.slots, path), "") for path in encoder_paths(nodes) if len(path) > 1]
        for place, node, name in held:
            if not (name or node.get("name")):
                continue
            entry, path = registry.get(kind, name or node["name"]), ".".join(place)
            for option in sorted(
                entry.options, key=lambda o: o.name == "num_experts"
            ):  # the family's number may be huge
                given = node.get(option.name, option.default)
                values = [] if option.default in (given, MISSING) or option.name == "checkpoint" else [option.default]
                values += [v for v in entry.choices.get(option.name, ()) if v != given]
                if kind == "llm" and option.name == "max_positions" and isinstance(given, int):
                    values = [given * 2**k for k in (1, 2, 3, 4)]  # the smallest that fits comes first
                if kind == "pruner" and option.name == "layer" and isinstance(given, int):
                    values += [k for k in (given // 2, 1) if 0 < k < given]  # where the LLM has few layers
                if kind == "llm" and option.name == "top_k" and node.get("num_experts"):
                    values = [k for k in (2, 1) if k <= node["num_experts"] and k != given]
                for value in values:
                    slots = with_node(plan.slots, place, deepcopy({**node, option.name: value}))
                    yield f"{path}.{option.name}={_shown(value)}", replace(plan, slots=slots)
            for inside, choices in entry.choices.items():  # of an option that is a mapping
                outer, dot, key = inside.partition(".")
                for value in choices if dot else ():
                    slots = deepcopy(plan.slots)
                    changed = slots[kind][name] if many else slots[kind]
                    changed[outer] = {**(changed.get(outer) or {}), key: value}
                    yield f"{path}.{inside}={_shown(value)}", replace(plan, slots=slots)


def _options_without_grid(plan: "Plan") -> Iterator[tuple[str, "Plan"]]:
    """Yield the choices of pruners' options once more, with `mlp` for a projector that needs the grid they destroy."""
    name = (plan.slots.get("projector") or {}).get("name")
    if name not in registry.names("projector") or "grid" not in _capabilities("projector", name, "needs"):
        return
    for pruner, node in (plan.slots.get("pruner") or {}).items():
        if pruner not in registry.names("pruner") or "grid" not in _capabilities("pruner", pruner, "destroys"):
            continue
        for option, values in registry.get("pruner", pruner).choices.items():
            for value in values:
                slots = with_node(plan.slots, ("pruner", pruner), deepcopy({**node, option: value}))
                override = f"pruner.{pruner}.{option}={_shown(value)}{AND}projector=mlp"
                yield override, replace(plan, slots={**slots, "projector": {"name": "mlp"}})


def _capabilities(kind: str, name: str, word: str) -> frozenset[str]:
    return registry.table.capabilities(getattr(registry.get(kind, name).cls, word, ()))


def _other_stages(plan: "Plan") -> Iterator[tuple[str, "Plan"]]:
    for name, stage in plan.stages.items():
        for field_name in ("data", "loss_weights", "lr_scale"):  # overrides merge mappings: only `~` removes a key
            for key in (given := dict(getattr(stage, field_name))):
                less = {k: v for k, v in given.items() if k != key}
                try:
                    changed = replace(stage, **{field_name: less})
                except ZooError:  # the stage refuses it by itself
                    continue
                yield f"~stages.{name}.{field_name}.{key}", replace(plan, stages={**plan.stages, name: changed})
        for field_name, value in (
            ("freeze", []),
            ("train", ["all"]),
            ("train", ["projector"]),
            ("distiller", None),
            ("teacher", ""),
            ("pack_length", None),
            ("precision", ""),
        ):
            if getattr(stage, field_name) != value:
                try:
                    changed = replace(stage, **{field_name: value})
                except ZooError:
                    continue
                yield (
                    f"stages.{name}.{field_name}={_shown(value)}",
                    replace(plan, stages={**plan.stages, name: changed}),
                )


def _other_teaching(plan: "Plan", name: str, stage: Any) -> Iterator[tuple[str, "Plan"]]:
    """Yield the teacher's tokenizer, and the distiller without its losses on image tokens or on hidden states."""
    node = stage.teacher_node
    if node is None:
        return
    from zoo.checking.teachers import may_take_tokens

    if node["model"] and may_take_tokens(plan, node["model"], node["options"]):
        source = f"{OF_MODEL}{node['model']}"
        yield f"tokenizer.checkpoint={source}", replace(plan, tokenizer=source, vocab_size=None, made=None)
    own = stage.distiller_node
    if own is None:
        return
    try:
        known = {option.name for option in registry.get("distiller", own["name"]).options}
    except ZooError:
        return
    less: tuple[dict[str, Any], ...] = (  # losses with the strictest demands on a teacher
        {"visual_weight": 0.0, "relation_weight": 0.0},
        {"relation_weight": 0.0},
    )
    for off in less:
        if off.keys() <= known:
            changed = replace(stage, distiller={**own, **off})
            text = ",".join(f"{k}:{v}" for k, v in {**own, **off}.items() if not isinstance(v, (dict, list)))
            yield f"stages.{name}.distiller={{{text}}}", replace(plan, stages={**plan.stages, name: changed})
    if "hidden_layers" in own:  # an override merges mappings: only `~` removes the layers
        changed = replace(stage, distiller={k: v for k, v in own.items() if k != "hidden_layers"})
        yield f"~stages.{name}.distiller.hidden_layers", replace(plan, stages={**plan.stages, name: changed})


def _shown(value: Any) -> str:
    """Format a value as in an override; of a mapping, its names."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if value == "":
        return "''"
    if isinstance(value, (Mapping, list, tuple)):
        return f"[{','.join(map(str, value))}]"
    return str(value)


def _default_node(kind: str, name: str) -> dict[str, Any] | None:
    """Return the node of a component by default, or None where an option is required or it cannot be imported."""
    try:
        options = registry.get(kind, name).options
    except ZooError:
        return None
    return {"name": name} if all(o.default != MISSING for o in options) else None
