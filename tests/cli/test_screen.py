"""What stays on a terminal and in a log: bars, evaluations and messages."""

import io
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from t5tune.cli.screen import Screen, print_message
from t5tune.progress import Advanced, Evaluated, Event, Finished, Measured, Note, Started, count_done, track
from tests.support.processes.terminal import read_screen

METRICS = {"loss": 0.2849, "grad norm": 1.419, "lr": 0.019, "tokens/s": 4348.0}
BAR = re.compile("[━╸╺]+")


class Display:
    """A Screen with its own clock, and the text that it shows."""

    def __init__(self, width: int = 80, is_terminal: bool = True) -> None:
        self.drawn, self.width, self.seconds = io.StringIO(), width, 0.0
        self.screen = Screen()
        self.screen.console = Console(
            file=self.drawn,
            force_terminal=is_terminal,
            color_system="standard",
            width=width,
            get_time=lambda: self.seconds,
        )

    def report(self, event: Event) -> None:
        self.screen(event)

    def read(self) -> list[str]:
        """Return the visible lines while there are bars."""
        assert self.screen._progress is not None
        self.screen._progress.refresh()
        return self.read_end()

    def read_end(self) -> list[str]:
        """Return the visible lines, with bars shortened to one character, and without the spinner."""
        lines = read_screen(self.drawn.getvalue(), self.width)
        return [BAR.sub("━", re.sub("^[⠀-⣿] ", "  ", line)) for line in lines]


def test_a_bar_shows_elapsed_and_remaining_time() -> None:
    display = Display()
    display.report(Started("train", 2694, "steps"))
    display.seconds = 10.0
    assert display.read() == ["  train ━ 0/2,694 steps [0:10 elapsed]"]
    display.report(Advanced("train", 646))  # a resumed run begins here: these steps don't count for its speed
    display.seconds = 20.0
    display.report(Advanced("train", 656))
    assert display.read() == ["  train ━ 656/2,694 steps [0:20 elapsed, 33:58 left]"]
    display.seconds = 120.0
    display.report(Advanced("train", 657))
    assert display.read() == ["  train ━ 657/2,694 steps [2:00 elapsed, 5:39:30 left]"]


def test_a_bar_without_a_total_shows_the_count() -> None:
    display = Display()
    display.report(Started("prepare", None, "records"))
    display.seconds = 3.0
    display.report(Advanced("prepare", 1255))
    assert display.read() == ["  prepare ━ 1,255 records [0:03 elapsed]"]
    display.report(Finished("prepare"))
    assert display.read_end() == ["  prepare ━ 1,255 records [0:03 elapsed]"]


def test_bytes_are_shown_in_larger_units() -> None:
    display = Display()
    display.report(Started("merge", 12 << 30, "bytes"))
    display.report(Advanced("merge", 987 << 20))
    assert display.read() == ["  merge ━ 0.96 GiB/12.00 GiB [0:00 elapsed]"]


@pytest.mark.parametrize(
    ("width", "metrics"),
    [
        (80, "loss 0.2849"),
        (120, "loss 0.2849  grad norm 1.419"),
        (200, "loss 0.2849  grad norm 1.419  lr 0.019  tokens/s 4,348"),
    ],
)
def test_a_narrow_terminal_shows_fewer_metrics(width: int, metrics: str) -> None:
    display = Display(width)
    display.report(Started("train", 12_000, "steps"))
    display.report(Measured("train", 10, METRICS))
    for done in (600, 1200):
        display.seconds += 60.0
        display.report(Advanced("train", done))
    (line,) = display.read()
    assert line == f"  train ━ 1,200/12,000 steps [2:00 elapsed, 18:00 left] {metrics}"


class InterruptedConsole(Console):
    """Another thread draws the bars while this one prints, unless it has to wait for this one."""

    redraw: Callable[[], object] | None = None

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if (redraw := self.redraw) is not None and threading.current_thread() is threading.main_thread():
            self.redraw = None
            thread = threading.Thread(target=redraw, daemon=True)
            thread.start()
            thread.join(1.0)
        return super().render(renderable, options)


def test_a_bar_that_ends_during_printing_erases_no_line() -> None:
    display = Display()
    screen, console = display.screen, InterruptedConsole(file=display.drawn, force_terminal=True, width=80)
    screen.console = console
    display.report(Started("train", 2694, "steps"))
    display.report(Note("first"))
    display.report(Started("evaluate", 10, "examples"))
    assert (progress := screen._progress) is not None
    display.report(Finished("evaluate"))
    console.redraw = lambda: screen.redraw(progress)
    display.report(Note("second"))
    assert display.read()[:-1] == ["first", "second"]


def test_a_bar_that_took_almost_no_time_leaves_nothing() -> None:
    display = Display()
    display.report(Note("before"))
    for _ in track(range(75), "load", display.report, 75, "tensors"):
        display.seconds += 0.01
    display.report(Note("after"))
    assert display.read_end() == ["before", "after"]


def test_a_consumer_that_stops_early_ends_its_bar() -> None:
    display = Display()
    records = track(iter(range(100)), "prepare", display.report, unit="records")
    for _ in range(3):
        display.seconds += 1.0
        next(records)
    records.close()  # type: ignore[attr-defined]
    display.report(Note("after"))
    assert display.read_end() == ["  prepare ━ 2 records [0:02 elapsed]", "after"]
    assert not re.search("[⠀-⣿]", read_screen(display.drawn.getvalue(), 80)[0])


