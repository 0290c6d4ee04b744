"""What a composed model is made of, as numbers and as the lines that `print(model)` shows."""

from dataclasses import dataclass
from typing import Any

from zoo.text.sizes import count_text

ORDER = {"vision": 0, "pruner": 0, "projector": 0, "layout": 0, "llm": 1, "adapter": 3}  # of the lines
INSIDE = 2  # a pruner inside the LLM comes behind it


@dataclass(frozen=True)
class PartNumbers:
    """A part of a composed model.

    Attributes:
        kind: vision, pruner, projector, layout, llm or adapter.
        name: in the registry.
        parameters: of its own; weights that an adapter put into the LLM are the adapter's.
        trainable: of these, how many train.
        dtype: data types of its parameters.
        tokens: image tokens of an image behind it, the most where the number depends on the image; None: it has none.
        grid: (h, w) of these tokens; None: not known.
        width: of a token behind it; None: it has none.
        about: what else it is: of the LLM its type, layers and vocabulary.
    """

    kind: str
    name: str
    parameters: int
    trainable: int
    dtype: tuple[str, ...]
    tokens: int | None
    grid: tuple[int, int] | None
    width: int | None
    about: str = ""


@dataclass(frozen=True)
class ModelSummary:
    """A composed model in numbers; `str` writes it as lines.

    Attributes:
        name: where it was loaded from; empty: composed.
        parts: in the order in which an image goes through them, then what acts inside the LLM.
        parameters: of all parts, tied ones once.
        trainable: of these.
        memory: bytes of parameters and buffers.
        image_tokens: placeholders of an image in the prompt, the most where it depends on the image.
        device: of the first parameter.
        attention: kernel of the LLM.
        positions: kept or dense, of image tokens that pruners left; empty: no pruner.
    """

    name: str
    parts: tuple[PartNumbers, ...]
    parameters: int
    trainable: int
    memory: int
    image_tokens: int
    device: str
    attention: str
    positions: str

    def __str__(self) -> str:
        trains = {0: "none trainable", self.parameters: "all trainable"}
        trained = trains.get(self.trainable, f"{count_text(self.trainable)} trainable")
        dtypes = tuple(dict.fromkeys(word for part in self.parts for word in part.dtype))
        lines = [f"ZooModel{f' {self.name}' * bool(self.name)}: {count_text(self.parameters)} parameters, {trained}"]
        rows = [_cells(part, bool(trains.get(self.trainable))) for part in self.parts]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for kind, name, size, about in rows:
            lines.append(f"  {kind:<{widths[0]}}  {name:<{widths[1]}}  {size:>{widths[2]}}  {about}".rstrip())
        images = f"{self.image_tokens} image tokens at most, " if self.image_tokens else ""
        positions = f", positions {self.positions}" if self.positions else ""
        lines.append(f"  {images}{' and '.join(dtypes)} on {self.device}, attention {self.attention}{positions}")
        return "\n".join(lines)


def _cells(part: PartNumbers, alike: bool) -> tuple[str, str, str, str]:
    """Columns of a part; `alike`: all parts train, or none."""
    about = [] if part.tokens is None else [f"{part.tokens} tokens"]
    if part.grid is not None and part.tokens == part.grid[0] * part.grid[1]:
        about[-1] += f" ({part.grid[0]} x {part.grid[1]})"
    if part.width is not None and about:
        about[-1] += f" of width {part.width}"
    if part.about:
        about.append(part.about)
    if part.parameters and not alike:
        share = {0: "frozen", part.parameters: "trains"}
        about.append(share.get(part.trainable, f"{count_text(part.trainable)} train"))
    return part.kind, part.name, count_text(part.parameters) if part.parameters else "", ", ".join(about)


def summary_of(model: Any) -> ModelSummary:
    """Return the numbers of a composed model (`zoo.composed.model.ZooModel`)."""
    own: dict[str, list[Any]] = {}
    for name, parameter in model.named_parameters():  # tied ones once
        own.setdefault(model.part_of(name), []).append(parameter)
    parts = []
    inside = set(model.inside_pruners)
    for step in sorted(model.steps, key=lambda s: ORDER[s.kind] + (s.kind == "pruner" and s.name in inside) * INSIDE):
        key = f"{step.kind}.{step.name}" if step.kind in ("pruner", "adapter") else step.kind
        held = [p for at, some in own.items() if at == key or at.startswith(f"{key}.") for p in some]
        between = step.kind == "pruner" and step.name in inside
        image = step.kind in ("vision", "pruner", "projector", "layout") and bool(step.tokens) and not between
        parts.append(
            PartNumbers(
                step.kind,
                step.name,
                sum(p.numel() for p in held),
                sum(p.numel() for p in held if p.requires_grad),
                tuple(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in held)),
                step.tokens if image else None,
                step.grid if image else None,
                step.width if image else None,
                _about_llm(model) if step.kind == "llm" else _about_inside(model, step.name) if between else "",
            )
        )
    every = [p for some in own.values() for p in some]
    buffers = [b for b in model.buffers() if b is not None]
    return ModelSummary(
        name=str(model.config._name_or_path or ""),
        parts=tuple(parts),
        parameters=sum(p.numel() for p in every),
        trainable=sum(p.numel() for p in every if p.requires_grad),
        memory=sum(t.numel() * t.element_size() for t in [*every, *buffers]),
        image_tokens=model.num_image_tokens,
        device=str(every[0].device) if every else "cpu",
        attention=str(model.llm.lm.config.get_text_config()._attn_implementation),
        positions=model.config.positions if len(model.pruner) else "",
    )


def _about_inside(model: Any, name: str) -> str:
    """How many image tokens a pruner inside the LLM leaves of those that enter it."""
    config = model.llm.lm.config.get_text_config()
    left = model.pruner[name].tokens_per_layer(model.num_image_tokens, config.num_hidden_layers)
    return f"{left[0]} image tokens in the first layer, {left[-1]} in the last" if left else ""


def _about_llm(model: Any) -> str:
    config = model.llm.lm.config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None)
    sizes = f", {layers} layers" if layers else ""
    return f"{config.model_type}{sizes} of width {model.llm.hidden_size}, vocabulary {model.llm.vocab_size}"
