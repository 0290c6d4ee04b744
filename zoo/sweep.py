"""`zoo train -m`: every combination as a run of its own, each with the options that fit what it chose.

A shared option such as `pruner.random.keep_ratio=0.5` is left out of the jobs that do not choose `random`; jobs that are
then equal run once. All jobs are planned, and their names checked, before the first one starts.
"""

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins


class ZooSweeper(BasicSweeper):
    """Hands the planned jobs to whatever launcher the run has."""

    jobs: list[list[str]] = []

    @staticmethod
    def split_arguments(overrides: Any, max_batch_size: int | None) -> list[list[list[str]]]:
        """Return the planned jobs in one batch; Hydra's own product of `overrides` is not asked."""
        return [ZooSweeper.jobs]


def register_sweeper() -> None:
    """Make the sweeper known to Hydra, which looks for plugins in places of its own otherwise."""
    Plugins.instance().register(ZooSweeper)
    node = {"_target_": f"{__name__}.ZooSweeper", "max_batch_size": None, "params": None}
    ConfigStore.instance().store("zoo", node, group="hydra/sweeper", provider="zoo")
