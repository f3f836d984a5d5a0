"""What progress says of runs and batches: as lines, and as it is drawn."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from prefect_crew.batches.outcomes import RowState
from prefect_crew.batches.report import BatchProgress
from prefect_crew.blocks import DeployedCrew, crew_of
from prefect_crew.cli import _output
from prefect_crew.cli._output import Progress, SeenRun
from prefect_crew.client.inputs import Inputs
from prefect_crew.client.models import CrewStatus
from prefect_crew.runs.options import RunOptions, RunRequest
from prefect_crew.runs.run import LiveRun
from prefect_crew.states import CrewState


def status(state: CrewState = CrewState.RUNNING, task: str | None = None, **facts: Any) -> CrewStatus:
    return CrewStatus(kickoff_id="k1", state=state, current_task=task, **facts)


def run(**fields: Any) -> LiveRun:
    stored = DeployedCrew(url="https://travel.example.com", token="token-1", **fields)  # type: ignore[arg-type]
    crew = crew_of(stored).called("travel")
    request = RunRequest.of(crew, Inputs.of({"who": "Ada Lovelace"}), RunOptions())
    return LiveRun(crew, "k1", request=request, owned=True)


def batch(phase: Any = "running", name: str = "leads", **counts: Any) -> BatchProgress:
    states = {state: counts.pop(str(state)) for state in RowState if str(state) in counts}
    return BatchProgress(name, phase, total=1_200, counts=states, **counts)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=120, highlight=False, markup=False, emoji=False)
    monkeypatch.setattr(_output, "console", lambda **_: console)
    monkeypatch.setattr(_output, "is_terminal", lambda _: True)
    yield written
    _output.begin()


@pytest.mark.parametrize(
    ("statuses", "lines"),
    [
        pytest.param(
            [
                status(task="look", total_tasks=2, completed_tasks=0),
                status(task="look", total_tasks=2, completed_tasks=0),
                status(task="write", total_tasks=2, completed_tasks=1),
                status(task="edit", total_tasks=2),
                status(CrewState.COMPLETED),
            ],
            [*(f"{task} of 2 tasks done)" for task in ("look (0", "write (1", "edit (1")), "completed after 0.0 s"],
            id="only-what-changes",
        ),
        pytest.param([status(CrewState.WAITING, task="draft")] * 2, ["draft", "waits for a person"], id="person-once"),
        pytest.param([status(task="a", progress=0.25)], ["a (25%)"], id="share"),
    ],
)
def test_what_changes_is_said(statuses: list[CrewStatus], lines: list[str]):
    seen = SeenRun("travel", "k1")
    assert [line for one in statuses for line in seen.update(one, one.current_task)] == lines


def test_plain_lines(capsys: pytest.CaptureFixture[str]):
    found = run()
    found.kickoff_id, found.owned = "k2", False
    with Progress() as shown:
        shown.phase("Starting", "slow the first time")
        for one, seen in (
            (run(), None),
            (run(), status(task="look")),
            (run(), status(CrewState.FAILED)),
            (found, None),
        ):
            shown.watch(one, seen)
    with Progress(quiet=True) as shown:
        shown.phase("Loading")
    assert capsys.readouterr() == (
        "",
        "Starting (slow the first time) …\n"
        "Crew travel: kicked off run k1\n"
        "Crew travel: look\n"
        "Crew travel: failed after 0.0 s\n"
        "Crew travel: found run k2\n",
    )


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        pytest.param({"secret_inputs": ["who"]}, "ask ********", id="secret-input"),
        pytest.param({"show": "none"}, "kicked off", id="show-none"),
    ],
)
def test_what_may_not_be_shown_is_not(capsys: pytest.CaptureFixture[str], fields: dict[str, Any], shown: str):
    with Progress() as lines:
        lines.watch(run(**fields), status(task="ask Ada Lovelace"))
    err = capsys.readouterr().err
    assert "Ada" not in err
    assert shown in err


def test_on_a_terminal_the_lines_stay_and_a_last_one_is_redrawn(screen: io.StringIO):
    with Progress() as live:
        live.phase("Checking")
        live.watch(run(), status(task="[bold]x[/bold]\x1b[2J", total_tasks=2))
        _output.current.line.refresh()  # type: ignore[union-attr]
        _output.note("see [link]")
        live.watch(run(), status(CrewState.COMPLETED, total_tasks=2))
    drawn = screen.getvalue()
    for part in ("Checking", "Crew travel running (0 of 2 tasks done)", "see [link]", "Crew travel: completed"):
        assert part in drawn
    assert "[bold]x[/bold]" in drawn, "text of a crew neither styles"
    assert "\x1b[2J" not in drawn, "nor steers"


def test_a_batch_is_a_bar_on_a_terminal_and_a_line_at_its_end(screen: io.StringIO):
    with Progress() as shown:
        name = "[red]leads[/red]\x1b[2J"
        shown.watch_batch(batch("checking", name))
        shown.watch_batch(batch("running", name, completed=600))
        _output.current.line.refresh()  # type: ignore[union-attr]
        shown.watch_batch(batch("done", name, completed=1_193, failed=7))
    drawn = screen.getvalue()
    assert "600/1200" in drawn
    assert "1,200 of 1,200 rows · 7 failed" in drawn.splitlines()[-1]
    assert "[red]leads[/red]" in drawn
    assert "\x1b[2J" not in drawn
