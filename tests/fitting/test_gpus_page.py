"""docs/gpus.md says what the planner says."""

from benchmarks.gpus.table import CONTEXTS, MODELS, PAGE, page


def test_every_row_is_that_of_the_planner():
    written = PAGE.read_text()
    assert written == page(), "run python benchmarks/gpus/table.py"
    rows = [line.split("|")[1:-1] for line in written.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(MODELS) * len(CONTEXTS) - 1  # Phi-4 ends at 16k
    assert all(float(row[3]) >= 2.5 and float(row[5]) >= 4.25 for row in rows)
