"""The export of a batch: its rows as JSON Lines or CSV, or in a table."""

from __future__ import annotations

import asyncio
import csv
import io
import os
import re
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar, cast
from urllib.parse import unquote
from uuid import uuid4

import fsspec  # pyright: ignore[reportMissingTypeStubs]
import sqlalchemy as sa
from pydantic import BaseModel
from pydantic_core import from_json, to_json

from prefect_crew.batches.dataset import (
    COMPRESSED,
    ending_of,
    error_text,
    is_remote,
    shown_address,
    whole_address,
)
from prefect_crew.batches.tables import SQL, SqlDatabase
from prefect_crew.client.models import CrewResult
from prefect_crew.exceptions import ConfigurationError, CrewError, OutputTypeError
from prefect_crew.runs.run import parse_data
from prefect_crew.store.batches import Row
from prefect_crew.store.decision import AttemptState

T = TypeVar("T")
_fsspec = cast("Any", fsspec)
COLUMNS = (
    *("key", "inputs", "state", "output", "data", "tasks"),
    *("kickoff_id", "seconds", "usage", "error", "crew_version"),
)
LINES, CSV = (".jsonl", ".ndjson"), ".csv"
"""The endings of exports. After an ending of lines or of CSV may come the ending of a compression."""
PAGE = 200
"""Rows that are read and written at once: a result has up to 5 MB."""
START_ADVICE = "choose another, or move it away"
KEPT = "All results are in the crew database. Make the same call again, which writes them."
STRUCTURED = ("inputs", "data", "tasks", "usage")
"""Columns that are JSON in CSV and in a table."""
CONFLICT_REASON = (
    "Not started: this key has completed with other inputs. Give the row another key, or the batch another name."
)
NOT_KEPT = "The result is not kept here, since it may hold a secret. To read it, run: prefect-crew result"
Pages = AsyncIterator[Sequence[Row]]
"""The rows of a batch, a page at a time, in the order of the data set."""
Guard = Callable[[], None]
"""Raises BatchBusyError if the batch is another process's by now. Called in a thread, right before each change."""


def open_output(address: str, batch: str, *, output_type: type[BaseModel] | None = None) -> Output:
    """Return a batch's output at an address: a file, or the table `sql://BLOCK/TABLE`. Raises ConfigurationError."""
    return (TableOutput if address.startswith(SQL) else Output)(address, batch, output_type=output_type)


