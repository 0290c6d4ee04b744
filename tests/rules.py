"""A rule of `zoo test` as a test."""

import pytest

from zoo.contracts.case import Case
from zoo.contracts.rules import NotForThisPart, Rule


def keep(rule: Rule, case: Case) -> None:
    """Fail where the case breaks the rule; skip where the rule does not concern it."""
    try:
        rule.run(case)
    except NotForThisPart as why:
        pytest.skip(str(why))
