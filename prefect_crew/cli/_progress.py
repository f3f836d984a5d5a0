"""Live progress of runs and batches on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefect_crew.cli import _output
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.spinner import Spinner

    from prefect_crew.batches.progress import Standing
    from prefect_crew.client.models import CrewResult, CrewStatus
    from prefect_crew.runs.run import OpenRun


@dataclass
class _Task:
    name: str
    since: float
    seconds: float | None = None
    """None while it goes on."""


@dataclass
class RunBoard:
    """What is known of one run, fed by its statuses. `see` returns what has changed, as lines for people."""

    label: str
    kickoff_id: str
    since: float
    """When it was kicked off or found, on the monotonic clock."""
    bought: bool = True
    idempotency_key: str | None = None
    flow_run_id: str | None = None
    state: CrewState = CrewState.PENDING
    done: int = 0
    total: int | None = None
    progress: float | None = None
    tasks: list[_Task] = field(default_factory=list[_Task])
    ended_after: float | None = None

    @classmethod
    def of(cls, run: OpenRun) -> RunBoard:
        """Begin the board of a run that has just been kicked off or found."""
        from prefect_crew._internal.prefect_api import flow_run_id  # Prefect is loaded by now

        record = run.record
        own = flow_run_id()
        return cls(
            label=run.crew.label,
            kickoff_id=run.kickoff_id,
            since=time.monotonic(),
            bought=run.owned,
            idempotency_key=run.idempotency_key,
            flow_run_id=own or (None if record is None else record.flow_run_id),
        )

    def see(self, status: CrewStatus, current_task: str | None) -> list[str]:
        """Take a status in. `current_task` is its task as it may be shown."""
        now = time.monotonic()
        lines: list[str] = []
        self.total = status.total_tasks or self.total
        self.done = max(self.done, status.completed_tasks or 0)
        self.progress = status.progress
        running = self.tasks[-1] if self.tasks and self.tasks[-1].seconds is None else None
        if running is not None and (status.state.ended or (current_task and current_task != running.name)):
            running.seconds = now - running.since
        if current_task and not status.state.ended and (running is None or running.seconds is not None):
            self.tasks.append(_Task(current_task, now))
            lines.append(f"{current_task}{self.share()}")
        if status.state is not self.state:
            self.state = status.state
            if status.state is CrewState.WAITING:
                lines.append("waits for a person")  # how to answer stands in the log's line
        if status.state.ended:
            self.ended_after = now - self.since
            lines.append(f"{self.state} after {self.ended_after:.1f} s")
        return lines

    @property
    def task(self) -> str | None:
        """The task that the crew was last seen at."""
        return self.tasks[-1].name if self.tasks else None

    def share(self) -> str:
        """Return how far it is, as text to go behind another; empty where nobody says."""
        if self.total:
            return f" ({self.done} of {self.total} tasks done)"
        return f" ({self.progress:.0%})" if self.progress is not None else ""

    @property
    def seconds(self) -> float:
        """How long it has taken by now."""
        return time.monotonic() - self.since if self.ended_after is None else self.ended_after


_latest: RunBoard | None = None


def latest_run() -> RunBoard | None:
    """Return the run that this command has kicked off or found last: what any error after that is about."""
    return _latest


def forget() -> None:
    """Forget that run, for a process that runs several commands."""
    global _latest
    _latest = None


class Progress(AbstractContextManager["Progress"]):
    """Phases, notes and runs; it goes on showing the last of them until something else happens or it is closed.

    `board` is the run that was seen last.
    """

    board: RunBoard | None = None

    def phase(self, text: str, hint: str = "") -> None:
        """Say what is waited for from now on."""
        raise NotImplementedError

    def done(self, text: str) -> None:
        """Say that the phase is over, and what came of it."""
        raise NotImplementedError

    def note(self, text: str) -> None:
        """Say something that stays on the screen."""
        raise NotImplementedError

    def run_changed(self, board: RunBoard, lines: list[str]) -> None:
        """Show a run that was seen anew."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop drawing."""

    def watch(self, run: OpenRun, status: CrewStatus | None) -> None:
        """Take in what `watch_runs` tells."""
        global _latest
        board = self.board
        if board is None or board.kickoff_id != run.kickoff_id:
            board = _latest = self.board = RunBoard.of(run)
            what = "kicked off" if board.bought else "found"
            self.run_changed(board, [f"{what} run {board.kickoff_id}"])
        if status is not None:
            task = None if status.current_task is None or run.show == "none" else run.named(status.current_task)
            self.run_changed(board, board.see(status, task and " ".join(task.split())[:80]))

    def result(self, result: CrewResult) -> None:
        """Replace what polls have seen of the tasks by what the result says of them."""

    def __exit__(self, *_: object) -> None:
        self.close()


