"""The script for a card that is at hand for minutes: what a step that fails leaves, and what the next call does."""

import json
import sys

import pytest

from benchmarks.gpus import card


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    def run(steps, *options):
        monkeypatch.setattr(card, "STEPS", steps)
        monkeypatch.setattr(sys, "argv", ["card.py", "--out", str(tmp_path), *options])
        card.main()
        kept = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
        return kept, capsys.readouterr().out

    return run


def step(name, code, seconds=60, dry=None):
    return card.Step(name, seconds, ("-c", code), dry)


def test_a_step_that_fails_or_hangs_takes_no_other_with_it(call):
    steps = [
        step("fails", "raise SystemExit('no such kernel')"),
        step("hangs", "import time; time.sleep(600)", seconds=0.2),
        step("works", "print('measured OUT')"),
    ]
    kept, _ = call(steps)
    assert {name: result["status"] for name, result in kept.items()} == {"fails": 1, "hangs": 124, "works": 0}
    assert "no such kernel" in kept["fails"]["output"]


def test_the_next_call_goes_on_with_what_has_not_succeeded(call, tmp_path):
    count = "from pathlib import Path; p = Path('OUT/{0}'); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    steps = [step("works", count.format("a")), step("fails", count.format("b") + "; raise SystemExit(3)")]
    call(steps)
    _, printed = call(steps)
    assert "works: done before" in printed
    assert [(tmp_path / name).read_text() for name in "ab"] == ["x", "xx"]
    call(steps, "--only", "works")  # done or not
    assert (tmp_path / "a").read_text() == "xx"


def test_a_step_for_which_time_does_not_suffice_is_passed_over(call):
    kept, printed = call(
        [step("long", "print(1)", seconds=300), step("short", "print(1)", seconds=5)], "--seconds", "60"
    )
    assert "long: passed over" in printed
    assert set(kept) == {"short"}


def test_a_dry_run_tries_what_a_cpu_can(call):
    kept, _ = call(
        [step("card only", "raise SystemExit(1)"), step("both", "", dry=("-c", "print('dry')"))], "--dry-run"
    )
    assert set(kept) == {"both"}
    assert kept["both"]["output"] == "dry\n"


def test_all_steps_fit_into_the_time():
    assert sum(step.seconds for step in card.STEPS) <= card.LIMIT_SECONDS
