"""Components as options of Hydra's config groups, stored just before a config is composed.

The group of a kind is its name, but data sets are chosen with `data=`. A member of a slot that holds several has a key
of its own (`pruner.random.keep_ratio`), so that several can be chosen and each keeps its typed options. A
component's module is imported when Hydra first reads its node, so that a run imports only what it chose.
"""

from dataclasses import is_dataclass
from functools import lru_cache
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore

from zoo.registry.table import EMPTY_SLOT, SLOT_KINDS, get, group_of, names
from zoo.registry.values import MANY


class ComponentNode(ConfigNode):
    """A config node that is made when it is first read."""

    def __init__(self, kind: str, component: str, key: str = "") -> None:
        group, key = group_of(kind), key or component
        self.kind, self.component = kind, component
        self.name, self.group, self.provider = f"{key}.yaml", group, "zoo"
        self.package = f"{group}.{key}" if kind in MANY else None

    def __getattr__(self, attribute: str) -> Any:
        if attribute != "node":  # the only field that needs the component's module, hence an import
            raise AttributeError(attribute)
        self.node = _structured(get(self.kind, self.component).node)
        return self.node


@lru_cache(maxsize=512)
def _structured(schema: Any) -> Any:
    """The typed node of a component's options, made once: Hydra copies what it reads from the store."""
    from omegaconf import DictConfig, OmegaConf

    node = OmegaConf.structured(schema)
    for _, value in node.items_ex(resolve=False):
        if isinstance(value, DictConfig) and not is_dataclass(OmegaConf.get_type(value)):
            OmegaConf.set_struct(value, False)  # an option that is a dict takes any key
    return node


class SharedRepo(dict[str, Any]):
    """What Hydra's store holds. A deep copy of the store shares it.

    Hydra copies the whole store for each config that it composes, and only reads from the copy. Presets that were made
    in this process add 0.6 ms each to such a copy, so that the jobs of a long sweep would start ever more slowly.
    """

    def __deepcopy__(self, memo: Any) -> "SharedRepo":
        return self


def flush() -> None:
    """Make every registered component an option of its group; add what was registered since the last time."""
    store = ConfigStore.instance()
    if not isinstance(store.repo, SharedRepo):
        store.repo = SharedRepo(store.repo)
    repo = store.repo
    for kind in SLOT_KINDS:
        group = repo.setdefault(group_of(kind), {})
        group.update({f"{name}.yaml": ComponentNode(kind, name) for name in names(kind)})
    for name in ("model", "recipe", *(kind for kind in SLOT_KINDS if kind not in MANY)):
        if f"{EMPTY_SLOT}.yaml" not in repo.setdefault(name, {}):
            ConfigStore.instance().store(EMPTY_SLOT, {}, group=name, package="_global_", provider="zoo")


def add_option(kind: str, key: str, component: str) -> None:
    """Allow a member of a slot of several to be chosen under a key other than the component's name."""
    ConfigStore.instance().repo[group_of(kind)][f"{key}.yaml"] = ComponentNode(kind, component, key)
