"""The output of a batch: JSON Lines or Parquet."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

import fsspec  # pyright: ignore[reportMissingTypeStubs]
from pydantic import BaseModel
from pydantic_core import to_json

from prefect_crew._internal.files import PRIVATE, create_private
from prefect_crew.batches.dataset import COMPRESSED, is_remote, polars, shown_address
from prefect_crew.batches.outcomes import RowEnd
from prefect_crew.batches.rows import Keys, rejected_name
from prefect_crew.client.redaction import MASK
from prefect_crew.exceptions import ConfigurationError, DatasetError, OutputError
from prefect_crew.records.model import RecordPhase

if TYPE_CHECKING:
    from prefect_crew.crew import Crew


LINES = 200
BYTES = 1 << 20


class LineFile:
    """A file to which whole lines are added, many with one write: killing the process leaves no half one."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), PRIVATE)
        self._end = os.lseek(self._file, 0, os.SEEK_END)
        self._waiting: list[bytes] = []
        self._size = 0

    def __enter__(self) -> LineFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, line: bytes) -> None:
        """Add a line, which ends with a line feed.

        Raises:
            OSError: It cannot be written. The file is as it was before.
        """
        self._waiting.append(line)
        self._size += len(line)
        if len(self._waiting) >= LINES or self._size >= BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand the lines to the operating system, so that others can read them."""
        if not self._waiting:
            return
        content = memoryview(b"".join(self._waiting))
        os.lseek(self._file, self._end, os.SEEK_SET)
        written = 0
        try:
            while written < len(content):
                written += os.write(self._file, content[written:])
        except OSError:
            os.ftruncate(self._file, self._end)  # a full disk takes half a line
            raise
        self._end += written
        self._waiting, self._size = [], 0

    def cut(self, end: int) -> None:
        """Drop everything behind a position, and go on there."""
        self._waiting, self._size = [], 0
        os.ftruncate(self._file, end)
        self._end = end

    def close(self) -> None:
        """Write what is left, sync and close."""
        try:
            self.flush()
            os.fsync(self._file)
        finally:
            os.close(self._file)


class HeldLines:
    """Lines by number that wait for the ones before them; in a temporary file once they are many."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA cache_size=-4000")
        self._database.execute("CREATE TABLE lines (number INTEGER PRIMARY KEY, line BLOB)")
        self._database.execute("BEGIN")

    def put(self, number: int, line: bytes | None) -> None:
        """Keep a line; None for a row that has none."""
        self._database.execute("INSERT OR REPLACE INTO lines VALUES (?, ?)", (number, line))

    def take(self, number: int) -> tuple[bool, bytes | None]:
        """Take a line away; whether it was there, and the line."""
        found = self._database.execute("SELECT line FROM lines WHERE number = ?", (number,)).fetchone()
        if found is None:
            return False, None
        self._database.execute("DELETE FROM lines WHERE number = ?", (number,))
        return True, found[0]

    def first(self) -> int | None:
        """Return the lowest number, None if nothing is held."""
        return self._database.execute("SELECT min(number) FROM lines").fetchone()[0]

    def close(self) -> None:
        """Give the file back."""
        self._database.close()


STRUCTURED = ("inputs", "data", "tasks", "usage")
SLICE = 5_000
"""Lines that are held at once."""


def check_parquet(output: str) -> None:
    """Raise ConfigurationError if no Parquet can be written here."""
    try:
        polars(output)
    except DatasetError as error:
        raise ConfigurationError(f"The output {output} {error.reason} Nothing was started.") from None


def write_parquet(lines: Path, target: IO[bytes], columns: Sequence[str], output_type: type[BaseModel] | None) -> None:
    """Write a file of lines as Parquet.

    Args:
        lines: The lines, JSON objects of `columns`.
        target: Where to.
        columns: Their names; all are text but `seconds`.
        output_type: Its fields become columns `data_NAME`: numbers, booleans and dates as such, the rest as text or
            JSON.
    """
    library: Any = polars("Parquet")
    fields = {} if output_type is None else {name: _kind(field.annotation) for name, field in _fields(output_type)}
    schema = {name: library.Float64 if name == "seconds" else library.String for name in columns}
    schema |= {f"data_{name}": _dtype(library, kind) for name, kind in fields.items()}
    with tempfile.TemporaryDirectory(prefix="prefect-crew-") as folder:
        parts: list[Path] = []
        for number, rows in enumerate(_slices(lines)):
            part = Path(folder) / f"{number:06}.parquet"
            _frame(library, rows, columns, fields, schema).write_parquet(part)
            parts.append(part)
        whole = Path(folder) / "whole.parquet"
        if parts:
            library.scan_parquet(parts).sink_parquet(whole)
        else:
            library.DataFrame(schema=schema).write_parquet(whole)
        with whole.open("rb") as source:
            while chunk := source.read(1 << 20):
                target.write(chunk)


