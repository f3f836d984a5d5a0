"""The output of commands: results on standard output, everything else on standard error; never a token.

The progress of a command is written as lines too.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from json import dumps
from typing import TYPE_CHECKING, Any, cast

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.prompt import Confirm
from rich.table import Table

from prefect_crew._text import plain
from prefect_crew.client.redaction import Redactor
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect_crew.batches.report import BatchReport
    from prefect_crew.client.models import CrewStatus
    from prefect_crew.runs.run import LiveRun


@dataclass
class Invocation:
    """One run of the program.

    Attributes:
        debug: Whether errors show their traceback, and Prefect's logs are shown.
        tokens: Texts that must not be written.
        seen: The run that the command kicked off or found last, for later errors.
    """

    debug: bool = False
    tokens: set[str] = field(default_factory=set[str], repr=False)
    seen: SeenRun | None = None

    def hide(self, token: str) -> str:
        """Keep a token out of everything that is written from now on, and return it."""
        if token.strip():
            self.tokens.add(token.strip())
        return token


current = Invocation()  # One command a process: `main` replaces it, and each line that is written is redacted by it.


def begin(*, debug: bool = False) -> Invocation:
    """Replace `current` for a new command: a process may run several."""
    global current
    current = Invocation(debug=debug)
    return current


def redact(text: str) -> str:
    """Return the text without any token that this command was given."""
    return Redactor(tokens=current.tokens)(text) if current.tokens else text


def console(*, stderr: bool = False) -> Console:
    """Return the console of standard output, or of standard error. Rich colours terminals only, and heeds NO_COLOR."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal that draws."""
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def note(text: str, style: str | None = None) -> None:
    """Write a line for people to standard error."""
    console(stderr=True).print(redact(plain(text)), style=style, soft_wrap=True)


def confirm(question: str, *, yes: bool) -> None:
    """Go on only if a person agrees, with --yes (`yes`) or on the terminal.

    Raises:
        ConfigurationError: There is no terminal for the question.
        CrewError: The answer was no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigurationError(f"{question} Without a terminal this needs --yes. Nothing was changed.")
    is_agreed = False
    with suppress(EOFError):  # the end of the input, as Ctrl-D gives it, is no yes
        is_agreed = Confirm.ask(redact(plain(question)), console=console(stderr=True), default=False)
    if not is_agreed:
        raise CrewError("Nothing was changed.")


def put(text: str = "", style: str | None = None, *, json: Any = None) -> None:
    """Write a line to standard output, unchanged to a file or a pipe, fitted and styled on a terminal.

    Where there is `json`, that is written instead.
    """
    if json is not None:
        put_json(json)
    elif is_terminal(sys.stdout):
        console().print(redact(plain(text)), style=style, soft_wrap=True)
    else:
        sys.stdout.write(redact(text) + "\n")


def put_markdown(text: str) -> None:
    """Write a crew's text, rendered on a terminal, unchanged elsewhere."""
    if not is_terminal(sys.stdout):
        put(text)
        return
    from rich.markdown import Markdown  # a parser of Markdown, which few commands need

    out = console()
    out.print(Markdown(redact(plain(text)), hyperlinks=False), width=min(out.width, 100))


def put_rows(header: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str = "", json: Any = None) -> None:
    """Write a table, drawn on a terminal, with tabs between its columns elsewhere. Without rows, write `empty`.

    Where there is `json`, that is written instead.
    """
    if json is not None:
        put_json(json)
        return
    rows = [[redact(plain(" ".join(text.split()))) for text in row] for row in rows]
    if not rows:
        put(empty)
    elif is_terminal(sys.stdout):
        # No word is cut in two: a key has to be copied whole. A terminal too narrow for one wraps the line by itself.
        narrowest, out = 0, console()
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
        for cells in zip(header, *rows, strict=True):
            table.add_column(cells[0], no_wrap=not any(" " in cell for cell in cells))
            narrowest += 3 + max(map(cell_len, " ".join(cells).split()))
        for row in rows:
            table.add_row(*row)
        out.width = max(out.width, narrowest)
        out.print(table)
    else:
        for row in (header, *rows):
            put("\t".join(row))


def put_facts(facts: Mapping[str, Any]) -> None:
    """Write a line for each fact that there is: a text, a number or a list."""
    for name, fact in facts.items():
        if fact and not isinstance(fact, dict):
            label = "to do" if name == "todo" else name.replace("_", " ")
            text = "; ".join(map(str, cast("list[Any]", fact))) if isinstance(fact, list) else str(fact)
            put(f"  {label[0].upper()}{label[1:]}: {' '.join(text.split())}")


