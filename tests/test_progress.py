"""How long work says how far it is: the time left by what was measured, and a line at least every 30 seconds."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from allocator.cli.main import main
from allocator.run.progress import PlannedStep, Standing, Tracker
from allocator.run.progress_lines import EVERY_SECONDS, ProgressLines, json_line, standing_of, text_line

LONG_VERBS = ("learn", "fit", "refine", "export", "verify", "sweep", "kv", "prepare", "probe", "solve", "warmup")


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def standing(tracker: Tracker) -> Standing:
    found = tracker.standing()
    assert found is not None
    return found


def work(tracker: Tracker, clock: Clock, *seconds: float) -> None:
    """A unit after each of these times."""
    for of_one in seconds:
        clock.passes(of_one)
        tracker.advance()


def test_the_time_left_is_that_of_the_blocks_after_the_first(clock: Clock) -> None:
    tracker = Tracker(clock=clock)
    tracker.begin("candidates", 10, "block")
    assert standing(tracker).step_left_seconds is None  # nothing has been measured
    work(tracker, clock, 100)
    assert standing(tracker).step_left_seconds == 900
    work(tracker, clock, 10, 10)
    assert standing(tracker).step_left_seconds == 70
    clock.passes(4)
    assert standing(tracker).step_left_seconds == 66
    clock.passes(60)  # this block is a slow one, the others are still to come
    assert standing(tracker).step_left_seconds == 60


def test_what_a_resumed_run_finds_done_is_no_speed(clock: Clock) -> None:
    tracker = Tracker(clock=clock)
    tracker.begin("measuring", 40, "block")
    for _ in range(30):
        tracker.skip()
    assert standing(tracker).step_left_seconds is None
    work(tracker, clock, 20, 20)
    assert (standing(tracker).done, standing(tracker).step_left_seconds) == (32, 160)


def test_steps_to_come_take_the_time_of_their_arithmetic(clock: Clock) -> None:
    tracker = Tracker(clock=clock)
    tracker.plan([PlannedStep("solving", 0.0)])
    tracker.plan([PlannedStep("candidates", 10.0), PlannedStep("measuring", 40.0)])
    tracker.begin("candidates", 5, "block")
    work(tracker, clock, 30, 20)
    now = standing(tracker)
    assert (now.number, now.steps, now.then) == (1, 3, ["measuring", "solving"])
    assert (now.step_left_seconds, now.left_seconds) == (60, 60 + 4 * 5 * 20)
    work(tracker, clock, 20, 20, 20)
    tracker.begin("measuring", 4, "block")
    work(tracker, clock, 50, 50)  # slower or faster than foreseen, it is measured now
    assert standing(tracker).left_seconds == 100


def test_without_known_arithmetic_no_time_is_made_up(clock: Clock) -> None:
    tracker = Tracker(clock=clock)
    tracker.plan([PlannedStep("candidates", 10.0), PlannedStep("measuring")])
    tracker.begin("candidates", 5, "block")
    work(tracker, clock, 20, 20)
    assert (standing(tracker).step_left_seconds, standing(tracker).left_seconds) == (60, None)
    assert "about 0:01:00 left of this step, then measuring" in text_line(standing(tracker))


def test_a_planned_step_that_is_needless_is_passed_over(clock: Clock) -> None:
    tracker = Tracker(clock=clock)
    tracker.plan([PlannedStep(name) for name in ("reading", "candidates", "measuring")])
    tracker.begin("reading")
    tracker.begin("measuring")
    assert (standing(tracker).number, standing(tracker).steps, standing(tracker).then) == (3, 3, [])


def test_a_line_at_least_every_30_seconds_also_inside_one_block(clock: Clock) -> None:
    told: list[tuple[float, Standing]] = []
    lines = ProgressLines(lambda line: told.append((clock.now, standing_of(json.loads(line)))), json_line, clock=clock)
    lines.tracker.begin("measuring", 4, "block")
    for second in range(400):
        clock.passes(1)
        if second == 100:
            lines.tracker.advance(0.5, "model.layers.0.mlp.up_proj")
        elif second == 200:
            lines.tracker.advance(0.5)
        lines.tick()
    times = [moment for moment, _ in told]
    assert max(later - earlier for earlier, later in pairwise(times)) <= EVERY_SECONDS
    assert len(told) <= 2 + 400 / EVERY_SECONDS
    assert any((s.done, s.detail) == (0.5, "model.layers.0.mlp.up_proj") for _, s in told)


def test_as_soon_as_a_block_is_done_a_line_says_how_long_it_will_take(clock: Clock) -> None:
    told: list[str] = []
    lines = ProgressLines(told.append, text_line, clock=clock)
    lines.tracker.begin("candidates", 36, "block")
    clock.passes(20)
    lines.tick()
    lines.tracker.advance()
    assert told[0].startswith("candidates: 36 blocks, 0:00:00 elapsed")
    assert len(told) == 2
    assert told[1].startswith("candidates: 1 of 36 blocks, 0:00:20 elapsed, about 0:11:40 left; ")
    assert told[1].endswith(" GiB resident")


def test_json_lines_have_the_fields_that_are_documented() -> None:
    line = json.loads(json_line(Standing(step="writing", number=1, steps=2, unit="file", done=1, total=2)))
    page = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    section = page.split("## Lines of progress")[1].split("\n## ")[0]
    assert [name for name in line if f"`{name}`" not in section] == []
    assert standing_of(line).share == 0.5


@pytest.mark.parametrize("verb", LONG_VERBS)
def test_every_verb_that_works_long_can_be_told_how_to_say_so(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert "--progress {bar,lines,json,none}" in capsys.readouterr().out