def _fields(output_type: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    for name, field in output_type.model_fields.items():
        yield field.serialization_alias or name, field


def _slices(lines: Path) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    with lines.open("rb") as file:
        for line in file:
            rows.append(json.loads(line))
            if len(rows) == SLICE:
                yield rows
                rows = []
    if rows:
        yield rows


def _frame(
    library: Any,
    rows: Sequence[dict[str, Any]],
    columns: Sequence[str],
    fields: dict[str, type],
    schema: dict[str, Any],
) -> Any:
    values: dict[str, list[Any]] = {
        name: [_text(row.get(name)) if name in STRUCTURED else row.get(name) for row in rows] for name in columns
    }
    for name, kind in fields.items():
        values[f"data_{name}"] = [_cell(row.get("data"), name, kind) for row in rows]
    return library.DataFrame(values, schema=schema, strict=False)


def _text(value: Any) -> str | None:
    return None if value is None else to_json(value).decode()


def _cell(data: Any, name: str, kind: type) -> Any:
    value = cast("dict[str, Any]", data).get(name) if isinstance(data, dict) else None
    if value is None:
        return None
    if kind is date:
        return date.fromisoformat(str(value))
    if kind is datetime:
        moment = datetime.fromisoformat(str(value))
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    if kind is str:
        return value if isinstance(value, str) else to_json(value).decode()
    return value


def _kind(annotation: Any) -> type:
    """Return the plain type that a column of this annotation gets: text where nothing better fits."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        annotation = parts[0] if len(parts) == 1 else str
    return annotation if annotation in (int, float, bool, date, datetime) else str


def _dtype(library: Any, kind: type) -> Any:
    kinds: dict[type, Any] = {
        int: library.Int64,
        float: library.Float64,
        bool: library.Boolean,
        date: library.Date,
        datetime: library.Datetime("us", "UTC"),
    }
    return kinds.get(kind, library.String)


_files = cast("Any", fsspec)
COLUMNS = ("key", "inputs", "state", "output", "data", "tasks", "kickoff_id", "seconds", "usage", "error")


def line_of(end: RowEnd, crew: Crew) -> bytes | None:
    """Return the line of a row, None for an uncertain one, which has no end yet. No secret of `crew` stands in it.

    `seconds` is the server's execution time, else the time from the kickoff to the end that was seen.
    """
    if end.uncertain:
        return None
    job, record = end.job, end.record
    line: dict[str, Any] = dict.fromkeys(COLUMNS)
    line["key"], line["state"], line["error"] = job.key, end.state, end.error
    crew = crew.hiding(job.hidden)
    shown = {name: MASK if name in crew.secret_inputs else value for name, value in job.inputs.items()}
    # What the crew said is masked in the ledger already.
    line["inputs"] = crew.redactor(job.inputs).tree(shown) if crew.secret_inputs else shown
    line["tasks"] = []
    if record is not None:
        line["kickoff_id"] = record.kickoff_id
        if record.phase is RecordPhase.ENDED and record.ended_at is not None and record.kicked_off_at is not None:
            line["seconds"] = round((record.ended_at - record.kicked_off_at).total_seconds(), 3)
    result = None if record is None else record.result
    if result is not None:
        line["output"], line["data"] = result.output, end.data
        line["tasks"] = [task.model_dump(exclude_none=True) for task in result.tasks]
        line["usage"] = None if result.usage is None else result.usage.model_dump(exclude_none=True)
        line["seconds"] = line["seconds"] if result.execution_time is None else result.execution_time
    return to_json(line, inf_nan_mode="null", serialize_unknown=True) + b"\n"


class _Lines(Protocol):
    """How lines get into the file that grows."""

    def put(self, number: int, key: str, line: bytes | None) -> None: ...

    def close(self) -> None: ...


class Output:
    """The output of one batch, written by one process.

    An output that is not on this machine, or is compressed or Parquet, is written at the end: until then its lines grow
    in `path`, beside it or, for one elsewhere, beside the ledger. That file stays: the next call goes on with it.

    Raises:
        ConfigurationError: Such an output cannot be written here. This is known before anything is bought.
    """

    def __init__(self, output: str, *, beside: Path, output_type: type[BaseModel] | None = None) -> None:
        self.output = output
        self.name = shown_address(output)
        self._output_type = output_type
        self._parquet = output.endswith((".parquet", ".pq"))
        local = Path(output.removeprefix("file://"))
        self._remote = is_remote(output)
        self.direct = not self._remote and not self._parquet and local.suffix.lower() not in COMPRESSED
        if self.direct:
            self.path = local
        elif self._remote:
            # Many addresses end in the same name, such as one for each day.
            known = hashlib.sha256(self.name.encode()).hexdigest()[:8]
            self.path = beside.with_name(f"{Path(self.name).name}.{known}.lines.jsonl")
        else:
            self.path = local.with_name(f"{local.name}.lines.jsonl")
        self._file: LineFile | None = None
        self._lines: _Lines | None = None
        if self._parquet:
            check_parquet(output)
        if self._remote:
            _check_remote(output, self.name)

    def check(self, *, fresh: bool) -> None:
        """Make sure that a file that is there is ours, by its first line; and that one can be.

        Args:
            fresh: Whether the batch has no rows yet, so that whatever is there belongs to something else.

        Raises:
            OutputError: It is not, or cannot be.
        """
        with _told(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                return
            with self.path.open("rb") as file:
                first = file.readline()
            if first and fresh:
                raise OutputError(
                    f"{self.path} is there already, and this batch has not begun. It is left as it is: choose another "
                    "output, or move it away."
                )
            if first.endswith(b"\n"):
                _key_of(self.path, first, 1)

    def open(self, keep: Callable[[str], bool], *, in_order: bool) -> None:
        """Open the file that grows.

        Args:
            keep: Says of a state whether a line of an earlier call that has it stays.
            in_order: Whether lines come in the order of the rows' numbers.

        Raises:
            OutputError: It cannot be written, or holds what is no line of this batch.
        """
        with _told(self.path):
            if in_order:
                self._file = LineFile(self.path)
                self._lines = _InOrder(self.path, self._file)
            else:
                keys = _take_over(self.path, keep)
                self._file = LineFile(self.path)
                self._lines = _AsTheyEnd(self._file, keys)

    def put(self, number: int, key: str, line: bytes | None) -> None:
        """Add the line of a row, unless the file has it; None for a row that has no line.

        Raises:
            OutputError: It cannot be written.
        """
        with _told(self.path):
            if self._lines is not None:
                self._lines.put(number, key, line)

    def flush(self) -> None:
        """Let others read what has been added."""
        with _told(self.path):
            if self._file is not None:
                self._file.flush()

    def close(self) -> None:
        """Write what is left, sync and close. Idempotent."""
        lines, file = self._lines, self._file
        self._lines = self._file = None
        with _told(self.path):
            try:
                if lines is not None:
                    lines.close()
            finally:
                if file is not None:
                    file.close()

    def count(self) -> int:
        """Return how many lines the file that grows has; 0 if there is none."""
        try:
            with self.path.open("rb") as file:
                return sum(1 for line in file if line.endswith(b"\n"))
        except FileNotFoundError:
            return 0

    def is_there(self) -> bool:
        """Return whether the output is in its place; False for one elsewhere that cannot be looked at."""
        if not self._remote:
            return Path(self.output.removeprefix("file://")).exists()
        try:
            filesystem, path = _files.core.url_to_fs(self.output)
            return bool(filesystem.exists(path))
        except (OSError, ImportError, ValueError):
            return False

    def finish(self) -> None:
        """Bring the closed file to its place, where it did not grow there.

        Raises:
            OutputError: It cannot be written there.
        """
        if self.direct:
            return
        try:
            if self._remote:
                with _files.open(self.output, "wb", compression="infer") as target:
                    self._copy_to(target)
                return
            final = Path(self.output.removeprefix("file://"))
            fresh = final.with_name(f".{final.name}.new")
            compression = _files.utils.infer_compression(final.name)
            create_private(fresh)
            with _files.open(str(fresh), "wb", compression=compression) as target:
                self._copy_to(target)
            fresh.replace(final)
        except (OSError, ImportError, ValueError) as error:
            raise OutputError(
                f"The output {self.name} cannot be written: {type(error).__name__}: {error}. Its lines are in "
                f"{self.path}; the same call again brings them there."
            ) from error

    def put_rejected(self, lines: IO[bytes] | None) -> None:
        """Write the rows that were set aside beside the output; None removes those of an earlier call.

        Raises:
            OutputError: They cannot be written there.
        """
        place, fresh = rejected_name(self.output), None
        try:
            if not self._remote:
                place = place.removeprefix("file://")
                fresh = Path(place).with_name(f".{Path(place).name}.new")
            if lines is None:
                filesystem, path = _files.core.url_to_fs(place)
                if filesystem.exists(path):
                    filesystem.rm(path)
                return
            if fresh is not None:
                create_private(fresh)
            lines.seek(0)
            with _files.open(str(fresh or place), "wb") as target:
                shutil.copyfileobj(lines, target)
            if fresh is not None:
                fresh.replace(place)
        except (OSError, ImportError, ValueError) as error:
            raise OutputError(
                f"The rows that were set aside cannot be written to {rejected_name(self.name)}: "
                f"{type(error).__name__}: {error}. Nothing was started."
            ) from error

    def _copy_to(self, target: Any) -> None:
        if self._parquet:
            write_parquet(self.path, target, COLUMNS, self._output_type)
            return
        with self.path.open("rb") as source:
            while chunk := source.read(1 << 20):
                target.write(chunk)


def _check_remote(output: str, name: str) -> None:
    try:
        _files.core.url_to_fs(output)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"The output {name} cannot be written: {error}. Nothing was started.") from None
    if output.startswith(("http://", "https://")):
        raise ConfigurationError(f"The output {name} is a web address, which nobody can write to. Nothing was started.")


class _told:  # noqa: N801  used as a function
    """Say that the output cannot be written, in our own words."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise OutputError(
                f"The output {self._path} cannot be written: {error.strerror or error}. What has ended is in the "
                "ledger: the same call again goes on."
            ) from error


