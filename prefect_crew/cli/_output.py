"""What commands write: results to standard output, everything else to standard error; never a token."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from prefect_crew._text import plain

if TYPE_CHECKING:
    from rich.console import Console


_tokens: set[str] = set()
_debug = False


def debug(on: bool) -> None:
    """Say whether `--debug` was given: errors then show their traceback, and Prefect's logs are seen."""
    global _debug
    _debug = on


def debugging() -> bool:
    """Return whether `--debug` was given."""
    return _debug


def secret(value: str) -> str:
    """Keep a token out of everything that is written from now on, and return it."""
    if value.strip():
        _tokens.add(value.strip())
    return value


def forget() -> None:
    """Forget the secrets, for a process that runs several commands."""
    _tokens.clear()


def redact(text: str) -> str:
    """Return the text without any token that this command was given."""
    if not _tokens:
        return text
    from prefect_crew.client.redaction import Redactor

    return Redactor(tokens=_tokens)(text)


def results() -> Console:
    """Return the console of standard output."""
    return _console(stderr=False)


def errors() -> Console:
    """Return the console of standard error."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def is_terminal(stream: Any) -> bool:
    """Return whether a person looks at a stream on a terminal that can redraw lines."""
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def note(text: str, style: str | None = None) -> None:
    """Write a line for people to standard error."""
    errors().print(redact(plain(text)), style=style, soft_wrap=True)


def put(text: str = "") -> None:
    """Write a line to standard output: as it is into a file or a pipe, fit for a terminal to one."""
    text = redact(text)
    sys.stdout.write((plain(text) if is_terminal(sys.stdout) else text) + "\n")


def put_markdown(text: str) -> None:
    """Write a crew's text: rendered on a terminal, as it is elsewhere."""
    if not is_terminal(sys.stdout):
        put(text)
        return
    from rich.markdown import Markdown

    console = results()
    console.print(Markdown(redact(plain(text)), hyperlinks=False), width=min(console.width, 100))


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
    from rich import box
    from rich.table import Table

    table = Table(*header, box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*row)
    results().print(table)


def put_json(value: Any) -> None:
    """Write one JSON document to standard output, escaped where its encoding could not hold it."""
    text = redact(json.dumps(value, ensure_ascii=False, indent=2, default=str))
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = redact(json.dumps(value, ensure_ascii=True, indent=2, default=str))
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def command(text: str) -> str:
    """Return a command as this person can type it: with its folder where the program is not on PATH."""
    from pathlib import Path
    from shutil import which

    name, _, rest = text.partition(" ")
    here = Path(sys.executable).parent / name
    found = which(name)
    if here.exists() and (found is None or Path(found).resolve() != here.resolve()):
        shown = os.path.relpath(here)
        name = str(here) if shown.startswith("..") else shown
    return f"{shlex.quote(name)} {rest}".strip()
