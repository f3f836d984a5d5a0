"""What progress says: as lines, and as it is drawn."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from prefect_crew.blocks import DeployedCrew
from prefect_crew.cli import _output
from prefect_crew.cli import _progress as module
from prefect_crew.cli._progress import LiveProgress, PlainProgress, RunBoard
from prefect_crew.client.models import CrewResult, CrewStatus, TaskResult
from prefect_crew.runs.run import OpenRun
from prefect_crew.states import CrewState


def status(state: CrewState = CrewState.RUNNING, task: str | None = None, **facts: Any) -> CrewStatus:
    return CrewStatus(kickoff_id="k1", state=state, current_task=task, **facts)


def run(**fields: Any) -> OpenRun:
    crew = DeployedCrew(url="https://travel.example.com", token="token-1", **fields)  # type: ignore[arg-type]
    return OpenRun(crew.crew.called("travel"), "k1", inputs={"who": "Ada Lovelace"}, owned=True)


@pytest.fixture
def board() -> RunBoard:
    return RunBoard.of(run())


def seen(board: RunBoard, *statuses: CrewStatus) -> list[list[str]]:
    return [board.see(one, one.current_task) for one in statuses]


def test_only_what_changes_is_said(board: RunBoard):
    lines = seen(
        board,
        status(task="look", total_tasks=2, completed_tasks=0),
        status(task="look", total_tasks=2, completed_tasks=0),
        status(task="write", total_tasks=2, completed_tasks=1),
        status(CrewState.COMPLETED),
    )
    assert lines[:3] == [["look (0 of 2 tasks done)"], [], ["write (1 of 2 tasks done)"]]
    assert lines[3][0].startswith("completed after ")
    assert [task.seconds is not None for task in board.tasks] == [True, True]


@pytest.mark.parametrize(
    ("facts", "shown"),
    [
        pytest.param({"total_tasks": 3, "completed_tasks": 1}, " (1 of 3 tasks done)", id="counted"),
        pytest.param({"progress": 0.25}, " (25%)", id="share"),
        pytest.param({}, "", id="unknown"),
    ],
)
def test_how_far_it_is(board: RunBoard, facts: dict[str, Any], shown: str):
    board.see(status(**facts), None)
    assert board.share() == shown


def test_a_person_is_waited_for_once(board: RunBoard):
    waiting = status(CrewState.WAITING, task="draft")
    assert seen(board, waiting, waiting) == [["draft", "waits for a person"], []]


def test_a_task_that_is_done_again_is_seen_again(board: RunBoard):
    seen(board, status(task="draft"), status(task="check"), status(task="draft"))
    assert [task.name for task in board.tasks] == ["draft", "check", "draft"]


def test_progress_never_runs_backwards(board: RunBoard):
    seen(board, status(total_tasks=3, completed_tasks=2), status(total_tasks=3))
    assert board.done == 2


def test_plain_lines(capsys: pytest.CaptureFixture[str]):
    with PlainProgress() as shown:
        shown.phase("Starting", "slow the first time")
        shown.watch(run(), None)
        shown.watch(run(), status(task="look"))
        shown.watch(run(), status(CrewState.FAILED))
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[:3] == ["Starting (slow the first time) …", "Crew travel: kicked off run k1", "Crew travel: look"]
    assert lines[3].startswith("Crew travel: failed after")


def test_a_found_run_is_not_called_kicked_off(capsys: pytest.CaptureFixture[str]):
    with PlainProgress() as shown:
        found = run()
        found.owned = False
        shown.watch(found, None)
    assert "found run k1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        pytest.param({"secret_inputs": ["who"]}, "ask ********", id="secret-input"),
        pytest.param({"show": "none"}, None, id="show-none"),
    ],
)
def test_what_may_not_be_shown_is_not(capsys: pytest.CaptureFixture[str], fields: dict[str, Any], shown: str | None):
    with PlainProgress() as plain:
        plain.watch(run(**fields), status(task="ask Ada Lovelace"))
    err = capsys.readouterr().err
    assert "Ada" not in err
    assert shown is None or shown in err


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=90, highlight=False, markup=False)
    monkeypatch.setattr(_output, "errors", lambda: console)
    return written


def test_the_last_drawing_of_a_run_stays_with_its_tasks(screen: io.StringIO):
    with LiveProgress() as live:
        live.phase("Kicking off")
        live.watch(run(), None)
        live.watch(run(), status(task="look", total_tasks=2))
        live.watch(run(), status(CrewState.COMPLETED, total_tasks=2))
        tasks = [TaskResult(name="look", agent="Scout", execution_time=3.0), TaskResult(name="write")]
        live.result(CrewResult(output="", kickoff_id="k1", tasks=tasks))
    drawn = screen.getvalue()
    last = drawn[drawn.rindex("Crew") :]
    assert "completed" in last
    assert "Scout" in last
    assert "3.0 s" in last
    assert "write" in last


def test_text_from_outside_neither_steers_nor_styles(screen: io.StringIO):
    with LiveProgress() as live:
        live.watch(run(), status(task="[bold]x[/bold]\x1b[2J"))
        live.note("see [link]")
    drawn = screen.getvalue()
    assert "[bold]x[/bold]" in drawn
    assert "\x1b[2J" not in drawn
    assert "see [link]" in drawn


def test_the_kind_of_progress_fits_where_it_goes(monkeypatch: pytest.MonkeyPatch):
    assert isinstance(module.progress(), PlainProgress)
    monkeypatch.setattr(_output, "is_terminal", lambda stream: True)
    assert isinstance(module.progress(), LiveProgress)
