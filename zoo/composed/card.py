"""The card of a saved model: README.md with the hub's metadata, parts and licences, scores, costs, and how to load it.

Metadata is written by huggingface_hub's own classes. What is not known is left out: a licence that no base states, a
language that no card names, scores that were not measured on these weights.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.composed.card_facts import HELD_OUT, UNKNOWN, Facts, cards_of, facts_in, hub_name, licence_of_base, strictest
from zoo.composed.costs import DecoderSizes, encoder_flops, matmul_flops
from zoo.composed.licences import on_card
from zoo.composed.summary import PartNumbers, summary_of
from zoo.fusion.llm.packing import carries_state
from zoo.registry import Cut, Pruner
from zoo.registry.foreign import read_json
from zoo.storage.atomic import BESIDE, write_text
from zoo.text.markup import markdown
from zoo.text.sizes import count_text, size_text

FILE = "README.md"
MARK = "<!-- Written by zoo when the model was saved. Remove this line to keep your own changes. -->"
TEXT_TOKENS = 64  # beside an image, where the cost of a prefill is stated
PLAIN = "image-text-to-text"


@dataclass(frozen=True)
class Layout:
    """How the files of a card are loaded.

    Attributes:
        library: of `library_name`.
        load: lines of Python, with `{place}` for a folder or a repository.
        zoo: whether zoo loads it, so that the place is named `dir:` or `hub:`.
    """

    library: str
    load: tuple[str, ...]
    zoo: bool = False


ZOO = Layout("zoo", ("import zoo", "", 'model, processor = zoo.load("{place}"{plugins})'), zoo=True)
TRANSFORMERS = Layout(
    "transformers",
    (
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        'model = AutoModelForImageTextToText.from_pretrained("{place}")',
        'processor = AutoProcessor.from_pretrained("{place}")',
    ),
)
GGUF = Layout("gguf", ("llama-mtmd-cli -m {files[0]} --mmproj {files[1]} --image photo.jpg -p 'What is this?'",))
LAYOUTS = {"zoo": ZOO, "transformers": TRANSFORMERS, "gguf": GGUF}


def write_card(
    model: Any,
    folder: Path,
    facts: Facts | None = None,
    *,
    form: Layout = ZOO,
    name: str = "",
    record: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    files: Sequence[str] = (),
) -> None:
    """Write README.md; one that a person wrote or changed stays.

    Args:
        model: as it is saved in the folder.
        folder: of the model.
        facts: None: those of the card that the model was loaded with, without its scores.
        form: of the files.
        name: title; empty: that of the folder.
        record: of the bases that the folder names; None: what its config.json states.
        notes: further sentences on the weights.
        files: names of the GGUF files: of the language model, of encoder and projector.
    """
    file = folder / FILE
    if file.is_file() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return
    if record is None:
        stated = read_json(folder / "config.json") if form.zoo and (folder / "config.json").is_file() else {}
        record = stated.get("base") or {} if form.zoo else model.bases.record
    known = facts_in(model.described).without_scores() if facts is None else facts
    title = name or _title(folder)
    text = card_text(model, known, form=form, name=title, record=record, notes=notes, files=files)
    write_text(file, text)


def card_text(
    model: Any,
    facts: Facts,
    *,
    form: Layout = ZOO,
    name: str = "model",
    record: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    files: Sequence[str] = (),
) -> str:
    """Return the text of a card. Args: as `write_card`."""
    bases = _bases(model, model.bases.record if record is None else record)
    summary = summary_of(model)
    front = _metadata(model, facts, bases, form, name)
    parts = [f"---\n{front}\n---", MARK, f"# {markdown(name)}", _about(summary)]
    parts += [" ".join(notes)] if notes else []
    parts += ["## Load it", _load(model, form, _place(name, form), bases, files)]
    parts += ["## Parts", *_parts(summary.parts, bases, facts)]
    if facts.scores:
        parts += ["## Scores", "\n".join(_score_rows(facts.scores))]
    parts += ["## Costs", "\n".join(_cost_rows(model, summary))]
    return "\n\n".join(parts) + "\n"


def _title(folder: Path) -> str:
    name = folder.name
    if name.startswith(".") and name.endswith(BESIDE):  # it is written beside, and renamed
        name = name[1 : -len(BESIDE)]
    return name or "model"


# ---- metadata --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Base:
    """A checkpoint that weights came from: which part, its name here and on the hub, and its licence."""

    part: str
    checkpoint: str
    hub: str
    licence: str
    whole: bool  # the folder holds its weights


def _bases(model: Any, record: Mapping[str, Any]) -> list[_Base]:
    found = []
    for key, entry in record.items():
        part = model.bases.own[key].of(model) if key in model.bases.own else None
        name = str(entry.get("checkpoint", ""))
        hub = hub_name(entry, part)
        shown = hub or (name if ":" in name else Path(name).name)  # no folder of this machine
        found.append(_Base(key, shown, hub, licence_of_base(entry, part), bool(entry.get("whole"))))
    return found


def _metadata(model: Any, facts: Facts, bases: Sequence[_Base], form: Layout, name: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    stated = [facts.license] if facts.license else []
    licence, names = strictest([*stated, *(base.licence for base in bases)])
    licence, names = (licence, names) if names else on_card(licence)
    hubs = list(dict.fromkeys([*(base.hub for base in bases if base.hub), *facts.base_models]))
    more: dict[str, Any] = {"base_model_relation": _relation(model, form)} if hubs else {}
    results = [
        EvalResult(
            task_type=PLAIN,
            dataset_type=str(line["data"]),
            dataset_name=str(line["data"]),
            dataset_config=f"{line['kind']}{HELD_OUT if line.get('held_out') else ''}",
            metric_type=str(line["metric"]),
            metric_name=f"{line['metric']} ({line['kind']})",
            metric_value=line["score"]["value"],
            metric_args={
                "n": line["score"]["n"],
                "stderr": line["score"]["stderr"],
                **({"held_out": True} if line.get("held_out") else {}),
                **{key: dict(line[key]) for key in ("majority", "blind") if line.get(key)},
            },
        )
        for line in facts.scores
    ]
    data = ModelCardData(
        license=licence or None,
        license_name=names or None,
        base_model=hubs or None,
        datasets=list(facts.datasets) or None,
        language=list(facts.language) or _languages(model) or None,
        library_name=form.library,
        pipeline_tag=PLAIN,
        tags=_tags(model, form),
        metrics=sorted({str(line["metric"]) for line in facts.scores}) or None,
        model_name=name if results else None,
        eval_results=results or None,
        **more,
    )
    return data.to_yaml(line_break="\n").strip()


def _languages(model: Any) -> list[str]:
    """Return the languages that the card of the language model's, or of the whole model's, checkpoint states."""
    entries = [model.bases.record[key] for key in ("model", "llm") if key in model.bases.record]
    cards = [card for entry in entries for card in cards_of(str(entry.get("checkpoint", "")), entry.get("revision"))]
    return list(dict.fromkeys(word for card in cards[:1] for word in facts_in(card).language))


def _relation(model: Any, form: Layout) -> str:
    """How a model came from its bases, in the hub's words."""
    return "adapter" if form.zoo and len(model.adapter) else "finetune"


