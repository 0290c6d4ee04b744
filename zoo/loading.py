"""Models by name, by folder, from the hub, or composed from parts; each with the processor that fits it.

The order is always the same: compose the config, check it on the meta device, then read weights.
"""

from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from zoo import config as configs
from zoo.checker import Plan, RefusedError, check
from zoo.model import ZooModel
from zoo.model_types import ZooConfig
from zoo.processor import ZooProcessor
from zoo.registry import ZooError, plugins
from zoo.tokenizer import CHAT_TEMPLATES, image_separator, load_tokenizer, train_tokenizer
from zoo.weights import local_folder, read_weights, remember_base, require_base, sha256_of, weight_files

_WORDS = " yes no 0 1 2 3 4 5 6 7 8 9"  # what an empty corpus still gives a tokenizer


def load(
    name: str,
    *overrides: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attention: str | None = None,
    fresh: Iterable[str] = (),
) -> tuple[ZooModel, ZooProcessor]:
    """Load a model by name, with its processor; it is in eval mode.

    Args:
        name: a preset (`scenes_tiny`), a folder (`dir:runs/x`) or a hub repository (`hub:org/name`).
        overrides: options as on the command line: `pruner=random`, `pruner.random.keep_ratio=0.5`.
        device: where it goes; None: CUDA where there is one.
        dtype: of the parameters, a torch dtype or its name; None keeps what was saved.
        attention: a name that transformers knows, or `auto`.
        fresh: parts that may start without trained weights; adapters that an override adds always may.

    Raises:
        ZooError: the name is unknown or ambiguous, something does not fit, or weights are missing.

    Example:
        >>> model, processor = zoo.load("scenes_tiny")
    """
    cfg = configs.compose("load", [f"model={_quoted(name)}", *overrides])
    if attention is not None:
        cfg.attention = attention
    return build(cfg, device=device, dtype=dtype, fresh=fresh)


def compose(*overrides: str, texts: Iterable[str] = ()) -> tuple[ZooModel, ZooProcessor]:
    """Compose a model from parts, without trained weights other than those of the parts' own checkpoints.

    Args:
        overrides: options as on the command line: `vision=timm`, `llm=hf`, `projector=mlp`, ...
        texts: what a new tokenizer is trained on, where neither the LLM nor an option names one.

    Example:
        >>> model, processor = zoo.compose("vision=timm", "projector=mlp", "llm=hf", texts=["a red circle"])
    """
    return build(configs.compose("load", list(overrides)), texts=texts, pretrained=False)


def build(
    cfg: Any,
    *,
    texts: Iterable[str] = (),
    pretrained: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    fresh: Iterable[str] = (),
) -> tuple[ZooModel, ZooProcessor]:
    """Build the model and processor of a composed config.

    Args:
        cfg: from `zoo.config.compose`.
        texts: what a new tokenizer is trained on, where there is none to load; read only then.
        pretrained: load the trained weights of a preset that has some; False starts a preset from its parts. A model
            that was given as a folder or a hub repository always brings its weights.
        device, dtype, fresh: see `load`.
    """
    folder = weights_folder(cfg) if pretrained or cfg.model.source != "preset" else None
    slots = slots_of(cfg)
    tokenizer = _tokenizer(cfg, slots, folder, texts)
    plan = plan_from(cfg, vocab_size=len(tokenizer))
    check(plan)
    special: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = ZooConfig(
        slots=slots,
        tokenizer=_plain(cfg.tokenizer),
        plugins=sorted({*cfg.plugins, *plugins.loaded()}),
        image_token_id=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
        text_vocab_size=len(tokenizer),
        attention=cfg.attention,
        **special,
    )
    model = ZooModel(config)
    remember_base(model, slots)
    if folder is not None:
        require_base(ZooConfig.from_pretrained(folder).base, config.base)
        started = read_weights(model, folder, fresh={*fresh, "adapter"})
        model.fresh_parts = sorted({model.part_of(n) for n in started})
    if model.generation_config is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    target = device or (cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(model, device=target, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    model.set_attention(cfg.attention)
    return model.eval(), processor_for(model, tokenizer, cfg.tokenizer.chat_template)


def processor_for(model: ZooModel, tokenizer: Any, template: str = "") -> ZooProcessor:
    """Make the processor that writes exactly the placeholders that the model's parts make image tokens for."""
    known = next((name for name, (text, _) in CHAT_TEMPLATES.items() if text == tokenizer.chat_template), template)
    return ZooProcessor(
        tokenizer,
        transform=model.vision.transform if model.vision is not None else None,
        num_image_tokens=model.num_image_tokens,
        image_separator=image_separator(known),
    )


def weights_folder(cfg: Any) -> Path | None:
    """Return the folder of the trained weights that `cfg.model` names, fetched where it must be; None if it has none.

    Raises:
        ZooError: the weights are not those whose hash the card states.
    """
    source, name = cfg.model.source, cfg.model.name
    if source == "dir":
        folder = Path(name)
    elif cfg.model.repository:
        folder = local_folder(cfg.model.repository, cfg.model.revision or None)
    else:
        folder = Path(str(files("zoo.model_cards"))) / name
        if not (folder / "config.json").is_file():
            return None
    if cfg.model.sha256:
        found = sha256_of(weight_files(folder)[0])
        if found != cfg.model.sha256:
            raise ZooError(
                f"The weights of {name!r} in {folder} have the hash {found}, but its card states {cfg.model.sha256}."
            )
    return folder


def slots_of(cfg: Any) -> dict[str, Any]:
    """Return the five model slots of a composed config as plain values."""
    return {kind: _plain(cfg.get(kind)) for kind in ("vision", "pruner", "projector", "llm", "adapter")}


def plan_from(cfg: Any, vocab_size: int | None = None) -> Plan:
    """Return what the check looks at in a composed config."""
    from omegaconf import OmegaConf

    slots = slots_of(cfg)
    source = None
    if vocab_size is None:
        source = cfg.tokenizer.checkpoint or slots["llm"].get("checkpoint") or None
        vocab_size = None if source else cfg.tokenizer.vocab_size
    return Plan(
        slots=slots,
        vocab_size=vocab_size,
        tokenizer=source,
        template=cfg.tokenizer.chat_template,
        stages={name: OmegaConf.to_object(stage) for name, stage in cfg.stages.items()},
        data=tuple(cfg.data),
        attention=cfg.attention,
        precision=cfg.precision,
        device=cfg.device,
    )


def plan_of(name: str, *overrides: str) -> Plan:
    """Return the plan of a model by name, for `zoo.check(name, ...)`."""
    return plan_from(configs.compose("load", [f"model={_quoted(name)}", *overrides]))


def _tokenizer(cfg: Any, slots: dict[str, Any], folder: Path | None, texts: Iterable[str]) -> Any:
    """The first that there is: the saved model's, the config's, that of the LLM's checkpoint, or a new one."""
    template = cfg.tokenizer.chat_template
    if folder is not None and (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(str(folder), template)
    if source := cfg.tokenizer.checkpoint or slots["llm"].get("checkpoint"):
        return load_tokenizer(source, template)
    return train_tokenizer(_or_words(texts), cfg.tokenizer.vocab_size, template or "plain")


def _or_words(texts: Iterable[str]) -> Iterable[str]:
    found = False
    for text in texts:
        found = True
        yield text
    if not found:
        yield _WORDS


def _plain(node: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _quoted(name: str) -> str:
    """A model name as Hydra's grammar takes it, whatever a path holds."""
    return "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'"


__all__: Sequence[str] = ["RefusedError", "build", "check", "compose", "load", "plan_from", "plan_of", "processor_for"]
