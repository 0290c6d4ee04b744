"""Compose overrides, presets and recipes into the typed, checked config of a run.

Hydra composes. Nothing here imports torch, except for the modules of the components that a run chooses.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from zoo.registry import MANY, POSITIONS, ZooError, config_of, unknown
from zoo.registry.devices import require_device
from zoo.registry.table import SLOT_KINDS, group_of
from zoo.settings.overrides import prepare
from zoo.settings.schema import CONFIG_NAME, SECTIONS, RunRoot
from zoo.settings.stage import MASTER_WEIGHTS, PRECISIONS

# Options that name a folder to write to: sections and names.
FOLDERS = (("run", "dir"), ("run", "folder"), ("teach", "folder"), ("features", "folder"))

# Hydra composes by state of the process, where presets are stored, too; pages and programs load models in threads.
_ONE_AT_A_TIME = RLock()

# Groups of Hydra's own: the texts of its --help, where it logs and writes, how it sweeps. A config has nothing of them,
# and to read them takes a fifth of composing it.
_UNREAD = tuple(
    f"~hydra/{group}"
    for group in ("help", "hydra_help", "output", "launcher", "sweeper", "hydra_logging", "job_logging", "env")
)


def store_schema() -> None:
    """Store the root schema in Hydra, once: making it takes about 20 ms, and Hydra copies what it reads."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    if f"{CONFIG_NAME}.yaml" not in store.repo:
        store.store(CONFIG_NAME, RunRoot, provider="zoo")


@contextmanager
def explained() -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf into a ZooError."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        from zoo.settings.messages import explain

        raise explain(error) from error


def compose(command: str = "load", overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Any:
    """Compose and check the config of `zoo <command> <overrides>`, also inside a running Hydra job.

    Args:
        command: train, eval and check start from the default recipe, anything else from no recipe.
        overrides: as on the command line.
        config_dir: folder with more models, recipes and data, laid out as `conf/`.

    Returns:
        The typed config (a DictConfig of `RunRoot`).

    Raises:
        ZooError: the config has a mistake.
    """
    with _ONE_AT_A_TIME, explained():
        prepared = prepare(command, overrides, config_dir)
        from hydra import compose as hydra_compose

        with hydra_of_its_own(config_dir):
            typed = any(line.lstrip("+~").startswith("hydra") for line in prepared)  # they may choose in these groups
            cfg = hydra_compose(CONFIG_NAME, [*(() if typed else _UNREAD), *prepared])
        validate(cfg)
    # As an attribute and not in the content, so that config.yaml does not contain it.
    cfg.__dict__["_typed"] = Typed(command, tuple(overrides), config_dir)
    return cfg


@dataclass(frozen=True)
class Typed:
    """The words of the command line that a config was composed from."""

    command: str
    overrides: tuple[str, ...]
    config_dir: str | Path | None = None

    def options_of(self, section: str) -> list[str]:
        """Return the options of a section that were typed: `replicate` of `parallel.replicate=2`."""
        names = (word.lstrip("+").partition("=")[0] for word in self.overrides)
        return [name.removeprefix(f"{section}.") for name in names if name.startswith(f"{section}.")]

    def with_more(self, *overrides: str) -> Any:
        """Compose again, with further overrides appended."""
        return compose(self.command, [*self.overrides, *overrides], self.config_dir)


def typed_of(cfg: Any) -> Typed | None:
    """Return the words that `compose` made a config from; None for other configs and copies."""
    return cfg.__dict__.get("_typed")


@contextmanager
def hydra_of_its_own(config_dir: str | Path | None = None) -> Iterator[Any]:
    """Set up a Hydra of our own, and restore that of a running job afterwards."""
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
    """Add a user's folder to Hydra's search path, as its own `--config-dir` does."""
    from hydra.core.config_search_path import SearchPathQuery

    path = f"file://{Path(config_dir).resolve()}"
    search_path.prepend(provider="command-line", path=path, anchor=SearchPathQuery(provider="schema"))


def slots_of(cfg: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield kind, key and node of every chosen component; the key of a single slot is its kind."""
    for kind in SLOT_KINDS:
        node = cfg.get(group_of(kind))
        if kind in MANY:
            yield from ((kind, str(key), item) for key, item in (node or {}).items())
        elif node is not None:
            yield kind, kind, node


def validate(cfg: Any) -> None:
    """Check every chosen component and every stage: names, types, required values, and their dataclasses' rules.

    Raises:
        ZooError: the first mistake.
    """
    from omegaconf import OmegaConf

    require_device(cfg.device)
    for section, option in FOLDERS:
        if str(cfg[section][option]).startswith("~/"):  # as shells leave it behind `run.dir=`
            cfg[section][option] = str(Path(cfg[section][option]).expanduser())
    for kind, key, node in slots_of(cfg):
        if not hasattr(node, "keys") or "name" not in node:
            slot = group_of(kind)
            if kind in MANY:
                raise ZooError(f"{slot} {key!r} has options but is not chosen: add it with {slot}=[...,{key}].")
            raise ZooError(f"{slot} has options but no component: write {slot}=<name>.")
        config_of(kind, node)
    for kind in ("vision", "llm"):
        if cfg[kind] is None:
            raise ZooError(f"The run has no {kind}. Write {kind}=<name>, or start from a preset with model=<name>.")
    if not 0 <= cfg.max_broken <= 1:
        raise ZooError(f"max_broken is a share of the records, from 0 to 1, got {cfg.max_broken}.")
    if cfg.positions not in POSITIONS:
        raise unknown("positions", cfg.positions, POSITIONS)
    if not cfg.precision or cfg.precision not in PRECISIONS:
        raise unknown("precision", cfg.precision, filter(None, PRECISIONS))
    if cfg.master_weights not in MASTER_WEIGHTS[1:]:
        raise unknown("master_weights", cfg.master_weights, MASTER_WEIGHTS[1:])
    for section in SECTIONS:
        OmegaConf.to_object(cfg[section])  # the rules in a section's dataclass hold for objects, not for nodes
    for name, least in (("limit", 1), ("batch_size", 1), ("workers", 0), ("seed", 0)):
        if cfg[name] is not None and cfg[name] < least:
            raise ZooError(f"{name} must be at least {least}, got {cfg[name]}.")
    before: list[str] | None = None  # adapters that the previous stage detaches
    for name, node in cfg.stages.items():
        try:
            stage: Any = OmegaConf.to_object(node)
            _check_stage(stage, list(cfg.data))
            for adapter in stage.detach:
                if adapter not in cfg.adapter:
                    raise unknown("adapter of this run", adapter, map(str, cfg.adapter))
                if before is not None and adapter not in before:
                    raise ZooError(
                        f"detach names {adapter!r}, which the previous stage attached: it cannot be detached again."
                    )
        except ZooError as error:
            raise ZooError(f"stage {name!r}: {error}") from error
        before = stage.detach
    if before:
        raise ZooError(f"The last stage detaches {before[0]!r}, but the saved model would have it attached.")


def _check_stage(stage: Any, data: list[str]) -> None:
    """Check the names in a stage: its data sets are those of the run, its distiller exists and has these options."""
    for key in stage.data:
        if key not in data:
            raise unknown("data set of this run", key, data)
    if stage.distiller_node:
        config_of("distiller", stage.distiller_node)
