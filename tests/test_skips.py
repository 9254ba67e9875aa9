"""What is left out is told once, at the end, and continuous integration accepts little of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = {
    "conftest.py": "from tests.skips import *",
    "test_parts.py": """
import pytest
from tests.skips import lacking

@pytest.mark.parametrize("number", range(3))
def test_tiles(number):
    pytest.skip(lacking("instruction", "this CPU has no tiles"))

@pytest.mark.skipif(True, reason=lacking("program", "helm4 is not here"))
def test_chart(): ...

def test_mood():
    pytest.skip("not today")

def test_runs(): ...
""",
    "test_whole.py": "import pytest; pytest.importorskip('no_such_package')",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("suite")
    for name, content in FILES.items():
        (made / name).write_text(content)
    return made


def report(folder, *arguments, **variables):
    environment = (
        os.environ
        | {"PYTHONPATH": str(Path(__file__).parents[1]), "CI": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        | variables
    )
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", folder, "-c", os.devnull, folder]
    done = subprocess.run([*command, *arguments], env=environment, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize("arguments", [(), ("-p", "xdist", "-n", "2")], ids=["one process", "workers"])
def test_a_table_at_the_end_says_what_was_not_tested_and_what_would_bring_it(folder, arguments):
    code, text = report(folder, *arguments)
    assert code == 0
    head, _, table = text.partition("not tested here: 5 tests, 1 whole files")
    assert "helm4" not in head
    for line in (
        "this CPU has no tiles\n    tests       test_parts.py (3)\n    to have it  make test, on a CPU that has it",
        "helm4 is not here\n    tests       test_parts.py (1)\n    to have it  make test-tools",
        "could not import 'no_such_package'",
        "test_whole.py (whole)\n    to have it  make setup",
        "not today",
    ):
        assert line in table, text
    assert table.count("test_whole.py") == 1


def test_continuous_integration_accepts_a_missing_instruction_and_nothing_that_can_be_brought(folder):
    code, text = report(folder, "-p", "xdist", "-n", "2", "--continue-on-collection-errors", CI="true")
    assert code == 1
    for line in (
        "may not be skipped in continuous integration: helm4 is not here",
        "may not be skipped in continuous integration: could not import 'no_such_package'",
        "skipped for a reason that is not of tests/skips.py: not today",
    ):
        assert line in text, text
    assert "1 failed, 1 passed, 3 skipped, 2 errors" in text, text
    assert report(folder, "-k", "tiles or runs", "--ignore", folder / "test_whole.py", CI="true")[0] == 0
