"""`zoo bench checkpoint` runs, and what it finds out at toy sizes that does not depend on time holds."""

from tests.killed_runs import SERVER, served
from zoo.benches.checkpoint import Options, run


def test_it_saves_and_resumes_in_shares():
    tiny = Options(processes=2, width=64, layers=2, sizes="tiny", rounds=1, only="save,resume")
    with served():
        report = run(tiny, lambda line: None, SERVER)
    found = {row.what: row for row in report.rows}
    resumed = [row for what, row in found.items() if what.startswith("resuming")]
    assert len(resumed) == 4 and all(row.reached for row in resumed), report.rows
    assert all(row.value.median > 0 for what, row in found.items() if what.startswith("saving") and "over DCP" in what)