def _key_of(path: Path, line: bytes, number: int) -> tuple[str, str]:
    try:
        value = json.loads(line)
        return str(value["key"]), str(value["state"])
    except (ValueError, KeyError, TypeError):
        raise OutputError(
            f"{path}, line {number} is no line of a batch. Choose another output, or move this file away."
        ) from None


def _take_over(path: Path, keep: Callable[[str], bool]) -> Keys:
    """Cut off a half line, drop the lines that do not stay, and return the keys of those that do."""
    keys = Keys()
    if not path.exists():
        return keys
    good, dropped = 0, False
    with path.open("r+b") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            key, state = _key_of(path, line, number)
            if key in keys or not keep(state):
                dropped = True
            else:
                keys.put(key, number)
            good += len(line)
        file.truncate(good)
    if dropped:
        _rewrite(path, keys)
    return keys


def _rewrite(path: Path, keys: Keys) -> None:
    """Write the file anew with the lines that stay, each by its number; a crash leaves the old one or the new one."""
    fresh = path.with_name(f".{path.name}.new")
    create_private(fresh)
    with path.open("rb") as old, fresh.open("wb") as new:
        for number, line in enumerate(old, start=1):
            found = keys.find(_key_of(path, line, number)[0])
            if found is not None and found[0] == number:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    fresh.replace(path)


