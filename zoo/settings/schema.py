"""The config of a run: its schema, and how overrides, presets and recipes become one typed, checked config.

Hydra composes; the schema below and the dataclasses of the components are the only ones it sees. Nothing here imports
torch; the modules of the components that a run chose do.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from zoo.registry import MANY, ZooError, config_of, unknown
from zoo.registry.table import SLOT_KINDS, converted, group_of
from zoo.settings.stage import PRECISIONS, Stage

CONFIG_NAME = "zoo"
DEFAULT_RECIPE = "scenes_tiny"
DEFAULT_MODEL = "scenes_tiny"


@dataclass
class ModelSource:
    """Where the composed model and its weights come from; filled in by `model=`."""

    name: str = ""  # preset, or the folder or repository
    source: str = "preset"  # preset | dir | hub
    repository: str = ""  # on the hub, of the preset's trained weights or of the model itself
    revision: str = ""  # commit or tag of `repository`
    sha256: str = ""  # of the weights, where the card states it; of several files, by name, with blanks between
    family: str = ""  # published layout of the repository (llava, llava_next, ...); empty: the zoo's own
    base: str = ""  # where the published checkpoint lies now that a saved model was made from; empty: where it says


@dataclass
class TokenizerConfig:
    checkpoint: str | None = None  # hub name, folder, model:NAME; null: the LLM's own, or one trained on the run's text
    vocab_size: int = 4096  # of a tokenizer that is trained
    chat_template: str = ""  # name of a built-in template; empty: the tokenizer's own
    template_options: dict[str, Any] = field(default_factory=dict)  # of the template: {enable_thinking: false}


def tokenizer_options(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what a config says of its tokenizer, as plain values.

    Raises:
        OmegaConfBaseException: an option that does not exist, or a value of another type.
    """
    return converted(TokenizerConfig, stated)


@dataclass
class TeachConfig:
    """What `zoo teach` keeps, and where."""

    stage: str = ""  # whose teacher is asked; empty: the only one that has a teacher
    folder: str = ""  # of the store; empty: <run.dir>/teach/<recipe>-<stage>
    k: int = 64  # likeliest tokens kept of each position
    dtype: str = "float16"  # of their log-probabilities: float16 | float32
    shard: int = 2000  # samples in a file
    limit: int | None = None  # samples of the stage; null: all that it sees

    def __post_init__(self) -> None:
        if self.k < 1 or self.shard < 1:
            raise ZooError(f"teach.k and teach.shard must be at least 1, got {self.k} and {self.shard}.")
        if self.dtype not in ("float16", "float32"):
            raise unknown("dtype of a store", self.dtype, ("float16", "float32"))


@dataclass
class SurveyConfig:
    """How `zoo data` looks through data."""

    images: str = "exists"  # exists: there is one of that name | open: decode each; models that cut images open them
    examples: int = 3  # broken records shown of each kind
    json: str = ""  # file for all figures, and every broken record

    def __post_init__(self) -> None:
        if self.images not in ("exists", "open"):
            raise unknown("look at images (survey.images)", self.images, ("exists", "open"))
        if self.examples < 0:
            raise ZooError(f"survey.examples must be 0 or more, got {self.examples}.")


@dataclass
class RunConfig:
    """Where a run writes: `dir/<date>/<name, or the time>`."""

    dir: str = "runs"  # under which run folders are made
    name: str = ""  # of the run folder; empty: the time
    folder: str = ""  # exactly this folder, instead of one made from `dir` and `name`
    recipe: str = ""  # filled in by `recipe=`


def _defaults() -> list[Any]:
    """A later entry's `override` beats an earlier one's, and its body is merged later: the recipe has the last word."""
    slots: list[Any] = [{group_of(kind): [] if kind in MANY else None} for kind in SLOT_KINDS]
    hydra = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    return ["_self_", *slots, {"model": DEFAULT_MODEL}, {"recipe": DEFAULT_RECIPE}, *hydra]


