"""The export of a batch: its rows as JSON Lines or CSV, or in a table."""

from __future__ import annotations

import asyncio
import csv
import io
import os
import re
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar, cast
from urllib.parse import unquote
from uuid import uuid4

import fsspec  # pyright: ignore[reportMissingTypeStubs]
import sqlalchemy as sa
from pydantic import BaseModel
from pydantic_core import from_json, to_json

from prefect_crew.batches.dataset import COMPRESSED, error_text, is_remote, shown_address, whole_address
from prefect_crew.batches.tables import SQL, SqlDatabase, table_of
from prefect_crew.client.models import CrewResult
from prefect_crew.exceptions import ConfigurationError, CrewError, ExportError, OutputTypeError
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
        self._path = None if is_remote(address) else Path(whole_address(address))
        file = Path(address.partition("?")[0] if self._path is None else address)
        ending = Path(file.stem).suffix if file.suffix.lower() in COMPRESSED else file.suffix
        is_http = address.startswith(("http://", "https://"))
        problem = "is an http address, and nothing can be written there." if is_http else None
        self._is_csv = ending.lower() == CSV
        if problem is None and not (self._is_csv or ending.lower() in LINES):
            problem = (
                f"has the ending {file.suffix!r}, and an export is JSON Lines ({' or '.join(LINES)}) or CSV, also "
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

    def check(self, *, is_new: bool, remedy: str = "move that file", consequence: str = "Nothing was started.") -> None:
        """Make sure that the file can be written, and that an existing file is of this batch. Raises ExportError.

        `is_new`: whether the batch has not written this file yet, so that an existing file is somebody else's. The
        error names `remedy` and `consequence`, and another export if nothing was started.
        """
        with self._reporting(consequence):
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            if is_new and self.exists() and not (self._path and self._path.stat().st_size == 0):
                advice = remedy if consequence == KEPT else f"choose another, or {remedy}"
                raise ExportError(f"{self.name} exists already and is not from this batch: {advice}. {consequence}")

    def exists(self) -> bool:
        """Return whether the output exists; False for a remote output that nobody can read."""
        if self._path is not None:
            return self._path.exists()
        try:
            filesystem, path = _fsspec.core.url_to_fs(self.address)
            return bool(filesystem.exists(path))
        except (OSError, ImportError, ValueError):
            return False

    async def write(self, pages: Pages, guard: Guard) -> Counter[str]:
        """Write the lines of all rows that have ended, in the order of the data set; return their number by state.

        The new file is written on this machine, and replaces the old file once it is whole. A write that is cut off
        leaves the old file. Raises ExportError, StoreError, BatchBusyError.
        """
        with self._reporting(), self._new() as new:
            with self._opened(new) as file:
                counts = await self._write_lines(pages, file)
            await asyncio.to_thread(self._put, new, guard)
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

    def _opened(self, new: Path) -> Any:
        name = self.address.partition("?")[0] if self._path is None else self._path.name
        return _fsspec.open(str(new), "wb", compression=_fsspec.utils.infer_compression(name))

    def _put(self, new: Path, guard: Guard) -> None:
        """Replace the output by a whole file in one thread, since an exception during an upload would commit a part."""
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
            raise ExportError(self._unwritten(error_text(error, self.address), consequence)) from None

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
    """The table `sql://BLOCK/TABLE`, with the columns of a CSV file, and `batch`. Several batches may share it."""

    _is_csv = False

    def __init__(  # no file: no super()
        self, address: str, batch: str, *, output_type: type[BaseModel] | None = None
    ) -> None:
        self.address = address
        self.batch = batch
        self.name = shown_address(address)
        self._output_type = output_type
        self._block, _, table = address.removeprefix(SQL).partition("/")
        self._place = unquote(table)
        if not self._place or "?" in table:
            raise ConfigurationError(
                f"The export {self.name} names no table. Give sql://BLOCK/TABLE, or sql://BLOCK/SCHEMA.TABLE. Nothing "
                "was started."
            )

    async def open(self) -> None:
        """Load its block. Raises ConfigurationError."""
        self._database = await SqlDatabase.load(self._block, name=f"The export {self.name}")
        if self._database.kind not in ("sqlite", "postgresql"):
            raise ConfigurationError(
                f"The export {self.name} is in a database of {self._database.kind}, and tables are written in SQLite "
                "and PostgreSQL. Choose another. Nothing was started."
            )

    def check(self, *, is_new: bool, remedy: str = "delete them", consequence: str = "Nothing was started.") -> None:
        """Make sure that the table can be written, and that rows of the batch's name are its own. Raises ExportError.

        Several batches may share a table, also with equal names on two Prefect servers. `is_new`: whether the batch has
        not written to this table yet, so that rows of its name are another batch's. The error names `remedy` and
        `consequence`, and another name or table if nothing was started.
        """
        results = self._results()

        def work(connection: sa.Connection) -> bool:
            self._database.prepare(connection, results)
            has_rows = bool(connection.scalar(sa.select(sa.exists().where(results.c.batch == self.batch))))
            # Other columns or a missing privilege raise now. The end of the work rolls all of it back.
            row = dict.fromkeys(results.c.keys()) | {"key": ""}
            self._database.replace(connection, results, uuid4().hex, [[row]])
            return has_rows

        if self._run(work, consequence) and is_new:
            advice = remedy if consequence == KEPT else f"choose another name or table, or {remedy}"
            raise ExportError(
                f"{self.name} has rows of another batch, which is also named {self.batch!r}: {advice}. {consequence}"
            )

    async def write(self, pages: Pages, guard: Guard) -> Counter[str]:
        """Write the lines of all rows that have ended, in one transaction; return their number by state.

        They replace all rows of the batch. Raises ExportError, StoreError, BatchBusyError.
        """
        with self._reporting(), tempfile.TemporaryDirectory(prefix="prefect-crew-") as folder:
            lines = Path(folder) / "lines.jsonl"
            with lines.open("wb") as file:
                counts = await self._write_lines(pages, file)
            # A cancellation closes the file, so that the thread cannot read on, and its transaction is rolled back.
            with lines.open("rb") as file:
                await asyncio.to_thread(self._replace, file, guard)
        return counts

    def _replace(self, lines: IO[bytes], guard: Guard) -> None:
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
        return self._database.run(work, lambda problem: ExportError(self._unwritten(problem, consequence)))

    def _results(self) -> sa.Table:
        columns = dict.fromkeys(self._columns(), sa.Text()) | {"key": sa.String(255), "seconds": sa.Float()}
        return table_of(self._place, columns)


def has_line(row: Row) -> bool:
    """Return whether a row has ended, or its kickoff was refused for a reason."""
    return row.state in _ENDED or (row.state is AttemptState.NOT_STARTED and row.error is not None)


_ENDED = (AttemptState.COMPLETED, AttemptState.FAILED, AttemptState.STOPPED, AttemptState.LOST)
_NUMBER = re.compile(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", re.ASCII | re.IGNORECASE)


def _csv_lines(lines: Sequence[Sequence[Any]]) -> bytes:
    """Return lines of CSV. A text that a spreadsheet would run as a formula begins with an apostrophe."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([[_harmless(value) for value in line] for line in lines])
    return text.getvalue().encode("utf-8", "replace")


def _harmless(value: Any) -> Any:
    is_formula = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") and value
    return f"'{value}" if is_formula and not _NUMBER.fullmatch(value) else value