class _AsTheyEnd:
    def __init__(self, file: LineFile, keys: Keys) -> None:
        self._file = file
        self._keys = keys

    def put(self, number: int, key: str, line: bytes | None) -> None:
        del number
        if line is not None and key not in self._keys:
            self._file.add(line)
            self._keys.put(key)

    def close(self) -> None:
        self._keys.close()


class _InOrder:
    """Lines in the order of the rows. What the file has stays as long as it is what would be written."""

    def __init__(self, path: Path, file: LineFile) -> None:
        self._path = path
        self._file = file
        self._old = path.open("rb")
        self._same = True
        self._at = 0
        self._held = HeldLines()
        self._next = 0
        self._without = set[str]()
        """Keys of rows that have no line: they are uncertain. One of an earlier call may have been tried again."""

    def put(self, number: int, key: str, line: bytes | None) -> None:
        if line is None:
            self._without.add(key)
        if number != self._next:
            self._held.put(number, line)
            return
        self._write(line)
        self._next += 1
        while self._held_next():
            self._next += 1

    def _held_next(self) -> bool:
        there, line = self._held.take(self._next)
        if there:
            self._write(line)
        return there

    def _write(self, line: bytes | None) -> None:
        if line is None:
            return
        if self._same:
            if self._old.readline() == line:
                self._at += len(line)
                return
            self._same = False
            self._file.cut(self._at)
        self._file.add(line)

    def close(self) -> None:
        """Write also what waits for a row that has not ended: the next call puts that in its place."""
        while (first := self._held.first()) is not None:
            self._write(self._held.take(first)[1])
        if self._same:
            self._leave_rest()
        self._old.close()
        self._held.close()

    def _leave_rest(self) -> None:
        """Leave what this call has not come to as it is, but for half a line, and the lines of rows without one."""
        kept, cut, number = HeldLines(), False, 0
        while (line := self._old.readline()).endswith(b"\n"):
            if self._without and _key_of(self._path, line, 0)[0] in self._without:
                cut = True
            elif cut:
                kept.put(number, line)
                number += 1
            else:
                self._at += len(line)
        if cut or line:
            self._file.cut(self._at)
        for place in range(number):
            self._file.add(kept.take(place)[1] or b"")
        kept.close()