def _hydra() -> dict[str, Any]:
    """Hydra itself writes nothing but what a sweep was; the folders are ours (`zoo.cli.sweep`, `zoo.runs.folder`)."""
    sweep = {"dir": "${run.dir}/sweeps", "subdir": "${hydra.job.num}"}
    return {"run": {"dir": "."}, "sweep": sweep, "output_subdir": None, "job": {"chdir": False}}


@dataclass
class RunRoot:
    """Everything a run knows, for `zoo train`, `zoo eval`, `zoo check` and `zoo.load` alike."""

    defaults: list[Any] = field(default_factory=_defaults)
    hydra: Any = field(default_factory=_hydra)
    # The model: one component per slot; pruner and adapter hold several, by name
    vision: Any = None
    pruner: dict[str, Any] = field(default_factory=dict)
    projector: Any = None
    layout: Any = None
    llm: Any = None
    adapter: dict[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelSource = field(default_factory=ModelSource)
    # Data and tasks, by name
    data: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    skip_broken: bool = False  # leave out records that cannot be used, and list them in skipped.jsonl; else stop
    max_broken: float = 0.1  # share of the records that may be left out, from the 100th on; more stops the run
    # Training
    stages: dict[str, Stage] = field(default_factory=dict)
    resume: str | None = None  # folder of a run, or `last`
    teach: TeachConfig = field(default_factory=TeachConfig)
    survey: SurveyConfig = field(default_factory=SurveyConfig)
    # Evaluation
    batch_size: int | None = None  # dialogs per batch; null: by the size of the model
    limit: int | None = None  # samples of each data set; null: all
    # Machine
    seed: int = 0  # of weights, data order and dropout
    device: str = "auto"  # auto | cpu | cuda | cuda:<n> | mps
    precision: str = "auto"  # auto | fp32 | bf16
    attention: str = "auto"  # auto | eager | sdpa | flex_attention | flash_attention_<n>
    workers: int = 0  # processes that share the look of zoo data; those of training are a stage's
    # The run
    plugins: list[str] = field(default_factory=list)  # modules and files to load first
    log: list[str] = field(default_factory=list)  # trackers beside metrics.jsonl: tensorboard, trackio, wandb
    run: RunConfig = field(default_factory=RunConfig)


# Groups of options of a run, by the word in front: `tokenizer.vocab_size`.
SECTIONS: dict[str, Any] = {f.name: f.type for f in fields(RunRoot) if is_dataclass(f.type)}


def store_schema() -> None:
    """Give Hydra the root schema, once: it takes some 20 ms to make, and Hydra copies what it reads from its store."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    if f"{CONFIG_NAME}.yaml" not in store.repo:
        store.store(CONFIG_NAME, RunRoot, provider="zoo")


def compose(command: str = "load", overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Any:
    """Compose and check the config of `zoo <command> <overrides>`, also inside a running Hydra job.

    Args:
        command: train, eval and check start from the default recipe, anything else from no recipe.
        overrides: as on the command line.
        config_dir: folder with more models, recipes and data, laid out as `conf/`.

    Returns:
        The typed config (a DictConfig of `RunRoot`).

    Raises:
        ZooError: anything that is wrong with the config.
    """
    from zoo.settings.messages import explained
    from zoo.settings.overrides import prepare

    with explained():
        prepared = prepare(command, overrides, config_dir)
        from hydra import compose as hydra_compose

        with hydra_of_its_own(config_dir):
            cfg = hydra_compose(CONFIG_NAME, prepared)
        validate(cfg)
    cfg.__dict__["_typed"] = Typed(command, tuple(overrides), config_dir)  # beside the content: no file is to have it
    return cfg


@dataclass(frozen=True)
class Typed:
    """What a config was composed from: the words of a person."""

    command: str
    overrides: tuple[str, ...]
    config_dir: str | Path | None = None

    def with_one_more(self, override: str) -> Any:
        """Compose again, with another override behind the others."""
        return compose(self.command, [*self.overrides, override], self.config_dir)


def typed_of(cfg: Any) -> Typed | None:
    """Return what `compose` made a config from; None where something else made it, or it was copied."""
    return cfg.__dict__.get("_typed")


@contextmanager
def hydra_of_its_own(config_dir: str | Path | None = None) -> Iterator[Any]:
    """Set up a Hydra of our own, and leave a job that is running as it was."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    store_schema()
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_module("zoo.conf", version_base="1.3"):
            inner: Any = GlobalHydra.instance().hydra
            if config_dir and inner:
                search_path = inner.config_loader.get_search_path()
                add_config_dir(search_path, config_dir)
                inner.config_loader.repository.initialize_sources(search_path)
            yield inner
    finally:
        GlobalHydra.instance().hydra = outer


def add_config_dir(search_path: Any, config_dir: str | Path) -> None:
    """Let Hydra look into a user's folder too, as its own `--config-dir` does."""
    from hydra.core.config_search_path import SearchPathQuery

    path = f"file://{Path(config_dir).resolve()}"
    search_path.prepend(provider="command-line", path=path, anchor=SearchPathQuery(provider="schema"))


def slots_of(cfg: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield kind, key and node of every component that the config chose; the key of a single slot is its kind."""
    for kind in SLOT_KINDS:
        node = cfg.get(group_of(kind))
        if kind in MANY:
            yield from ((kind, str(key), item) for key, item in (node or {}).items())
        elif node is not None:
            yield kind, kind, node


def validate(cfg: Any) -> None:
    """Check every chosen component and every stage: names, types, required values, and what their dataclasses say.

    Raises:
        ZooError: the first thing that is wrong.
    """
    from omegaconf import OmegaConf

    for kind, key, node in slots_of(cfg):
        if not hasattr(node, "keys") or "name" not in node:
            slot = group_of(kind)
            if kind in MANY:
                raise ZooError(f"{slot} {key!r} has options but is not chosen: add it with {slot}=[...,{key}].")
            raise ZooError(f"{slot} has options but no component is chosen: write {slot}=<name>.")
        config_of(kind, node)
    for kind in ("vision", "llm"):
        if cfg[kind] is None:
            raise ZooError(f"No {kind} is chosen. Write {kind}=<name>, or start from a preset with model=<name>.")
    if not 0 <= cfg.max_broken <= 1:
        raise ZooError(f"max_broken is a share of the records, from 0 to 1, got {cfg.max_broken}.")
    if not cfg.precision or cfg.precision not in PRECISIONS:
        raise unknown("precision", cfg.precision, filter(None, PRECISIONS))
    for name, least in (("limit", 1), ("batch_size", 1), ("workers", 0), ("seed", 0)):
        if cfg[name] is not None and cfg[name] < least:
            raise ZooError(f"{name} must be at least {least}, got {cfg[name]}.")
    before: list[str] | None = None  # what the stage before detaches
    for name, node in cfg.stages.items():
        try:
            stage: Any = OmegaConf.to_object(node)
            _check_stage(stage, list(cfg.data))
            for adapter in stage.detach:
                if adapter not in cfg.adapter:
                    raise unknown("adapter of this run", adapter, map(str, cfg.adapter))
                if before is not None and adapter not in before:
                    raise ZooError(f"detach names {adapter!r}, which the stage before has: an adapter that acts stays.")
        except ZooError as error:
            raise ZooError(f"stage {name!r}: {error}") from error
        before = stage.detach
    if before:
        raise ZooError(f"The last stage detaches {before[0]!r}, and the model that is saved would have it.")


def _check_stage(stage: Any, data: list[str]) -> None:
    """Check the names in a stage: its data sets are the run's, its distiller exists and has these options."""
    for key in stage.data:
        if key not in data:
            raise unknown("data set of this run", key, data)
    if stage.distiller_node:
        config_of("distiller", stage.distiller_node)