def _tags(model: Any, form: Layout) -> list[str]:
    slots = model.config.slots or {}
    kinds = [str((slots.get("llm") or {}).get("model_type") or ""), *map(str, model.adapter), *map(str, model.pruner)]
    return list(dict.fromkeys(filter(None, ["zoo", "vision-language", *kinds])))


# ---- text ------------------------------------------------------------------------------------------------------------


def _about(summary: Any) -> str:
    names = [f"`{part.name}`" for part in summary.parts]
    tokens = f", {summary.image_tokens} image tokens at most for an image" if summary.image_tokens else ""
    return (
        f"A vision-language model of {count_text(summary.parameters)} parameters, composed of {', '.join(names)}"
        f"{tokens}."
    )


def _place(name: str, form: Layout) -> str:
    return f"dir:{name}" if form.zoo else name


def _load(model: Any, form: Layout, place: str, bases: Sequence[_Base], files: Sequence[str]) -> str:
    if files:
        return f"    {form.load[0].format(files=files)}"
    named = model.config.plugins or []
    plugins = f', "plugins=[{",".join(named)}]"' if named else ""
    place = json.dumps(place, ensure_ascii=False)[1:-1]
    code = "\n".join(line.format(place=place, plugins=plugins) for line in form.load)
    text = f"```python\n{code}\n```"
    if form.zoo:
        text = f"    pip install zoo-vlm\n\n{text}"
    absent = [base for base in bases if not base.whole] if form.zoo else []
    if absent:
        needs = ", ".join(f"`{base.checkpoint}` ({base.part})" for base in absent)
        text += f"\n\nThe files hold what differs from {needs}, which is read too."
    return text


