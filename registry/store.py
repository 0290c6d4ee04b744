"""Components as options of Hydra's config groups, put there just before a config is composed.

The group of a kind is its name, but data sets are chosen with `data=`. A member of a slot that holds several stands
below its own name (`pruner.random.keep_ratio`), so that several can be chosen and each keeps its typed options. A
component's module is imported when Hydra first reads its node, so that a run imports only what it chose.
"""

from dataclasses import is_dataclass
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore

from zoo.registry.contracts import KINDS, MANY
from zoo.registry.core import get, names, source_options

NOBODY = "_none_"  # the option behind `projector=null`: Hydra has no way to say it on a command line
SLOT_KINDS = tuple(kind for kind in KINDS if kind != "distiller")  # a distiller belongs to a stage, not to the run


def group_of(kind: str) -> str:
    """Return the config group and the key in the root config of a kind."""
    return "data" if kind == "dataset" else kind


def kind_of(group: str) -> str | None:
    """Return the kind whose members a config group holds, or None."""
    kind = "dataset" if group == "data" else group
    return kind if kind in SLOT_KINDS else None


class ComponentNode(ConfigNode):
    """A config node that is made when it is first read."""

    def __init__(self, kind: str, component: str, key: str = "", typed: bool = True) -> None:
        group, key = group_of(kind), key or component
        self.kind, self.component, self.typed = kind, component, typed
        self.name, self.group, self.provider = f"{key}.yaml", group, "zoo"
        self.package = f"{group}.{key}" if kind in MANY else None

    def __getattr__(self, attribute: str) -> Any:
        if attribute != "node":
            raise AttributeError(attribute)
        from omegaconf import DictConfig, OmegaConf

        if self.typed:
            self.node = OmegaConf.structured(get(self.kind, self.component).node)
            for _, value in self.node.items_ex(resolve=False):
                if isinstance(value, DictConfig) and not is_dataclass(OmegaConf.get_type(value)):
                    OmegaConf.set_struct(value, False)  # an option that is a dict takes any key
        else:
            options = source_options(self.kind, self.component)
            self.node = OmegaConf.create({"name": self.component, **{o.name: None for o in options}})
        return self.node


def flush(typed: bool = True) -> None:
    """Make every registered component an option of its group.

    With `typed=False` the options are read from the source text, without values and without importing anything: enough
    for completion.
    """
    repo = ConfigStore.instance().repo
    for kind in SLOT_KINDS:
        options = {f"{name}.yaml": ComponentNode(kind, name, typed=typed) for name in names(kind)}
        repo.setdefault(group_of(kind), {}).update(options)
    for group in ("recipe", *(kind for kind in SLOT_KINDS if kind not in MANY)):
        ConfigStore.instance().store(NOBODY, {}, group=group, package="_global_", provider="zoo")


def add_option(kind: str, key: str, component: str) -> None:
    """Let a member of a slot of several be chosen under a key that is not the component's own name."""
    ConfigStore.instance().repo[group_of(kind)][f"{key}.yaml"] = ComponentNode(kind, component, key)
