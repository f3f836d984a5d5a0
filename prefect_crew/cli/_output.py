"""What commands write: results to standard output, everything else to standard error; never a token."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from json import dumps
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.prompt import Confirm
from rich.table import Table

from prefect_crew._text import plain
from prefect_crew.client.redaction import Redactor
from prefect_crew.exceptions import ConfigurationError, CrewError

if TYPE_CHECKING:
    from prefect_crew.cli._progress import SeenRun


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
    """Return the console of standard output, or of standard error. Rich colours terminals only, and heeds NO_COLOR."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal that can redraw lines."""
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def note(text: str, style: str | None = None) -> None:
    """Write a line for people to standard error."""
    console(stderr=True).print(redact(plain(text)), style=style, soft_wrap=True)


def confirm(question: str, *, yes: bool) -> None:
    """Go on only if a person says so; `yes`: it was said with --yes.

    Raises:
        ConfigurationError: There is no terminal to ask on.
        CrewError: The answer was no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigurationError(f"{question} Without a terminal this needs --yes. Nothing was changed.")
    try:
        is_sure = Confirm.ask(redact(plain(question)), console=console(stderr=True), default=False)
    except EOFError:  # the end of the input, as Ctrl-D gives it, is no yes
        is_sure = False
    if not is_sure:
        raise CrewError("Nothing was changed.")


def put(text: str = "", style: str | None = None, *, json: Any = None) -> None:
    """Write a line to standard output: as it is into a file or a pipe, fit for a terminal to one, styled there.

    Where there is `json`, that is written instead.
    """
    if json is not None:
        put_json(json)
    elif is_terminal(sys.stdout):
        console().print(redact(plain(text)), style=style, soft_wrap=True)
    else:
        sys.stdout.write(redact(text) + "\n")


def put_markdown(text: str) -> None:
    """Write a crew's text: rendered on a terminal, as it is elsewhere."""
    if not is_terminal(sys.stdout):
        put(text)
        return
    from rich.markdown import Markdown  # a parser of Markdown, which few commands need

    out = console()
    out.print(Markdown(redact(plain(text)), hyperlinks=False), width=min(out.width, 100))


def put_rows(header: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str = "", json: Any = None) -> None:
    """Write a table: drawn on a terminal, tabs between its columns elsewhere. Without rows, only `empty`.

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


def put_json(value: Any) -> None:
    """Write one JSON document to standard output, escaped where its encoding may not hold it."""
    is_ascii = (sys.stdout.encoding or "utf-8").lower() != "utf-8"  # a lone surrogate is written as its escape
    sys.stdout.write(redact(dumps(value, ensure_ascii=is_ascii, indent=2, default=str)) + "\n")
    sys.stdout.flush()
