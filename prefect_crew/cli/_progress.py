"""What a command waits for, and how runs and batches go on: lines, and on a terminal a last line that is redrawn."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as LiveLine

from prefect_crew.cli import _output
from prefect_crew.cli._output import SeenRun
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect_crew.batches.progress import BatchProgress
    from prefect_crew.client.models import CrewStatus
    from prefect_crew.runs.run import OpenRun


SAY_EVERY = 10.0
"""Seconds between two lines about a batch where nothing is redrawn."""


class Progress(AbstractContextManager["Progress"]):
    """Lines on standard error. On a terminal, what is waited for is a last line that is redrawn with its seconds.

    Args:
        live: Whether it goes to such a terminal.
        quiet: For commands that are quick most of the time: only a slow phase is said, and nothing stays.

    Attributes:
        seen: The run that was seen last.
        flow_run_id: The flow run of a batch.
    """

    def __init__(self, *, live: bool, quiet: bool = False) -> None:
        self.seen: SeenRun | None = None
        self.flow_run_id: str | None = None
        self._is_live, self._is_quiet = live, quiet
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

    def done(self, text: str) -> None:
        """Say that the phase is over, and how long it took."""
        seconds = time.monotonic() - self._since
        self.close()
        if not self._is_quiet and (self._is_live or seconds >= 0.5):
            self.note(f"{'✓ ' if self._is_live else ''}{text} ({seconds:.1f} s).")

    def note(self, text: str) -> None:
        """Say something that stays on the screen."""
        if self._line is None:
            _output.note(text)
        else:
            self._line.console.print(_clean(text), markup=True, soft_wrap=True)

    def watch(self, run: OpenRun, status: CrewStatus | None) -> None:
        """Take in a run and its status, as a crew's `on_status` is called."""
        seen = self.seen
        if seen is None or seen.kickoff_id != run.kickoff_id:
            seen = self.seen = _output.current.seen = SeenRun.of(run)
            self.note(f"Crew {seen.label}: {'kicked off' if seen.is_new else 'found'} run {seen.kickoff_id}")
        if status is not None:
            task = None if status.current_task is None or run.show == "none" else run.redact_name(status.current_task)
            for line in seen.update(status, task and " ".join(task.split())[:80]):
                self.note(f"Crew {seen.label}: {line}")
        if self._is_live and seen.state.ended:
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
            return
        rest = figures(progress)
        if self._is_live and phase != "done":
            self._draw(f"Batch {name}", done=progress.done, total=progress.total, figures=rest)
            return
        if self._is_live or phase == "finishing" or time.monotonic() - self._said_at >= SAY_EVERY:
            self.close()
            self._said_at = time.monotonic()
            said = " · ".join(filter(None, (f"{progress.done:,} of {progress.total:,} rows", rest)))
            self.note(f"Batch {name}: {said}")

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
        fresh = self._line is None or (self._line.tasks[0].total is None) is not (total is None)
        if fresh:
            self.close()
            bar: list[ProgressColumn] = [] if total is None else [BarColumn(30), MofNCompleteColumn()]
            columns = (TextColumn("{task.description}"), *bar, TextColumn("[dim]{task.fields[figures]}"))
            out = _output.console(stderr=True)
            self._line = LiveLine(SpinnerColumn(), *columns, TimeElapsedColumn(), console=out, transient=True)
            self._line.add_task("", total=total, figures="")
        assert self._line is not None  # noqa: S101 - made above
        (task,) = self._line.tasks
        if total is None:
            task.start_time = self._since if since is None else since
        self._line.update(task.id, description=_clean(text), completed=done, total=total, figures=_clean(figures))
        if fresh:
            self._line.start()


def _clean(text: str) -> str:
    """Return text from outside as markup that neither steers the terminal nor styles."""
    return escape(_output.redact(_output.plain(text)))


def figures(progress: BatchProgress) -> str:
    """Return how a batch stands, besides how many rows are done."""
    from prefect_crew.artifacts.markdown import duration

    left = progress.seconds_left
    parts = (
        f"{progress.failed:,} failed" if progress.failed else "",
        f"{progress.uncertain:,} uncertain" if progress.uncertain else "",
        f"{progress.in_flight:,} in flight" if progress.in_flight else "",
        f"{progress.people:,} wait for a person" if progress.people else "",
        f"{progress.rate:.1f} rows/s" if progress.ended_here else "",
        f"{duration(left)} left" if left else "",
    )
    return " · ".join(part for part in parts if part)


def progress(*, quiet: bool = False) -> Progress:
    """Return the progress for this terminal, file or pipe."""
    return Progress(live=_output.is_terminal(sys.stderr), quiet=quiet)
