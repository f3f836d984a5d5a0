"""What a command waits for, and how runs and batches go on: lines, and on a terminal a last line that is redrawn."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as LiveLine

from prefect_crew.cli import _output
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect_crew.batches.report import BatchProgress
    from prefect_crew.client.models import CrewStatus
    from prefect_crew.runs.run import OpenRun


SAY_EVERY = 10.0
"""Seconds between two lines about a batch where nothing is redrawn."""


@dataclass
class SeenRun:
    """What is known of a run that was kicked off or found. `since` is on the monotonic clock."""

    label: str
    kickoff_id: str
    idempotency_key: str | None = None
    flow_run_id: str | None = None
    since: float = field(default_factory=time.monotonic)
    state: CrewState = CrewState.PENDING
    share: str = ""
    task: str | None = None

    def update(self, status: CrewStatus, task: str | None) -> list[str]:
        """Take a status in, with its task as it may be shown; return what has changed, as lines for people."""
        from prefect_crew.artifacts.escape import progress

        lines: list[str] = []
        if not status.total_tasks or status.completed_tasks is not None or not self.share:
            self.share = progress(status) or self.share
        if task and task != self.task and not status.state.ended:
            self.task = task
            lines.append(f"{task}{self.share}")
        if status.state is not self.state:
            self.state = status.state
            if status.state is CrewState.WAITING:
                lines.append("waits for a person")  # the log says how to answer
            elif status.state.ended:
                lines.append(f"{self.state} after {time.monotonic() - self.since:.1f} s")
        return lines

    @property
    def on_record(self) -> str:
        """How its result can be had, whatever became of the command."""
        if self.idempotency_key is None:
            return f"Run {self.kickoff_id} was started."
        command = f"prefect-crew result {shlex.quote(self.idempotency_key)}"
        return f"Run {self.kickoff_id} was started and is on record: {command}."


class Progress(AbstractContextManager["Progress"]):
    """Lines on standard error. On a terminal, what is waited for is a last line that is redrawn with its seconds.

    Args:
        quiet: For commands that are quick most of the time: only a slow phase is said, and nothing stays.

    Attributes:
        seen: The run that was seen last.
        flow_run_id: The flow run of a batch.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.seen: SeenRun | None = None
        self.flow_run_id: str | None = None
        self._is_live, self._is_quiet = _output.is_terminal(sys.stderr), quiet
        self._line: LiveLine | None = None
        self._since = self._said_at = 0.0

    def phase(self, text: str, hint: str = "") -> None:
        """Say what is waited for from now on. `hint`: that it may take long."""
        self._since = time.monotonic()
        shown = f"{text}{f' ({hint})' if hint else ''}"
        if self._is_live:
            self._draw(shown)
        elif hint or not self._is_quiet:
            _output.note(f"{shown} …")

    def note(self, text: str) -> None:
        """Say something that stays on the screen."""
        if self._line is None:
            _output.note(text)
        else:
            self._line.console.print(_as_markup(text), markup=True, soft_wrap=True)

    def watch(self, run: OpenRun, status: CrewStatus | None) -> None:
        """Take in a run and its status, as a crew's `on_status` is called."""
        seen = self.seen
        if seen is None or seen.kickoff_id != run.kickoff_id:
            from prefect_crew._internal.prefect_api import flow_run_id  # Prefect is loaded by now

            in_flow_run = flow_run_id() or (run.record.flow_run_id if run.record else None)
            seen = SeenRun(run.crew.label, run.kickoff_id, run.idempotency_key, in_flow_run)
            self.seen = _output.current.seen = seen
            self.note(f"Crew {seen.label}: {'kicked off' if run.owned else 'found'} run {seen.kickoff_id}")
        if status is not None:
            task = None if status.current_task is None or run.show == "none" else run.redact_name(status.current_task)
            for line in seen.update(status, task and " ".join(task.split())[:80]):
                self.note(f"Crew {seen.label}: {line}")
        if seen.state.ended:
            self.close()
        elif self._is_live:
            word = "waits for a person" if seen.state is CrewState.WAITING else str(seen.state)
            self._draw(f"Crew {seen.label} {word}{seen.share}", since=seen.since)

    def watch_batch(self, progress: BatchProgress) -> None:
        """Show how a batch stands: what `on_progress` of `run_batch` is given."""
        from prefect_crew._internal.prefect_api import flow_run_id

        self.flow_run_id = self.flow_run_id or flow_run_id()
        name, phase = progress.name, progress.phase
        if phase == "checking":
            self.phase(f"Batch {name}: checking every row")
        elif self._is_live and phase != "done":
            self._draw(f"Batch {name}", done=progress.done, total=progress.total, figures=figures(progress))
        elif self._is_live or phase == "finishing" or time.monotonic() - self._said_at >= SAY_EVERY:
            self.close()
            self._said_at = time.monotonic()
            said = (f"{progress.done:,} of {progress.total:,} rows", figures(progress))
            self.note(f"Batch {name}: {' · '.join(filter(None, said))}")

    def close(self) -> None:
        """Stop drawing."""
        line, self._line = self._line, None
        if line is not None:
            line.stop()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _draw(
        self, text: str, *, since: float | None = None, done: int = 0, total: int | None = None, figures: str = ""
    ) -> None:
        """Draw the last line: a spinner and the seconds, or a bar where `total` is given."""
        if self._line is not None and (self._line.tasks[0].total is None) is not (total is None):
            self.close()
        if self._line is None:
            bar: list[ProgressColumn] = [] if total is None else [BarColumn(30), MofNCompleteColumn()]
            columns = (TextColumn("{task.description}"), *bar, TextColumn("[dim]{task.fields[figures]}"))
            out = _output.console(stderr=True)
            self._line = LiveLine(SpinnerColumn(), *columns, TimeElapsedColumn(), console=out, transient=True)
            self._line.add_task("", total=total, figures="")
        (task,) = self._line.tasks
        if total is None:
            task.start_time = self._since if since is None else since
        description, figures = _as_markup(text), _as_markup(figures)
        self._line.update(task.id, completed=done, total=total, description=description, figures=figures)
        self._line.start()  # not again where it is drawn already


def _as_markup(text: str) -> str:
    """Return text from outside as markup that neither steers the terminal nor styles."""
    return escape(_output.redact(_output.plain(text)))


def figures(progress: BatchProgress) -> str:
    """Return the state of a batch, without how many rows are done."""
    from prefect_crew.artifacts.escape import duration

    parts = (
        f"{progress.failed:,} failed" if progress.failed else "",
        f"{progress.uncertain:,} uncertain" if progress.uncertain else "",
        f"{progress.in_flight:,} in flight" if progress.in_flight else "",
        f"{progress.people:,} wait for a person" if progress.people else "",
        f"{progress.rate:.1f} rows/s" if progress.ended_here else "",
        f"{duration(progress.seconds_left)} left" if progress.seconds_left else "",
    )
    return " · ".join(filter(None, parts))