class PlainProgress(Progress):
    """A line whenever something changes."""

    def __init__(self) -> None:
        self._began = 0.0

    def phase(self, text: str, hint: str = "") -> None:
        """Write a line."""
        self._began = time.monotonic()
        _output.note(f"{text}{f' ({hint})' if hint else ''} …")

    def done(self, text: str) -> None:
        """Write a line with the seconds that it took, unless nobody waited."""
        seconds = time.monotonic() - self._began
        if seconds >= 0.5:
            _output.note(f"{text} ({seconds:.1f} s).")

    def note(self, text: str) -> None:
        """Write a line."""
        _output.note(text)

    def run_changed(self, board: RunBoard, lines: list[str]) -> None:
        """Write the lines."""
        for line in lines:
            _output.note(f"Crew {board.label}: {line}")


class LiveProgress(Progress):
    """Lines that are redrawn, with what was said before above them."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._spinner: Spinner | None = None
        self._phase: tuple[str, str, float] | None = None
        self._result: CrewResult | None = None

    def phase(self, text: str, hint: str = "") -> None:
        """Draw it with a spinner and its seconds."""
        self._phase = (text, hint, time.monotonic())
        self._start()

    def done(self, text: str) -> None:
        """Leave a line with the seconds that it took."""
        seconds = 0.0 if self._phase is None else time.monotonic() - self._phase[2]
        self._phase = None
        self._print(f"[green]✓[/] {_escaped(text)} [dim]({seconds:.1f} s)[/]")

    def note(self, text: str) -> None:
        """Leave a line."""
        self._print(f"[yellow]![/] {_escaped(text)}")

    def run_changed(self, board: RunBoard, lines: list[str]) -> None:
        """Draw the run from now on; its lines are in the drawing."""
        del board, lines
        self._phase = None
        self._start()

    def result(self, result: CrewResult) -> None:
        """Draw the tasks as the result tells them."""
        self._result = result

    def close(self) -> None:
        """Leave the last drawing of a run on the screen, and nothing of a phase."""
        live, self._live = self._live, None
        if live is not None:
            if self.board is None or self._phase is not None:
                live.transient = True
            live.stop()

    def _start(self) -> None:
        if self._live is None:
            from rich.live import Live
            from rich.spinner import Spinner

            self._spinner = Spinner("dots", style="cyan")
            self._live = Live(
                console=_output.errors(), get_renderable=self._draw, refresh_per_second=8, redirect_stdout=False
            )
            self._live.start()

    def _print(self, markup: str) -> None:
        console = self._live.console if self._live is not None else _output.errors()
        console.print(markup, markup=True, soft_wrap=True)

    def _draw(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        if self._phase is not None:
            text, hint, since = self._phase
            shown = f"{_escaped(text)} [dim]{time.monotonic() - since:.0f} s{f' · {hint}' if hint else ''}[/]"
            return self._spun(shown)
        if self.board is None:
            return Text("")
        return Group(*self._run(self.board))

    def _spun(self, markup: str) -> RenderableType:
        from rich.text import Text

        assert self._spinner is not None  # noqa: S101  _start made it
        # Not padded to the line's width: the ^C of a terminal would begin a line that nobody erases.
        self._spinner.update(text=Text.from_markup(markup))
        return self._spinner.render(time.monotonic())

    def _run(self, board: RunBoard) -> Iterator[RenderableType]:
        from rich.text import Text

        crew = f"Crew [bold]{_escaped(board.label)}[/]"
        about = f"[dim]run {_escaped(board.kickoff_id)} · {board.seconds:.1f} s[/]"
        if not board.state.ended:
            word = "waits for a person" if board.state is CrewState.WAITING else str(board.state)
            yield self._spun(f"{crew} {word}{board.share()} {about}")
        else:
            mark = "[green]✓[/]" if board.state is CrewState.COMPLETED else "[red]✗[/]"
            yield Text.from_markup(f"{mark} {crew} {board.state} {about}")
        if self._result is not None and self._result.tasks:
            yield _task_table(self._result)
        else:
            yield from self._tasks(board)

    def _tasks(self, board: RunBoard) -> Iterator[RenderableType]:
        from rich.text import Text

        for task in board.tasks:
            if task.seconds is not None:
                mark = (
                    "[green]✓[/]" if board.state is not CrewState.FAILED or task is not board.tasks[-1] else "[red]✗[/]"
                )
                yield Text.from_markup(f"  {mark} {_escaped(task.name)} [dim]{task.seconds:.1f} s[/]")
            else:
                seconds = time.monotonic() - task.since
                yield Text.from_markup(f"  [cyan]▸[/] {_escaped(task.name)} [dim]{seconds:.1f} s[/]")
        more = (board.total or 0) - len(board.tasks)
        if more > 0 and not board.state.ended:
            yield Text(f"  · {more} more", style="dim")


def _task_table(result: CrewResult) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    total = sum(task.execution_time or 0.0 for task in result.tasks)
    table = Table.grid(padding=(0, 2))
    for task in result.tasks:
        seconds = task.execution_time
        bar = "" if not total or seconds is None else "━" * max(1, round(16 * seconds / total))
        table.add_row(
            Text("  ✓", style="green"),
            _output.plain(task.name or "–"),
            Text(_output.plain(task.agent or ""), style="dim"),
            "" if seconds is None else f"{seconds:.1f} s",
            Text(bar, style="cyan"),
        )
    return table


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(_output.redact(_output.plain(text)))


def progress(*, quiet: bool = False) -> Progress:
    """Return the progress for this terminal, file or pipe.

    Args:
        quiet: For commands that are quick most of the time: what they wait for is seen while it lasts, on a terminal;
            elsewhere only what is slow is said.
    """
    if _output.is_terminal(sys.stderr):
        return _Fleeting() if quiet else LiveProgress()
    return _SlowOnly() if quiet else PlainProgress()


class _Fleeting(LiveProgress):
    def done(self, text: str) -> None:
        """Leave nothing behind."""
        del text
        self.close()


class _SlowOnly(PlainProgress):
    def phase(self, text: str, hint: str = "") -> None:
        """Say it only where there is a warning that it takes long."""
        if hint:
            super().phase(text, hint)

    def done(self, text: str) -> None:
        """Say nothing."""
        del text


SAY_EVERY = 10.0
"""Seconds between two plain lines."""
BAR = 30


def figures(standing: Standing) -> str:
    """Return how a batch stands, as the words behind its bar."""
    from prefect_crew.artifacts.markdown import duration

    left = standing.seconds_left
    parts = (
        f"{standing.failed:,} failed" if standing.failed else "",
        f"{standing.uncertain:,} uncertain" if standing.uncertain else "",
        f"{standing.in_flight:,} in flight" if standing.in_flight else "",
        f"{standing.people:,} wait for a person" if standing.people else "",
        f"{standing.rate:.1f} rows/s" if standing.ended_here else "",
        f"{duration(left)} left" if left and standing.done < standing.total else "",
    )
    return " · ".join(part for part in parts if part)


class PlainBatch(PlainProgress):
    """A line when something else begins, and every few seconds how it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.flow_run_id: str | None = None
        self._said_at = 0.0

    def __enter__(self) -> PlainBatch:
        return self

    def watch_batch(self, name: str, phase: str, standing: Standing | None) -> None:
        """Take in what `watch_batches` tells."""
        self.flow_run_id = self.flow_run_id or _flow_run_id()
        if phase == "checking":
            self.phase(f"Batch {name}: checking every row")
        elif phase == "running" and standing is not None:
            now = time.monotonic()
            if now - self._said_at >= SAY_EVERY:
                self._said_at = now
                self.note(f"Batch {name}: {_count(standing)}{_behind(figures(standing))}")
        elif phase == "finishing" and standing is not None:
            self.note(f"Batch {name}: {_count(standing)}, writing the output")


