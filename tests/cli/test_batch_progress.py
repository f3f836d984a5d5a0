"""What is seen of a batch under way: as lines, and as it is drawn."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from prefect_crew.batches.progress import Standing
from prefect_crew.cli import _output
from prefect_crew.cli import _progress as module
from prefect_crew.cli._progress import LiveBatch, PlainBatch, batch_progress, figures


def standing(**counts: Any) -> Standing:
    return Standing(total=1_200, **counts)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, highlight=False, markup=False, emoji=False)
    monkeypatch.setattr(_output, "errors", lambda: console)
    return screen


def test_only_what_there_is_is_said():
    assert figures(standing()) == ""
    told = figures(standing(completed=5, failed=2, uncertain=1, in_flight=1_000, people=3, ended_here=8))
    assert told.startswith("2 failed · 1 uncertain · 1,000 in flight · 3 wait for a person · ")
    assert "rows/s" in told
    assert told.endswith(" left")


def test_plain_lines_come_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    with PlainBatch() as shown:
        shown.watch_batch("leads", "checking", None)
        shown.watch_batch("leads", "running", standing(completed=10))
        shown.watch_batch("leads", "running", standing(completed=11))
        monkeypatch.setattr(module, "SAY_EVERY", 0.0)
        shown.watch_batch("leads", "running", standing(completed=12, failed=1))
        shown.watch_batch("leads", "finishing", standing(completed=1_200))
        shown.watch_batch("leads", "done", standing(completed=1_200))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "Batch leads: checking every row …",
        "Batch leads: 10 of 1,200 rows",
        "Batch leads: 13 of 1,200 rows · 1 failed",
        "Batch leads: 1,200 of 1,200 rows, writing the output",
    ]


@pytest.mark.parametrize(
    ("failed", "mark"), [pytest.param(0, "✓", id="all-completed"), pytest.param(7, "✗", id="some-failed")]
)
def test_the_last_bar_stays(screen: io.StringIO, failed: int, mark: str):
    with LiveBatch() as shown:
        shown.watch_batch("leads", "checking", None)
        shown.watch_batch("leads", "running", standing(completed=600))
        shown._live.refresh()  # pyright: ignore
        shown.note("something [bold]happened[/bold]")
        shown.watch_batch("leads", "done", standing(completed=1_200 - failed, failed=failed))
    drawn = screen.getvalue()
    assert "600 of 1,200" in drawn
    assert "something [bold]happened[/bold]" in drawn
    last = drawn[drawn.rindex(mark) :]
    assert "1,200 of 1,200" in last
    assert "━" * 30 in last


def test_a_batch_that_was_refused_leaves_no_bar(screen: io.StringIO):
    with LiveBatch() as shown:
        shown.watch_batch("leads", "checking", None)
    assert "━" not in screen.getvalue()


def test_a_name_neither_steers_nor_styles(screen: io.StringIO):
    with LiveBatch() as shown:
        shown.watch_batch("[red]x[/red]\x1b[2J", "running", standing())
    assert "[red]x[/red]" in screen.getvalue()
    assert "\x1b[2J" not in screen.getvalue()


def test_the_kind_of_progress_fits_where_it_goes(monkeypatch: pytest.MonkeyPatch):
    assert isinstance(batch_progress(), PlainBatch)
    monkeypatch.setattr(_output, "is_terminal", lambda stream: True)
    assert isinstance(batch_progress(), LiveBatch)