class Output:
    """The file of the lines of a batch: JSON Lines or CSV, compressed by its ending.

    `output_type` is the type of `data`; None leaves `data` as the crew's server gave it.

    Raises ConfigurationError if such an output cannot be written here.
    """

    def __init__(self, address: str, batch: str, *, output_type: type[BaseModel] | None = None) -> None:
        self.address = address
        self.batch = batch
        self.name = shown_address(address)
        self._output_type = output_type
        self._is_csv = False
        self._find_place()

    def _find_place(self) -> None:
        """Check the address. Raises ConfigurationError."""
        address = self.address
        self._path = None if is_remote(address) else Path(whole_address(address))
        ending, self._packed = ending_of(address)
        self._is_csv, problem = ending == CSV, None
        if address.startswith(("http://", "https://")):
            problem = "is an http address, and nothing can be written there."
        elif not (self._is_csv or ending in LINES):
            problem = (
                f"has the ending {ending!r}, and an export is JSON Lines ({' or '.join(LINES)}) or CSV, also "
                f"compressed ({', '.join(f'{LINES[0]}{kind}' for kind in sorted(COMPRESSED))}). Give it such an ending."
            )
        try:
            if self._path is None and problem is None:
                _fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            problem = f"cannot be written: {error_text(error, address)}."
        if problem is not None:
            raise ConfigurationError(f"The export {self.name} {problem} Nothing was started.")

    async def open(self) -> None:
        """Load the block of the output, if it needs one, before any other method. Raises ConfigurationError."""

    def check(self, *, is_new: bool, advice: str = START_ADVICE, consequence: str = "Nothing was started.") -> None:
        """Make sure that the output can be written, and that what is there is of this batch. Raises CrewError.

        `is_new`: whether the batch has not written there yet, so that what is there is somebody else's. The error then
        has `advice`, and each error `consequence`.
        """
        with self._reporting(consequence):
            if self._has_others(consequence) and is_new:
                raise CrewError(f"{self.name} {self._others()}: {advice}. {consequence}")

    def _others(self) -> str:
        return "exists already and is not from this batch"

    def _has_others(self, consequence: str) -> bool:
        """Return whether there is something at the address, and whether it can be written at all."""
        del consequence
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._new():  # as the write will
                pass
            return self._path.exists() and self._path.stat().st_size > 0
        with suppress(OSError, ImportError, ValueError):  # nobody can read it
            filesystem, path = _fsspec.core.url_to_fs(self.address)
            return bool(filesystem.exists(path))
        return False

    async def write(self, pages: Pages, guard: Guard) -> Counter[str]:
        """Write the lines of all rows that have ended, in the order of the data set; return their number by state.

        The new lines are written on this machine, and replace the old ones once they are whole: a write that is cut off
        leaves the old. Raises CrewError, StoreError, BatchBusyError.
        """
        with self._reporting(), self._new() as new:
            with _fsspec.open(str(new), "wb", compression=COMPRESSED.get(self._packed)) as file:
                counts = await self._write_lines(pages, file)
            with new.open("rb") as lines:  # a cancellation closes it: the thread of a table then reads no further
                await asyncio.to_thread(self._put, new, lines, guard)
        return counts

    @contextmanager
    def _new(self) -> Generator[Path]:
        """Yield an empty file on this machine for the new output. Remove it at the end if it is still there."""
        with tempfile.TemporaryDirectory(prefix="prefect-crew-") if self._path is None else nullcontext("") as folder:
            # Next to a local output, since a rename replaces that. Another process may write the same output now.
            new = Path(folder) / "new" if self._path is None else self._path
            new = new.with_name(f".{new.name}.{uuid4().hex[:8]}.new")
            os.close(os.open(new, os.O_WRONLY | os.O_CREAT, 0o600))  # for its owner only, under any umask
            try:
                yield new
            finally:
                new.unlink(missing_ok=True)

    def _put(self, new: Path, lines: IO[bytes], guard: Guard) -> None:
        """Replace the output by a whole file in one thread, since an exception during an upload would commit a part."""
        del lines
        guard()
        if self._path is not None:
            new.replace(self._path)
            return
        filesystem, path = _fsspec.core.url_to_fs(self.address)
        filesystem.put_file(str(new), path)

    @contextmanager
    def _reporting(self, consequence: str = KEPT) -> Generator[None]:
        try:
            yield
        except CrewError:
            raise
        except Exception as error:  # noqa: BLE001  each library that fsspec takes raises errors of its own
            raise CrewError(self._unwritten(error_text(error, self.address), consequence)) from None

    def _unwritten(self, problem: str, consequence: str) -> str:
        return f"The export {self.name} cannot be written: {problem}. {consequence}"

    async def _write_lines(self, pages: Pages, file: IO[bytes]) -> Counter[str]:
        counts = Counter[str]()
        if self._is_csv:
            file.write(b"\xef\xbb\xbf" + _csv_lines([self._columns()]))  # Excel reads UTF-8 only with this mark
        async for page in pages:
            counts += await asyncio.to_thread(self._write_page, page, file)
        return counts

    def _write_page(self, page: Sequence[Row], file: IO[bytes]) -> Counter[str]:
        lines = [self._line(row) for row in page if has_line(row)]
        counts = Counter(line["state"] for line in lines)
        if self._is_csv:
            file.write(_csv_lines([[*self._flat(line).values()] for line in lines]))
        else:
            file.writelines(to_json(line, inf_nan_mode="null") + b"\n" for line in lines)
        return counts

    def _line(self, row: Row) -> dict[str, Any]:
        """Return the line of a row. `seconds` is the server's execution time, else the time from kickoff to end."""
        result: Mapping[str, Any] = row.result or {}
        line: dict[str, Any] = dict.fromkeys(COLUMNS)
        line |= {"key": row.row_key, "inputs": row.inputs, "state": str(row.state).replace("_", "-"), "tasks": []}
        line |= {"kickoff_id": row.kickoff_id, "crew_version": row.crew_version}
        if row.is_conflict:
            return line | {"state": "conflict", "error": CONFLICT_REASON}
        took = row.ended_at - row.started_at if row.ended_at and row.started_at else None
        line["seconds"] = result.get("execution_time") or (None if took is None else round(took, 3))
        line |= {"usage": row.usage, "error": row.error}
        if row.state is AttemptState.COMPLETED and not result:
            line["error"] = f"{NOT_KEPT} {row.kickoff_id}"
        elif row.state is AttemptState.COMPLETED:
            line |= {"output": result["output"], "usage": row.usage or result.get("usage")}
            line["tasks"] = result.get("tasks", [])
            line["data"], line["error"] = self._typed(str(row.kickoff_id), result)
            if line["error"] is not None:
                line["state"] = "invalid-output"
        elif row.error is None:
            is_failed = row.state is AttemptState.FAILED
            line["error"] = "The reason is not kept here." if is_failed else f"It was {row.state}."
        return line

    def _typed(self, kickoff_id: str, result: Mapping[str, Any]) -> tuple[Any, str | None]:
        """Return the structured result as JSON values, in the form of `output_type`, or why it does not fit."""
        data = result.get("data")
        if self._output_type is None:
            return data, None
        whole = CrewResult(kickoff_id=kickoff_id, output=result["output"], data=data)
        try:
            typed = parse_data(whole, self._output_type).data
        except OutputTypeError as error:
            return None, str(error)
        try:
            return typed.model_dump(mode="json", by_alias=False), None
        except Exception:  # noqa: BLE001  a serializer of the user's raises anything
            return data, None

    # CSV and tables: `seconds` is a number, all else is text. Each field of `output_type` also has a column, named
    # `data_` and the field, not its alias.

    def _flat(self, line: dict[str, Any]) -> dict[str, Any]:
        data = cast("dict[str, Any]", line["data"]) if isinstance(line["data"], dict) else {}
        flat = line | {name: None if line[name] is None else to_json(line[name]).decode() for name in STRUCTURED}
        for name in self._fields():
            value = data.get(name)
            flat[f"data_{name}"] = value if value is None or isinstance(value, str) else to_json(value).decode()
        return flat

    def _columns(self) -> list[str]:
        return [*COLUMNS, *(f"data_{name}" for name in self._fields())]

    def _fields(self) -> Sequence[str]:
        return () if self._output_type is None else [*self._output_type.model_fields]


