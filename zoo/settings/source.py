"""The source of a model: its parts, the folder of its weights, and its tokenizer, from a config or a name.

The check's plan, the builder, training and teachers use it. Only this file decides which tokenizer a model has.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from zoo.composed.own_checkpoints import encoder_paths, node_at, with_node
from zoo.published import is_published
from zoo.published.composed import tokens_for
from zoo.published.folder import read_content
from zoo.published.text import tokenizer_in
from zoo.registry import MANY, MODEL_SLOTS, ZooError, completed, plugins
from zoo.registry.conversion import plain_values
from zoo.registry.table import SLOT_KINDS, group_of
from zoo.settings import model_names
from zoo.settings.config import Typed, compose, typed_of
from zoo.settings.overrides import quoted
from zoo.settings.schema import tokenizer_options
from zoo.storage.weights import local_folder, sha256_of, weight_files
from zoo.text.tokenizer import OF_MODEL, add_special, load_tokenizer, set_template_options, train_tokenizer

_WORDS = " yes no 0 1 2 3 4 5 6 7 8 9"  # text for a tokenizer that is trained without data


@dataclass(eq=False)
class Source:
    """Parts, weights and tokenizer of a model, and how it is used.

    Attributes:
        name: of a preset, or the folder or repository.
        kind: preset, dir or hub.
        slots: nodes of the parts, by slot.
        tokenizer: options: checkpoint, vocab_size, chat_template, template_options.
        pretrained: use the trained weights of a preset that has some; False starts a preset from its parts. A folder
            or a repository always has its weights.
        repository, revision, sha256: of the weights on the hub; the hash is from the card.
        base: new location of the published checkpoint of a saved model; empty: as saved.
        plugins: named in the config.
        positions, attention, precision, master_weights, device: as in the config of a run.
        stages: name -> Stage, of a run.
        data: data name -> split.
        typed: the words that it was composed from.
    """

    name: str
    kind: str
    slots: dict[str, Any]
    tokenizer: dict[str, Any]
    pretrained: bool = True
    repository: str = ""
    revision: str = ""
    sha256: str = ""
    base: str = ""
    plugins: tuple[str, ...] = ()
    positions: str = "auto"
    attention: str = "auto"
    precision: str = "auto"
    master_weights: str = "fp32"
    device: str = "auto"
    stages: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    typed: Typed | None = None

    @cached_property
    def folder(self) -> Path | None:
        """The folder of the trained weights, downloaded if needed; None for a model that starts from its parts.

        Raises:
            ZooError: the weights have another hash than the card states.
        """
        if self.kind == "preset" and not self.pretrained:
            return None
        if self.kind == "dir":
            folder = Path(self.name)
        elif self.repository:
            folder = local_folder(self.repository, self.revision or None)
        else:
            if (shipped := self._shipped) is None:
                return None
            folder = shipped
        if stated := self.sha256.split():
            found = {file.name: sha256_of(file) for file in weight_files(folder)}
            if list(found.values()) != stated:
                shown = ", ".join(f"{file} {digest}" for file, digest in found.items())
                raise ZooError(
                    f"The weights of {self.name!r} in {folder} are {shown}; their card states {', '.join(stated)}."
                )
        return folder

    @property
    def is_trained(self) -> bool:
        """Whether the model has trained weights; does not download anything."""
        if self.kind != "preset" or not self.pretrained:
            return self.kind != "preset"
        return bool(self.repository) or self._shipped is not None

    @property
    def present(self) -> Path | None:
        """The folder of the trained weights, if it is known without a download."""
        return Path(self.name) if self.kind == "dir" else self._shipped

    @property
    def unused_weights(self) -> str:
        """The `model=` of the trained weights of a preset that starts from its parts; empty: there are none."""
        if self.kind != "preset" or self.pretrained:
            return ""
        if self.repository:
            return f"hub:{self.repository}"
        return f"dir:{shipped}" if (shipped := replace(self, pretrained=True)._shipped) else ""

    @cached_property
    def content(self) -> dict[str, Any]:
        """The config.json beside the weights; empty for a model that starts from its parts."""
        return read_content(self.folder) if self.folder is not None else {}

    @property
    def published(self) -> bool:
        """Whether the weights are in the layout of a published family."""
        return is_published(self.content)

    @property
    def card(self) -> Path | None:
        """The card that describes the weights: README.md beside them, of a preset our own; None for random ones."""
        if self.folder is None:
            return None
        ours = Path(str(files("zoo.model_cards"))) / f"{self.name}.md"
        return ours if self.kind == "preset" and ours.is_file() else self.folder / "README.md"

    # ---- tokenizer ---------------------------------------------------------------------------------------------

    @property
    def tokenizer_source(self) -> str | None:
        """Hub name or folder of the tokenizer, as known before weights are downloaded; None: a new one is trained."""
        folder = Path(self.name) if self.kind == "dir" else self._shipped
        if folder is None or not (folder / "tokenizer_config.json").is_file() or is_published(read_content(folder)):
            return self._stated_tokenizer
        return str(folder)

    @property
    def _shipped(self) -> Path | None:
        """The folder of the trained weights of a preset that come with the package, if it is to have them."""
        folder = Path(str(files("zoo.model_cards"))) / (self.name or "_")
        there = self.kind == "preset" and self.pretrained and not self.repository
        return folder if there and (folder / "config.json").is_file() else None

    @property
    def _stated_tokenizer(self) -> str | None:
        return self.tokenizer["checkpoint"] or (self.slots["llm"] or {}).get("checkpoint") or None

    def find_tokenizer(self, texts: Iterable[str] = (), made: Path | None = None) -> Any:
        """Return the tokenizer: the saved one, the config's, that of the LLM, or a new one.

        Args:
            texts: to train a new tokenizer on; read only then.
            made: folder of the tokenizer of an interrupted run, for a model that starts from its parts.
        """
        template = self.tokenizer["chat_template"]
        if (found := self._saved_tokenizer(template)) is not None:
            return found
        if source := made or self._stated_tokenizer:
            return tokenizer_at(str(source), "" if made else template)  # that of a run has its template
        return train_tokenizer(_or_words(texts), self.tokenizer["vocab_size"], template or "plain")

    def make_tokenizer(self, texts: Iterable[str] = (), made: Path | None = None) -> Any:
        """Return the tokenizer as the model uses it: with the options of its template and the tokens of the layout.

        Args: as `find_tokenizer`.
        """
        tokenizer = self.find_tokenizer(texts, made)
        set_template_options(tokenizer, self.tokenizer["template_options"])
        if self.folder is None:  # a saved tokenizer has them
            add_special(tokenizer, tokens_for(self.slots["layout"]))
        return tokenizer

    def _saved_tokenizer(self, template: str) -> Any:
        """Return the tokenizer beside the weights; None without one."""
        if self.folder is None:
            return None
        if self.published:
            return tokenizer_in(self.folder, template)
        if (self.folder / "tokenizer_config.json").is_file():
            if template == (self.content.get("tokenizer") or {}).get("chat_template"):
                template = ""  # the saved text, which may differ from that of the name today
            return load_tokenizer(str(self.folder), template, self.content.get("image_token_id"))
        return None


def source_of(cfg: Any, pretrained: bool = True) -> Source:
    """Return the source of a config's model.

    Args:
        cfg: from `zoo.settings.config.compose`.
        pretrained: see `Source`.
    """
    from omegaconf import OmegaConf

    return Source(
        name=cfg.model.name,
        kind=cfg.model.source,
        slots=with_encoders({slot: plain(cfg.get(slot)) for slot in MODEL_SLOTS}),
        tokenizer=plain(cfg.tokenizer),
        pretrained=pretrained,
        **{key: cfg.model[key] for key in ("repository", "revision", "sha256", "base")},
        plugins=tuple(cfg.plugins),
        **{key: cfg[key] for key in ("positions", "attention", "precision", "master_weights", "device")},
        stages={name: OmegaConf.to_object(stage) for name, stage in cfg.stages.items()},
        data={str(name): split_of(node) for name, node in cfg.data.items()},
        typed=typed_of(cfg),
    )


def with_encoders(slots: dict[str, Any]) -> dict[str, Any]:
    """Write out the options of each of several encoders, as those of other parts are: defaults may change later."""
    for path in encoder_paths(slots["vision"]):
        if len(path) > 1:
            slots = with_node(slots, path, completed("vision", node_at(slots, path)))
    return slots


def source_named(name: str, *overrides: str) -> Source:
    """Return the source of a model by name, for `zoo.load(name, ...)`."""
    # Without overrides a folder's config is complete: Hydra has nothing to compose.
    if not overrides and name.startswith("dir:"):
        plugins.load_installed()
        found = _in_folder(name)
        if found is not None:
            return found
    model_names.fetch_config(name)
    return source_of(compose("load", [f"model={quoted(name)}", *overrides]))


def _in_folder(name: str) -> Source | None:
    """Return the source of a saved model without overrides, whose config is complete, so that Hydra is not needed.

    None if its config has a mistake: composing finds it again, and raises an error with its place.
    """
    from omegaconf.errors import OmegaConfBaseException

    try:
        place, content = model_names.content_of(Path(name.removeprefix("dir:")).expanduser(), name)
        stated = model_names.trusted_slots(content, name)
        parts: dict[str, Any] = {}
        for kind in SLOT_KINDS:
            group = group_of(kind)
            node = stated.get(group)
            members = node or {} if kind in MANY else {group: node} if node is not None else {}
            if not isinstance(members, Mapping):
                return None
            found = {str(key): _completed(kind, str(key), item, name) for key, item in members.items()}
            parts[group] = found if kind in MANY else found.get(group)
        tokenizer = tokenizer_options(content.get("tokenizer") or {})
    except (ZooError, OmegaConfBaseException):
        return None
    if not parts["vision"] or not parts["llm"]:
        return None
    return Source(
        name=str(place),
        kind="dir",
        slots=with_encoders({slot: parts[slot] for slot in MODEL_SLOTS}),
        tokenizer=tokenizer,
        positions=content.get("positions", "auto"),
        data={key: split_of(node) for key, node in parts["data"].items()},
        typed=Typed("load", (f"model={quoted(name)}",)),
    )


def _completed(kind: str, key: str, node: Any, name: str) -> dict[str, Any]:
    model_names.require_member(kind, key, node, f"The config of model {name!r}")
    return completed(kind, node)


def split_of(node: Any) -> str:
    """Return the split of a data set, `train` for a part of it where the rest is an `eval_split`."""
    split = str(node.get("split", "train") or "train")
    return "train" if split.startswith("train[") and node.get("eval_split") else split


def tokenizer_at(source: str, template: str = "") -> Any:
    """Load the tokenizer of a checkpoint, or of a model of the zoo (`model:NAME`), with the tokens for images.

    Args:
        source: hub name or folder; `model:NAME` for the tokenizer of a model by name.
        template: name of a built-in chat template, instead of the tokenizer's own.

    Raises:
        ZooError: there is no tokenizer; or the model trains its own, and has no trained weights yet.
    """
    if not source.startswith(OF_MODEL):
        return load_tokenizer(source, template)
    name = source.removeprefix(OF_MODEL)
    model = source_named(name)
    if (found := model._saved_tokenizer(template)) is not None:
        return found
    if not (base := model._stated_tokenizer):
        raise ZooError(f"Model {name!r} has no trained weights here, so it has no tokenizer yet.")
    found = tokenizer_at(base, template or model.tokenizer["chat_template"])
    return set_template_options(found, {} if template else model.tokenizer["template_options"])


def _or_words(texts: Iterable[str]) -> Iterable[str]:
    found = False
    for text in texts:
        found = True
        yield text
    if not found:
        yield _WORDS


def plain(node: Any) -> Any:
    """Return a node of a config as dicts, lists and scalars."""
    from omegaconf import OmegaConf

    return plain_values(OmegaConf.to_container(node, resolve=True)) if OmegaConf.is_config(node) else node