def _parts(parts: Sequence[PartNumbers], bases: Sequence[_Base], facts: Facts) -> list[str]:
    rows = [
        "| slot | part | parameters | image tokens behind it | weights from | licence |",
        "|---|---|---|---|---|---|",
    ]
    for part in parts:
        of = [base for base in bases if base.part.split(".")[0] in (part.kind, "model") and part.parameters]
        own = facts.license or UNKNOWN
        source = ", ".join(f"`{base.checkpoint}`" for base in of) or ("this model" if part.parameters else "")
        licence = ", ".join(dict.fromkeys(base.licence for base in of)) or (own if part.parameters else "")
        named = f"{part.name}: {part.about}" if part.about else part.name
        cells = [part.kind, named, count_text(part.parameters) if part.parameters else "", part.tokens or ""]
        rows.append("| " + " | ".join(markdown(cell) for cell in [*cells, source, licence]) + " |")
    return ["\n".join(rows).replace("\\`", "`")]


def _score_rows(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as `zoo eval` prints them; the baselines are without images."""
    rows = ["| data | kind | metric | score | s.e. | n | majority | blind |", "|---|---|---|---|---|---|---|---|"]
    for line in scores:
        score, held = line["score"], ", held out" if line.get("held_out") else ""
        others = [f"{line[key]['value']:.3f}" if line.get(key) else "-" for key in ("majority", "blind")]
        names = [markdown(line["data"]), markdown(line["kind"]) + held, markdown(line["metric"])]
        figures = [f"{score['value']:.3f}", f"{score['stderr']:.3f}", f"{score['n']:.0f}"]
        rows.append("| " + " | ".join([*names, *figures, *others]) + " |")
    return [
        *rows,
        "",
        "s.e.: standard error over n questions; majority: the most frequent training answer; blind: without images.",
    ]


def _cost_rows(model: Any, summary: Any) -> list[str]:
    rows = ["| | |", "|---|---|", f"| parameters | {count_text(summary.parameters)} |"]
    rows.append(f"| weights in memory | {size_text(summary.memory)}B |")
    if summary.image_tokens:
        rows.append(f"| image tokens, at most for an image | {summary.image_tokens} |")
    if (encoder := _encoder_cost(model)) is not None:
        height, width = model.vision.transform.size
        rows.append(f"| encoder, {height} x {width} pixels | {size_text(encoder)}FLOPs |")
    if (layers := tokens_by_layer(model)) is not None:
        if len(set(layers)) > 1:
            rows.append(f"| image tokens in the LLM's layers, mean | {sum(layers) / len(layers):.1f} |")
        if not carries_state(model.llm.lm):  # else layers are of several kinds, in no closed form
            sizes = DecoderSizes.of(model.llm.lm.config.get_text_config(), model.llm.layers)
            cost = matmul_flops(sizes, [n + TEXT_TOKENS for n in layers], head_rows=1)
            of = f"prefill of an image and {TEXT_TOKENS} tokens of text{_uncounted(model)}"
            rows.append(f"| {of} | {size_text(cost)}FLOPs |")
    rows += [
        "",
        "FLOPs in closed form: products of matrices, 2 for a multiplication and its addition, no causal discount.",
    ]
    return rows


def _uncounted(model: Any) -> str:
    """Name the adapters that compute with weights outside of the LLM's layers, which are not counted."""
    counted = {id(p) for p in model.llm.parameters()}
    left = [n for n, a in model.adapter.items() if not a.merged and any(id(p) not in counted for p in a.parameters())]
    return f", without adapter {', '.join(left)}" if left else ""


def _encoder_cost(model: Any) -> int | None:
    """Operations of the encoder for one row of pixels; None where there is no closed form."""
    runner = getattr(model.vision, "runner", None)
    if runner is None or not hasattr(runner, "num_blocks") or model.vision.native:
        return None
    return encoder_flops(runner, model.vision.num_tokens)


def tokens_by_layer(model: Any) -> list[int] | None:
    """Image tokens that enter each layer of the LLM for an image; None where an adapter takes the image, or unknown."""
    entered, layers = model.num_image_tokens, model.llm.num_layers
    if not entered:
        return None
    for part in model.pruner.values():
        if part.behind and type(part).tokens_of_image is not Pruner.tokens_of_image:
            entered = part.tokens_of_image(entered, Cut())
    inside = [model.pruner[name] for name in model.inside_pruners]
    if len(inside) > 1:
        return None
    return list(inside[0].tokens_per_layer(entered, layers)) if inside else [entered] * layers