class TableOutput(Output):
    """The table `sql://BLOCK/TABLE`, with the columns of a CSV file, and `batch`. Several batches may share it, also
    with equal names on two Prefect servers."""

    def _find_place(self) -> None:
        self._path, self._packed = None, ""
        self._block, _, table = self.address.removeprefix(SQL).partition("/")
        self._place = unquote(table)
        if not self._place or "?" in table:
            raise ConfigurationError(
                f"The export {self.name} names no table. Give sql://BLOCK/TABLE, or sql://BLOCK/SCHEMA.TABLE. Nothing "
                "was started."
            )

    async def open(self) -> None:
        """Load its block. Raises ConfigurationError."""
        self._database = await SqlDatabase.load(self._block, name=f"The export {self.name}")

    def _others(self) -> str:
        return f"has rows of another batch, which is also named {self.batch!r}"

    def _has_others(self, consequence: str) -> bool:
        results = self._results()

        def work(connection: sa.Connection) -> bool:
            self._database.prepare(connection, results)
            has_rows = bool(connection.scalar(sa.select(sa.exists().where(results.c.batch == self.batch))))
            # Other columns or a missing privilege raise now. The end of the work rolls all of it back.
            row = dict.fromkeys(results.c.keys()) | {"key": ""}
            self._database.replace(connection, results, uuid4().hex, [[row]])
            return has_rows

        return self._run(work, consequence)

    def _put(self, new: Path, lines: IO[bytes], guard: Guard) -> None:
        self._replace(lines, guard)

    def _replace(self, lines: Iterable[bytes], guard: Guard) -> None:
        """Replace all rows of the batch in one transaction. An error, also of `lines`, leaves the table as it was."""
        table, rows = self._results(), map(self._flat, map(from_json, lines))

        def pages() -> Iterator[list[dict[str, Any]]]:
            while page := [*islice(rows, PAGE)]:
                guard()
                yield page

        def work(connection: sa.Connection) -> None:
            self._database.prepare(connection, table)
            self._database.replace(connection, table, self.batch, pages())
            guard()
            self._database.commit(connection)

        self._run(work)

    def _run(self, work: Callable[[sa.Connection], T], consequence: str = KEPT) -> T:
        return self._database.run(work, lambda problem: CrewError(self._unwritten(problem, consequence)))

    def _results(self) -> sa.Table:
        """Return the table `SCHEMA.TABLE`, or `TABLE`, in which each batch has its own rows."""
        schema, _, name = self._place.rpartition(".")
        kinds: dict[str, Any] = {"seconds": sa.Float(), "key": sa.String(255)}
        columns = [
            sa.Column(column, kinds.get(column, sa.Text()), primary_key=column == "key") for column in self._columns()
        ]
        batch = sa.Column("batch", sa.String(255), primary_key=True)
        return sa.Table(name, sa.MetaData(schema=schema or None), batch, *columns)


def has_line(row: Row) -> bool:
    """Return whether a row has ended, or its kickoff was refused for a reason."""
    return row.state in _ENDED or (row.state is AttemptState.NOT_STARTED and row.error is not None)


_ENDED = (AttemptState.COMPLETED, AttemptState.FAILED, AttemptState.STOPPED, AttemptState.LOST)
_FORMULA = re.compile(r"[=@\t\r]|[+-](?![0-9.]+(e[+-]?[0-9]+)?$)", re.ASCII | re.IGNORECASE)
"""The begin of a text that a spreadsheet would run. A number is none."""


def _csv_lines(lines: Sequence[Sequence[Any]]) -> bytes:
    """Return lines of CSV. A text that a spreadsheet would run as a formula begins with an apostrophe."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([[_harmless(value) for value in line] for line in lines])
    return text.getvalue().encode("utf-8", "replace")


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value
