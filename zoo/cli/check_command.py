"""`zoo check`: say whether the parts of a run fit, and its data with them."""

from typing import Any

from zoo.checking.checker import check, show
from zoo.checking.data_check import check_data
from zoo.checking.plan import plan_from


def main(cfg: Any) -> None:
    """Show the walk, or the reason why there is none."""
    walk = check(plan_from(cfg))
    walk.notes += check_data(cfg, walk.stages)
    show(walk, "The composition fits.")