def put_json(value: Any) -> None:
    """Write one JSON document to standard output, with escapes for characters that its encoding may lack."""
    is_ascii = (sys.stdout.encoding or "utf-8").lower() != "utf-8"  # a lone surrogate is written as its escape
    sys.stdout.write(redact(dumps(value, ensure_ascii=is_ascii, indent=2, default=str)) + "\n")
    sys.stdout.flush()


SAY_EVERY = 10.0
"""Seconds between two lines about a batch."""


@dataclass
class SeenRun:
    """The facts about a run that was kicked off or reattached to. `since` is on the monotonic clock."""

    label: str
    kickoff_id: str
    idempotency_key: str | None = None
    flow_run_id: str | None = None
    since: float = field(default_factory=time.monotonic)
    state: CrewState = CrewState.PENDING
    task: str | None = None

    def update(self, status: CrewStatus, task: str | None) -> list[str]:
        """Note a status and its masked task, and return the changes as lines for people."""
        from prefect_crew.artifacts.escape import progress

        lines: list[str] = []
        if task and task != self.task and not status.state.ended:
            self.task = task
            lines.append(f"{task}{progress(status)}")
        if status.state is not self.state:
            self.state = status.state
            if status.state is CrewState.WAITING:
                lines.append("waits for a person")  # the log says how to answer
            elif status.state.ended:
                lines.append(f"{self.state} after {time.monotonic() - self.since:.1f} s")
        return lines

    @property
    def started(self) -> str:
        """The sentence that leads to the run's result if the command fails."""
        if self.idempotency_key is None:
            return f"Run {self.kickoff_id} was started."
        return f"Run {self.kickoff_id} was started: prefect-crew result {shlex.quote(self.idempotency_key)}."


class Progress:
    """Lines on standard error about a run or a batch, one for each change.

    Attributes:
        seen: The run that was seen last.
        flow_run_id: The flow run of a batch.
        batch: The name of a batch, which its call may give as a template.
    """

    def __init__(self) -> None:
        self.seen: SeenRun | None = None
        self.flow_run_id: str | None = None
        self.batch: str | None = None
        self._said_at = 0.0

    def watch(self, run: LiveRun, status: CrewStatus | None) -> None:
        """Note a run and its status. A crew calls this as its `on_status`."""
        watched = self.seen
        if watched is None or watched.kickoff_id != run.kickoff_id:
            from prefect_crew._internal.prefect_api import flow_run_id  # Prefect is loaded by now

            in_flow_run = flow_run_id() or (run.attempt.flow_run_id if run.attempt else None)
            watched = SeenRun(run.crew.label, run.kickoff_id, run.idempotency_key, in_flow_run)
            self.seen = current.seen = watched
            note(f"Crew {watched.label}: {'kicked off' if run.owned else 'found'} run {watched.kickoff_id}")
        if status is not None:
            task = None if status.current_task is None or run.show == "none" else run.redact_name(status.current_task)
            for line in watched.update(status, task and " ".join(task.split())[:80]):
                note(f"Crew {watched.label}: {line}")

    def watch_batch(self, progress: BatchReport) -> None:
        """Show the progress of a batch. `run_batch` calls this as its `on_progress`."""
        from prefect_crew._internal.prefect_api import flow_run_id

        self.flow_run_id, self.batch = self.flow_run_id or flow_run_id(), progress.name
        if progress.phase == "checking":
            note(f"Batch {progress.name}: checking every row …")
        elif progress.phase in ("finishing", "done") or time.monotonic() - self._said_at >= SAY_EVERY:
            self._said_at = time.monotonic()
            note(f"Batch {progress.name}: {figures(progress)}")


def figures(progress: BatchReport) -> str:
    """Return a batch's progress as a text."""
    from prefect_crew.artifacts.escape import duration

    parts = (
        f"{progress.done:,} of {progress.total:,} rows",
        f"{progress.failed:,} failed" if progress.failed else "",
        f"{progress.uncertain:,} uncertain" if progress.uncertain else "",
        f"{progress.in_flight:,} in flight" if progress.in_flight else "",
        f"{progress.people:,} wait for a person" if progress.people else "",
        f"{progress.rate:.1f} rows/s" if progress.ended_here else "",
        f"{duration(progress.seconds_left)} left" if progress.seconds_left else "",
    )
    return " · ".join(filter(None, parts))
