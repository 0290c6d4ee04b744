"""`zoo check`: check whether the parts and data of a run fit together."""

from typing import Any

from zoo.checking.checker import check, show
from zoo.checking.data_check import check_data
from zoo.checking.plan import plan_from


def main(cfg: Any) -> None:
    """Print the report; a misfit is raised as an error."""
    report = check(plan_from(cfg))
    report.notes += check_data(cfg, report.stages)
    show(report, "The composition fits.")