class LiveBatch(LiveProgress):
    """A bar that is redrawn, with what was said before above it."""

    def __init__(self) -> None:
        super().__init__()
        self.flow_run_id: str | None = None
        self._name = ""
        self._standing: Standing | None = None
        self._over = False

    def __enter__(self) -> LiveBatch:
        return self

    def watch_batch(self, name: str, phase: str, standing: Standing | None) -> None:
        """Take in what `watch_batches` tells."""
        self.flow_run_id = self.flow_run_id or _flow_run_id()
        self._name, self._over = name, phase == "done"
        if standing is None:
            self.phase(f"Batch {name}: checking every row")
        else:
            self._standing, self._phase = standing, None
            self._start()

    def close(self) -> None:
        """Leave the last drawing of the bar on the screen, and nothing of a phase."""
        live = self._live
        super().close()
        if live is not None and self._standing is not None and self._phase is None:
            _output.errors().print(self._bar(self._standing))

    def _draw(self) -> RenderableType:
        if self._standing is None or self._phase is not None:
            return super()._draw()
        return self._bar(self._standing)

    def _bar(self, standing: Standing) -> RenderableType:
        from rich.markup import escape
        from rich.text import Text

        share = standing.done / standing.total if standing.total else 1.0
        full = int(share * BAR)
        bar = f"[green]{'━' * full}[/][dim]{'━' * (BAR - full)}[/]"
        name = escape(_output.redact(_output.plain(self._name)))
        behind = _behind(figures(standing))
        shown = f"[bold]{name}[/] {bar} {standing.done:,} of {standing.total:,}[dim]{behind}[/]"
        if not self._over:
            return self._spun(shown)
        good = standing.completed == standing.total
        return Text.from_markup(f"{'[green]✓[/]' if good else '[red]✗[/]'} {shown}")


BatchProgress = PlainBatch | LiveBatch


def batch_progress() -> BatchProgress:
    """Return the progress for this terminal, file or pipe."""
    return LiveBatch() if _output.is_terminal(sys.stderr) else PlainBatch()


def _count(standing: Standing) -> str:
    return f"{standing.done:,} of {standing.total:,} rows"


def _behind(text: str) -> str:
    return f" · {text}" if text else ""


def _flow_run_id() -> str | None:
    from prefect_crew._internal.prefect_api import flow_run_id

    return flow_run_id()