@pytest.mark.parametrize(("seconds", "time"), [(60.0, "1:00"), (0.1, "0:00")])
def test_a_run_that_was_stopped_is_not_shown_as_done(seconds: float, time: str) -> None:
    display = Display()
    display.report(Started("train", 2694, "steps"))
    display.seconds = seconds
    display.report(Advanced("train", 646))
    display.report(Finished("train"))
    display.report(Note("after"))
    assert display.read_end() == [f"  train ━ 646/2,694 steps [{time} elapsed]", "after"]


def test_ended_bars_leave_the_remaining_bars_unchanged() -> None:
    display = Display()
    display.report(Started("train", 2, "steps"))
    for step in (1, 2):
        display.seconds += 5.0
        display.report(Advanced("train", step))
        for part in ("evaluate: losses", "evaluate: predictions"):
            for _ in track("ab", part, display.report, 2, "examples"):
                display.seconds += 5.0
    display.report(Started("load", 1, "tensors"))
    display.report(Finished("train"))
    display.report(Finished("load"))
    assert display.read_end() == ["  load ━ 0/1 tensors [0:00 elapsed]"]


def test_an_evaluation_has_its_bar_and_leaves_a_line() -> None:
    display = Display()
    display.report(Started("train", 2694, "steps"))
    display.report(Advanced("train", 1898))
    with count_done("evaluate: predictions", display.report, 100, "examples") as advance:
        for _ in range(4):
            display.seconds += 5.0
            advance(8)
        train, evaluate = display.read()
        assert re.sub(" +", " ", train) == " train ━ 1,898/2,694 steps [0:20 elapsed]"
        assert re.sub(" +", " ", evaluate) == " evaluate: predictions ━ 32/100 examples [0:20 elapsed, 0:43 left]"
    values = {"loss": 0.39712, "perplexity": 1.4875, "exact_match": 48.9, "my_metric": 30.5, "field_f1": 71.25}
    display.report(Evaluated("train", 1898, values, is_best=True))
    values = {"loss": 0.41, "my_metric": 3.0}
    display.report(Evaluated("train", 1950, values, is_best=False, datasets={"train": {"loss": 0.8}}))
    assert display.read() == [
        "step 1,898  held-out loss 0.3971  perplexity 1.488  exact match 48.9",
        "my metric 30.5  field F1 71.25  (best)",
        "step 1,950  held-out loss 0.41  my metric 3  dataset train: loss 0.8",
        "  train ━ 1,898/2,694 steps [0:20 elapsed]",
    ]


def test_in_a_log_each_evaluation_is_one_line() -> None:
    display = Display(is_terminal=False)
    display.report(Started("train", 2694, "steps"))
    values = {"loss": 0.39712, "perplexity": 1.4875, "exact_match": 48.9, "my_metric": 30.5, "field_f1": 71.25}
    display.report(Evaluated("train", 1898, values, is_best=True))
    assert display.drawn.getvalue() == (
        "train: step 1898  held-out loss 0.3971  perplexity 1.488  exact match 48.9  "
        "my metric 30.5  field F1 71.25  (best)\n"
    )


def test_a_log_has_a_last_line_for_a_long_task(monkeypatch: pytest.MonkeyPatch) -> None:
    display = Display(is_terminal=False)
    for task, seconds in (("short", 1000), ("long", 0), ("even", 0)):
        display.report(Started(task, 13, "batches"))
        monkeypatch.setattr("t5tune.cli.screen.SECONDS_BETWEEN_LINES", seconds)
        display.report(Advanced(task, 7))
        if task != "even":
            monkeypatch.setattr("t5tune.cli.screen.SECONDS_BETWEEN_LINES", 1000)
        display.report(Advanced(task, 13))
        display.report(Finished(task))
    assert display.drawn.getvalue().splitlines() == [
        *("long: 7 of 13 batches", "long: 13 of 13 batches"),
        *("even: 7 of 13 batches", "even: 13 of 13 batches"),
    ]


def test_a_log_has_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t5tune.cli.screen.SECONDS_BETWEEN_LINES", 0)
    display = Display(is_terminal=False)
    display.report(Started("train", 10, "steps"))
    for step, display.seconds in ((1, 30), (3, 50)):  # the first step, which is slower, doesn't count
        display.report(Advanced("train", step))
    lines = ["train: 1 of 10 steps", "train: 3 of 10 steps, 1:10 left"]
    assert display.drawn.getvalue().splitlines() == lines


LONG_PATH = Path("/data", *["somewhere"] * 9, "conversations.jsonl")


@pytest.mark.parametrize(
    ("message", "lines"),
    [
        ("error: fits", ["error: fits"]),
        (
            "error: report_to: tensorboard isn't installed; pip install tensorboard, or leave it out",
            ["error: report_to: tensorboard isn't installed; pip install tensorboard, or leave", "it out"],
        ),
        (f"  x: {LONG_PATH}: no such file", ["  x:", f"{LONG_PATH}:", "no such file"]),
        (f"  {LONG_PATH}: no such file", [f"  {LONG_PATH}:", "no such file"]),
        ("語" * 30 + " " + "語" * 12, ["語" * 30, "語" * 12]),
        (f"{'a' * 80} b", ["a" * 80, "b"]),
    ],
)
def test_messages_are_wrapped_only_on_a_terminal(message: str, lines: list[str]) -> None:
    on_terminal, in_log = (Display(is_terminal=is_terminal) for is_terminal in (True, False))
    for display in (on_terminal, in_log):
        print_message(display.screen.console, Text(message))
    assert on_terminal.drawn.getvalue().splitlines() == lines
    assert in_log.drawn.getvalue().splitlines() == [message]
