"""What commands write: results to standard output, everything else to standard error; never a token."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from prefect_crew._text import plain
from prefect_crew.client.redaction import Redactor
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect_crew.client.models import CrewStatus
    from prefect_crew.runs.run import OpenRun


@dataclass
class SeenRun:
    """What is known of a run that was kicked off or found, from its statuses. `since` is on the monotonic clock."""

    label: str
    kickoff_id: str
    is_new: bool = True
    idempotency_key: str | None = None
    flow_run_id: str | None = None
    since: float = field(default_factory=time.monotonic)
    state: CrewState = CrewState.PENDING
    done: int = 0
    total: int | None = None
    progress: float | None = None
    task: str | None = None

    @classmethod
    def of(cls, run: OpenRun) -> SeenRun:
        """Return what is known of a run that has just been kicked off or found."""
        from prefect_crew._internal.prefect_api import flow_run_id  # Prefect is loaded by now

        in_flow_run = flow_run_id() or (run.record.flow_run_id if run.record else None)
        return cls(run.crew.label, run.kickoff_id, run.owned, run.idempotency_key, in_flow_run)

    def update(self, status: CrewStatus, task: str | None) -> list[str]:
        """Take a status in, with its task as it may be shown; return what has changed, as lines for people."""
        lines: list[str] = []
        self.total, self.progress = status.total_tasks or self.total, status.progress
        self.done = max(self.done, status.completed_tasks or 0)
        if task and task != self.task and not status.state.ended:
            self.task = task
            lines.append(f"{task}{self.share}")
        if status.state is not self.state:
            self.state = status.state
            if status.state is CrewState.WAITING:
                lines.append("waits for a person")  # the log says how to answer
        if status.state.ended:
            lines.append(f"{self.state} after {time.monotonic() - self.since:.1f} s")
        return lines

    @property
    def share(self) -> str:
        """How far it is, as text to follow another; empty where the crew does not tell."""
        if self.total:
            return f" ({self.done} of {self.total} tasks done)"
        return f" ({self.progress:.0%})" if self.progress is not None else ""

    @property
    def on_record(self) -> str:
        """How its result can be had, whatever became of the command."""
        if self.idempotency_key is None:
            return f"Run {self.kickoff_id} was started."
        command = f"prefect-crew result {shlex.quote(self.idempotency_key)}"
        return f"Run {self.kickoff_id} was started and is on record: {command}."


@dataclass
class Invocation:
    """One run of the program.

    Attributes:
        debug: Whether errors show their traceback, and Prefect's logs are shown.
        tokens: What must not be written.
        seen: The run that was kicked off or found last: what any error after that is about.
        at_end: What is closed when the command ends.
    """

    debug: bool = False
    tokens: set[str] = field(default_factory=set[str], repr=False)
    seen: SeenRun | None = None
    at_end: ExitStack = field(default_factory=ExitStack)

    def hide(self, token: str) -> str:
        """Keep a token out of everything that is written from now on, and return it."""
        if token.strip():
            self.tokens.add(token.strip())
        return token


current = Invocation()  # One command a process: `main` replaces it, and each line that is written is redacted by it.


def begin(*, debug: bool = False) -> Invocation:
    """Begin a command, for a process that runs several."""
    global current
    current = Invocation(debug=debug)
    return current


def redact(text: str) -> str:
    """Return the text without any token that this command was given."""
    return Redactor(tokens=current.tokens)(text) if current.tokens else text


def console(*, stderr: bool = False) -> Console:
    """Return the console of standard output, or of standard error."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal that can redraw lines."""
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def note(text: str, style: str | None = None) -> None:
    """Write a line for people to standard error."""
    console(stderr=True).print(redact(plain(text)), style=style, soft_wrap=True)


def put(text: str = "") -> None:
    """Write a line to standard output: as it is into a file or a pipe, fit for a terminal to one."""
    text = redact(text)
    sys.stdout.write((plain(text) if is_terminal(sys.stdout) else text) + "\n")


def put_markdown(text: str) -> None:
    """Write a crew's text: rendered on a terminal, as it is elsewhere."""
    if not is_terminal(sys.stdout):
        put(text)
        return
    out = console()
    out.print(Markdown(redact(plain(text)), hyperlinks=False), width=min(out.width, 100))


def put_rows(header: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str = "") -> None:
    """Write a table: drawn on a terminal, tabs between its columns elsewhere. Without rows, only `empty`."""
    rows = [[redact(plain(" ".join(text.split()))) for text in row] for row in rows]
    if not rows:
        if empty:
            put(empty)
        return
    if not is_terminal(sys.stdout):
        for row in (header, *rows):
            put("\t".join(row))
        return
    table = Table(*header, box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console().print(table)


def put_json(value: Any) -> None:
    """Write one JSON document to standard output, escaped where its encoding could not hold it."""
    text = json.dumps(value, ensure_ascii=False, indent=2, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2, default=str)
    sys.stdout.write(redact(text) + "\n")
    sys.stdout.flush()


def command(text: str) -> str:
    """Return a command as this person can type it: with its folder where the program is not on PATH."""
    name, _, rest = text.partition(" ")
    here = Path(sys.executable).parent / name
    found = which(name)
    if here.exists() and (found is None or Path(found).resolve() != here.resolve()):
        relative = os.path.relpath(here)
        name = str(here) if relative.startswith("..") else relative
    return f"{shlex.quote(name)} {rest}".strip()
