"""From a composed config to what it starts from: the slots, the folder of weights, the tokenizer.

Which tokenizer a model has is decided here and nowhere else.
"""

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from zoo.published import is_published
from zoo.published.base import read_content
from zoo.published.text import tokenizer_in
from zoo.registry import ZooError
from zoo.settings import schema as configs
from zoo.settings.overrides import quoted
from zoo.storage.weights import local_folder, sha256_of, weight_files
from zoo.text.tokenizer import OF_MODEL, load_tokenizer, set_template_options, train_tokenizer

_WORDS = " yes no 0 1 2 3 4 5 6 7 8 9"  # what an empty corpus still gives a tokenizer


def slots_of(cfg: Any) -> dict[str, Any]:
    """Return the five model slots of a composed config as plain values."""
    return {kind: plain(cfg.get(kind)) for kind in ("vision", "pruner", "projector", "layout", "llm", "adapter")}


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
    if stated := cfg.model.sha256.split():
        found = {file.name: sha256_of(file) for file in weight_files(folder)}
        if list(found.values()) != stated:
            shown = ", ".join(f"{file} {digest}" for file, digest in found.items())
            raise ZooError(f"The weights of {name!r} in {folder} are {shown}; their card states {', '.join(stated)}.")
    return folder


def tokenizer_at(source: str, template: str = "") -> Any:
    """Load the tokenizer of a checkpoint, or of a model of the zoo (`model:NAME`), fit for a vision-language model.

    Args:
        source: hub name or folder; `model:NAME` for the tokenizer of a model by name.
        template: name of a built-in chat template, in place of the tokenizer's own.

    Raises:
        ZooError: there is none; or the model trains its own tokenizer, and has no trained weights yet.
    """
    if not source.startswith(OF_MODEL):
        return load_tokenizer(source, template)
    name = source.removeprefix(OF_MODEL)
    cfg = configs.compose("load", [f"model={quoted(name)}"])
    if (found := _saved_tokenizer(weights_folder(cfg), template)) is not None:
        return found
    base = cfg.tokenizer.checkpoint or (cfg.llm or {}).get("checkpoint")
    if not base:
        raise ZooError(f"Model {name!r} has no trained weights here, so it has no tokenizer yet.")
    found = tokenizer_at(base, template or cfg.tokenizer.chat_template)
    return set_template_options(found, {} if template else cfg.tokenizer.template_options)


def tokenizer_for(cfg: Any, folder: Path | None, texts: Iterable[str] = (), made: Path | None = None) -> Any:
    """Return the tokenizer of a config's model: the saved one, the config's, that of the LLM, or a new one.

    Args:
        cfg: from `zoo.settings.schema.compose`.
        folder: of the trained weights that the model starts from, where it does.
        texts: what a new tokenizer is trained on; read only then.
        made: where the tokenizer of an interrupted run is, for a model that starts from its parts.
    """
    template = cfg.tokenizer.chat_template
    if (found := _saved_tokenizer(folder, template)) is not None:
        return found
    if source := made or cfg.tokenizer.checkpoint or (cfg.llm or {}).get("checkpoint"):
        return tokenizer_at(str(source), template)
    return train_tokenizer(_or_words(texts), cfg.tokenizer.vocab_size, template or "plain")


def _saved_tokenizer(folder: Path | None, template: str) -> Any:
    """The tokenizer in a folder of weights; None where there is none."""
    if folder is None:
        return None
    content = read_content(folder)
    if is_published(content):
        return tokenizer_in(folder, template)
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(str(folder), template, content.get("image_token_id"))
    return None


def _or_words(texts: Iterable[str]) -> Iterable[str]:
    found = False
    for text in texts:
        found = True
        yield text
    if not found:
        yield _WORDS


def plain(node: Any) -> Any:
    """A node of a config as dicts, lists and scalars."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
