"""Data sets: files, addresses, frames, cursors and iterables as rows that can be read again."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import logging
import os
import pickle
import tempfile
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copyreg import dispatch_table
from dataclasses import dataclass, is_dataclass
from functools import partial
from importlib import import_module
from itertools import chain, takewhile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit, urlunsplit
from zipfile import ZipFile

import fsspec  # pyright: ignore[reportMissingTypeStubs]
import httpx
import sqlalchemy as sa

from prefect_crew._internal.prefect_errors import HTTP_ERRORS, STATUS_ERRORS
from prefect_crew.exceptions import DatasetError

if TYPE_CHECKING:
    from types import ModuleType

DatasetFormat = Literal["csv", "tsv", "jsonl", "json", "parquet"]
ENDINGS: dict[str, DatasetFormat] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
}
COMPRESSED = {".gz", ".bz2", ".xz", ".lzma", ".zip"}
ROW_LIMIT = 1 << 28
"""Characters of a line, and of a field. Without a limit, a quote that is never closed makes one row of a whole file."""
PART = 5_000
"""Rows of a frame or of a query that are converted at once."""
_PARTS = {
    "AsyncResult": "give the result of a query without stream()",
    **dict.fromkeys(
        ("Select", "TextClause"),
        "it names no database, so give the result of connection.execute(…), or sql://BLOCK?query=…",
    ),
    "TextFileReader": "give pandas.read_csv without chunksize, or the path of the file",
}
"""The advice for objects that hold rows and are no iterables of rows, by the names of their types."""
_fsspec = cast("Any", fsspec)


@dataclass(frozen=True)
class Row:
    """One row. `line` is its line in the file, from 1, or its number where there is no file.

    `fault` is the reason why the line holds no row, whose content is then in `raw`; None for a row.
    """

    line: int
    values: Mapping[str, Any]
    fault: str | None = None
    raw: Any = None


@dataclass(frozen=True)
class Dataset:
    """Rows that can be read several times. `name` is for people, without any secret of an address.

    `rows` also yields lines that hold no row, with their `fault`. A later call opens `address`, which is None for rows
    that only this process has.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    address: str | None = None
    format: DatasetFormat | None = None
    encoding: str = "utf-8-sig"
    delimiter: str | None = None


def open_dataset(
    source: Any,
    *,
    format: DatasetFormat | None = None,  # noqa: A002
    encoding: str = "utf-8-sig",
    delimiter: str | None = None,
) -> Dataset:
    """Return the data set of a path, a URL, an fsspec address, an iterable of mappings, a frame, or a cursor.

    `delimiter` separates the fields of a CSV file; left out, the header shows it. A cursor, a result of SQLAlchemy and
    an Arrow stream are read here, once, into a `Spool`: drivers bind them to their thread.

    Raises:
        DatasetError: The format is unknown, or `source` is no data set. Faults of rows come while the rows are read.
    """
    if isinstance(source, str | os.PathLike):
        address = os.fspath(cast("str | os.PathLike[str]", source))
        name = shown_address(address)
        kind = format or _format_of(address, name)
        file = _File(address, name)
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
            raise DatasetError(
                f"cannot have the delimiter {delimiter!r}. Give one character, no quote and no line end.", source=name
            )
        rows_of_file = partial(_read_file, file, kind, encoding, delimiter)
        return Dataset(name, rows_of_file, address, kind, encoding, delimiter)
    kind_name = cast("type[Any]", type(source)).__name__
    library = cast("type[Any]", type(source)).__module__.partition(".")[0]
    if _is_frame(source):
        name = f"{library} {kind_name}"
        return Dataset(name, lambda: _of_mappings(_frame_rows(source, library, name)))
    if (dataset := _spooled(source)) is not None:
        return dataset
    is_parts = kind_name in _PARTS
    if is_parts or isinstance(source, Mapping | bytes | bytearray) or not isinstance(source, Iterable):
        remedy = _PARTS.get(kind_name, "give a path, an iterable of mappings, a data frame, or a cursor")
        raise DatasetError(f"is of type {kind_name}, which is not a data set: {remedy}.", source="data set")
    rows = cast("Iterable[Any]", source)
    mappings = rows if isinstance(rows, list | tuple) else list(rows)  # rows are read twice
    return Dataset(f"{kind_name} of rows", lambda: _of_mappings(mappings))


async def aopen_dataset(source: Any, **options: Any) -> Dataset:
    """Return the data set of `open_dataset`. A source that can be read once is read in a thread.

    So a slow query does not stop the event loop. A driver may bind a cursor to the thread that made it, as sqlite3 does
    without `check_same_thread=False`. Such a cursor is read on the event loop. A cancellation ends the read after its
    part of the rows, and waits for that, since the caller may close the cursor then.

    Raises DatasetError.
    """
    is_wanted = True
    reading = asyncio.ensure_future(asyncio.to_thread(_spooled, source, lambda: is_wanted))
    try:
        if (dataset := await asyncio.shield(reading)) is not None:
            return dataset
    except DatasetError as error:
        if "same thread" not in error.reason:  # the text of sqlite3, and of libraries like it; no row was read
            raise
    finally:
        is_wanted = False
        await asyncio.wait({reading})
    return open_dataset(source, **options)


# Addresses


def is_remote(address: str) -> bool:
    """Return whether an address is not a path on this machine."""
    return "://" in address and not address.startswith("file://")


def whole_address(address: str) -> str:
    """Return a remote address as it is, and any other as an absolute path without `file://`. `~` is the home folder."""
    if is_remote(address):
        return address
    path = os.path.expanduser(address.removeprefix("file://"))  # noqa: PTH111  for `~name` of no user, pathlib raises
    return str(Path(path).absolute())


def shown_address(address: str) -> str:
    """Return an address for people: without user, password and query, since a query may be a signature.

    fsspec chains addresses, as in `simplecache::https://user:password@host/rows.csv`.
    """
    return "::".join(_shown_link(link) for link in address.split("::")) if is_remote(address) else address


def error_text(error: Exception, address: str) -> str:
    """Return the text of an error, or only its type if the address holds secrets, which the text may quote."""
    kind = type(error).__name__
    if shown_address(address) != address:
        return kind
    # SQLAlchemy's own text also quotes the statement and its parameters.
    error = getattr(error, "orig", None) or error
    # The next lines may quote the statement or a row.
    first_line = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": .")
    return getattr(error, "strerror", None) or first_line


def _shown_link(link: str) -> str:
    if "://" not in link:
        return link
    parts = urlsplit(link)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@contextmanager
def _logging_shown_addresses() -> Generator[None]:
    """Inside this block, httpx logs the addresses of this thread's requests without secrets: it logs each at INFO."""
    thread = threading.get_ident()

    def show(record: logging.LogRecord) -> bool:
        if threading.get_ident() == thread and isinstance(record.args, tuple):
            shown = (shown_address(str(value)) if isinstance(value, httpx.URL) else value for value in record.args)
            record.args = tuple(shown)
        return True

    logger = logging.getLogger("httpx")
    logger.addFilter(show)
    try:
        yield
    finally:
        logger.removeFilter(show)


def _format_of(address: str, name: str) -> DatasetFormat:
    ending = ""
    for part in address.split("::"):  # the innermost first
        path = Path(part.partition("?")[0])
        ending = Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix
        if kind := ENDINGS.get(ending.lower()):
            return kind
    raise DatasetError(
        f"the format is not known from the file ending {ending!r}. Known: {', '.join(sorted(ENDINGS))}; in "
        "Python give format=….",
        source=name,
    )


# Files


class _File:
    """A file on this machine, which must not change after the first read, or a remote file, which is fetched once."""

    def __init__(self, address: str, name: str) -> None:
        self.name = name
        self.address = address
        self._path = None if is_remote(address) else Path(whole_address(address))
        self._is_http = address.startswith(("http://", "https://"))
        self._seen: tuple[int, int] | None = None
        self._fetched: tempfile.TemporaryDirectory[str] | None = None

    def fetch(self) -> Path:
        """Return the path of the file on this machine."""
        if self._path is not None:
            self._check(self._path.stat())
            return self._path
        if self._fetched is None:
            folder = tempfile.TemporaryDirectory(prefix="prefect-crew-")
            with (Path(folder.name) / "data").open("wb") as target:
                target.writelines(self._chunks())
            self._fetched = folder
        return Path(self._fetched.name) / "data"

    def _check(self, stat: os.stat_result) -> None:
        now = (stat.st_size, stat.st_mtime_ns)
        if self._seen not in (None, now):
            raise DatasetError(
                "changed during the read. Run the batch again when it does not change any more.", source=self.name
            )
        self._seen = now

    def _chunks(self) -> Iterator[bytes]:
        if self._is_http:
            # Not by fsspec, which needs a further package for it.
            stream = httpx.stream("GET", self.address, follow_redirects=True, timeout=60.0)
            with _logging_shown_addresses(), stream as response:
                response.raise_for_status()
                yield from response.iter_bytes()
            return
        opened = _fsspec.open(self.address, "rb", compression="infer")
        compression, opened.compression = opened.compression, None
        with opened as file, _decompressed(file, compression, self.name) as source:
            while chunk := source.read(1 << 20):
                yield chunk

    @contextmanager
    def open(self) -> Generator[tuple[IO[bytes], Callable[[], None]]]:
        """Yield the file, decompressed by its extension, and a check that raises DatasetError if the file changed."""
        is_stored = self._path is not None or self._is_http
        compression = _fsspec.utils.infer_compression(self.address.partition("?")[0]) if is_stored else None
        with self.fetch().open("rb") as file, _decompressed(file, compression, self.name) as content:
            buffered = content if hasattr(content, "read1") else io.BufferedReader(content)
            yield buffered, lambda: self._check(os.fstat(file.fileno()))


def _decompressed(file: IO[bytes], compression: str | None, name: str) -> Any:
    """Return a context manager of the content. Raises DatasetError if a ZIP archive holds not one file."""
    if compression != "zip":
        return nullcontext(file) if compression is None else _fsspec.compression.compr[compression](file, mode="rb")
    # fsspec would take the first file, or the folder before it.
    archive = ZipFile(file)
    files = [part for part in archive.namelist() if not part.endswith("/") and not part.startswith("__MACOSX/")]
    if len(files) != 1:
        raise DatasetError(
            f"is an archive of {len(files)} files, and a data set is one file. Give zip://FILE::ARCHIVE.", source=name
        )
    return archive.open(files[0])


def _read_file(file: _File, kind: DatasetFormat, encoding: str, delimiter: str | None) -> Iterator[Row]:
    with _reporting(file.name, file.address):
        if kind == "parquet":
            yield from _of_mappings(_parquet(file))
            return
        with file.open() as (content, check):
            lines = _lines(content, file.name, encoding, check)
            if kind == "jsonl":
                yield from _jsonl(lines)
            elif kind == "json":
                yield from _json(lines, file.name)
            else:
                yield from _csv(lines, file.name, "\t" if kind == "tsv" else ",", delimiter)


@contextmanager
def _reporting(name: str, address: str) -> Generator[None]:
    """Raise each error of a file as a DatasetError."""
    try:
        yield
    except DatasetError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DatasetError(f"cannot be opened: {error_text(error, address)}.", source=name) from None
    except HTTP_ERRORS as error:
        status = f"HTTP {error.response.status_code}" if isinstance(error, STATUS_ERRORS) else str(error)
        raise DatasetError(f"cannot be fetched: {status or type(error).__name__}.", source=name) from None
    except Exception as error:  # noqa: BLE001  each library that fsspec takes raises errors of its own
        raise DatasetError(f"cannot be read: {error_text(error, address)}.", source=name) from None


def _lines(file: IO[bytes], name: str, encoding: str, check: Callable[[], None]) -> Iterator[str]:
    """Yield each line with its line feed. Nothing else ends one. `check`, which may raise, runs before each yield."""
    try:
        text = io.TextIOWrapper(cast("Any", file), encoding, newline="\n")
    except LookupError:
        raise DatasetError(f"there is no encoding {encoding!r}.", source=name) from None
    number = 1
    try:
        while line := text.readline(ROW_LIMIT + 1):
            if len(line) > ROW_LIMIT:
                raise DatasetError("has a line without an end.", source=name, line=number)
            check()
            yield line
            number += 1
        check()
    except UnicodeDecodeError as error:
        digits = error.object[error.start : error.end][:8].hex(" ")
        number += error.object[: error.start].decode(error.encoding, "ignore").count("\n")
        raise DatasetError(
            f"the bytes {digits} are not {encoding}. Save the file as UTF-8, or in Python give its encoding=….",
            source=name,
            line=number,
        ) from None


_FIELD_SIZE_LOCK = threading.Lock()


def _next_fields(reader: Iterator[list[str]]) -> list[str]:
    """Return the next row of a CSV file, whose fields may be long.

    The limit of 131,072 characters a field holds for the whole process, which is not ours, so this restores it at once.
    """
    with _FIELD_SIZE_LOCK:
        limit = csv.field_size_limit(ROW_LIMIT)
        try:
            return next(reader)
        finally:
            csv.field_size_limit(limit)


def _csv(lines: Iterator[str], name: str, usual: str, delimiter: str | None) -> Iterator[Row]:
    first = next(lines, "")
    if delimiter is None:  # Excel writes semicolons where a comma is the decimal point
        delimiter = next((sign for sign in (usual, *";\t|,") if sign in first), usual)
    reader = csv.reader(chain((first,), lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    while True:
        try:
            fields = _next_fields(reader)
        except StopIteration:
            break
        except csv.Error as error:
            # Before these two errors the reader took all lines to the end of the file, or far too many.
            is_open = "unexpected end of data" in str(error) or "field larger" in str(error)
            reason = f"is not CSV: {'a quote that opens in this row is never closed' if is_open else error}"
            if is_open or not header:
                raise DatasetError(f"{reason}.", source=name, line=line) from None
            yield Row(line, {}, reason)
        else:
            if not header:
                if not fields:
                    break
                header = fields
                _check_columns(header, name, line=1)
            elif len(fields) == len(header):
                yield Row(line, dict(zip(header, fields, strict=True)))
            elif fields:
                yield Row(line, {}, f"has {len(fields)} fields, the header has {len(header)}", fields)
        line = reader.line_num + 1
    if not header:
        raise DatasetError("is empty: it has no header line.", source=name)


def _check_columns(columns: Sequence[str], name: str, *, line: int | None = None) -> None:
    if doubled := _doubled(columns):
        raise DatasetError(f"the columns {doubled} appear twice.", source=name, line=line)


def _doubled(columns: Sequence[str]) -> str:
    """Return the columns that appear twice, for people; empty if there are none."""
    return ", ".join(repr(column) for column in sorted({name for name in columns if columns.count(name) > 1}))


def _jsonl(lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield Row(number, {}, f"is not JSON: {error}", text)
        else:
            yield _mapping_row(value, number)


def _json(lines: Iterable[str], name: str) -> Iterator[Row]:
    """Yield the objects of a JSON array after a read of the whole array. A file of one object is one row."""
    try:
        value = json.loads("".join(lines))
    except json.JSONDecodeError as error:
        hint = " Is it JSON Lines? Then name it .jsonl." if error.msg == "Extra data" else ""
        raise DatasetError(f"is not JSON: {error.msg}.{hint}", source=name, line=error.lineno) from None
    except RecursionError as error:
        raise DatasetError(f"is not JSON: {error}.", source=name) from None
    if not isinstance(value, list | dict):
        raise DatasetError("is not a JSON array of objects.", source=name)
    yield from _of_mappings(cast("list[Any]", value) if isinstance(value, list) else [value])


# Mappings and frames


def _mapping_row(value: Any, line: int) -> Row:
    if isinstance(value, sa.Row):
        columns = cast("Sequence[str]", cast("Any", value)._fields)
        if doubled := _doubled(columns):
            return Row(line, {}, f"has the columns {doubled} twice")
        value = dict(zip(columns, cast("Sequence[Any]", value), strict=True))
    elif not isinstance(value, Mapping) and _is_row(value):
        value = {name: value[name] for name in value.keys()}  # noqa: SIM118  its iterator yields values
    if not isinstance(value, Mapping):
        return Row(line, {}, f"is of type {type(value).__name__}, not a mapping{_remedy(value)}", value)
    return Row(line, {str(key): item for key, item in cast("Mapping[Any, Any]", value).items()})


def _is_row(value: Any) -> bool:
    """Return whether a value is a row with names, such as sqlite3.Row, and no data frame."""
    return callable(getattr(value, "keys", None)) and not hasattr(cast("Any", type(value)), "__arrow_c_stream__")


def _remedy(value: Any) -> str:
    """Return how to make a mapping of a value of another type, as the end of a sentence."""
    kind = type(value).__name__
    if hasattr(value, "model_dump"):
        return ": give its model_dump()"
    if hasattr(value, "_asdict"):
        return ": give its _asdict()"
    if is_dataclass(value):
        return ": give its dataclasses.asdict()"
    if kind in ("DataFrame", "RecordBatch", "Table"):
        return ": it is a part of many rows, so give the parts as one data frame or table"
    return ""


def _of_mappings(rows: Iterable[Any]) -> Iterator[Row]:
    return (_mapping_row(value, number) for number, value in enumerate(rows, start=1))


def polars(source: str) -> ModuleType:
    """Return polars, which the extra `data` installs. Raises DatasetError."""
    try:
        import polars
    except ImportError:
        raise DatasetError("needs polars: pip install 'prefect-crew[data]'.", source=source) from None
    return polars


def _parquet(file: _File) -> Iterator[Mapping[str, Any]]:
    library: Any = polars(file.name)
    path = file.fetch()
    try:
        scan, start, part = library.scan_parquet(path), 0, [None]
        while len(part):
            part = scan.slice(start, PART).collect()
            file.fetch()  # raises if it has changed
            yield from part.iter_rows(named=True)
            start += PART
    except (library.exceptions.PolarsError, OSError) as error:
        raise DatasetError(f"cannot be read as Parquet: {error}.", source=file.name) from None


def _is_frame(source: Any) -> bool:
    kind = cast("type[Any]", type(source))
    is_known = kind.__module__.partition(".")[0] in ("polars", "pandas", "pyarrow")
    return is_known and kind.__name__ in ("DataFrame", "LazyFrame", "Table", "RecordBatch")


def _frame_rows(frame: Any, library: str, name: str) -> Iterator[Mapping[Any, Any]]:
    """Yield the rows of a data frame or an Arrow table. A large frame is converted part by part."""
    if library == "polars":
        yield from (frame.collect() if hasattr(frame, "collect") else frame).iter_rows(named=True)
        return
    columns = frame.schema.names if library == "pyarrow" else map(str, frame.columns)
    _check_columns(list(columns), name)
    for start in range(0, len(frame), PART):
        if library == "pyarrow":
            yield from frame.slice(start, PART).to_pylist()
        else:
            part = frame.iloc[start : start + PART]
            yield from part.astype(object).where(part.notna(), None).to_dict("records")


# Rows that can be read once


class Spool:
    """Rows that can be read once, in a temporary file of this machine, from which they are read again.

    The argument `fetch`, if given, calls `fill` at the first read. Raises DatasetError.
    """

    def __init__(self, name: str, fetch: Callable[[Spool], None] | None = None) -> None:
        self.name = name
        self._fetch = fetch
        self._file: IO[bytes] | None = None
        self._columns: Sequence[str] = ()

    def fill(self, columns: Sequence[str], parts: Iterable[Sequence[Any]]) -> None:
        """Write parts of rows to the file. A row is a sequence of values, or a mapping of the columns."""
        _check_columns(columns, self.name)
        # It has no name: a killed process leaves no rows on the disk.
        file = tempfile.TemporaryFile(prefix="prefect-crew-")  # noqa: SIM115  the rows are read later
        weakref.finalize(self, file.close)
        for part in parts:
            values = [_values_of(row, columns) for row in part]
            pickler = pickle.Pickler(file, pickle.HIGHEST_PROTOCOL)  # a new one: it keeps all that it has written
            pickler.dispatch_table = _PICKLED
            pickler.dump(values)
        self._file, self._columns = file, tuple(columns)

    def rows(self) -> Iterator[Row]:
        """Yield the rows, in the order in which they came."""
        file, number, position = self._data(), 0, 0
        while True:
            file.seek(position)  # readers share the file
            try:
                part = pickle.load(file)  # noqa: S301  a private file that this process has written
            except EOFError:
                return
            position = file.tell()
            for values in part:
                number += 1
                yield Row(number, dict(zip(self._columns, values, strict=True)))

    def _data(self) -> IO[bytes]:
        if self._file is None and self._fetch is not None:
            self._fetch(self)
        assert self._file is not None  # noqa: S101  it is filled now
        return self._file


def _spooled(source: Any, is_wanted: Callable[[], bool] = lambda: True) -> Dataset | None:
    """Read a result, a cursor or an Arrow stream part by part, and stop when `is_wanted` is false.

    Return the rows so far, None for a source of another kind. Raises DatasetError.
    """
    if isinstance(source, str | os.PathLike) or _is_frame(source):
        return None
    kind = cast("type[Any]", type(source))
    spool = Spool(f"{kind.__module__.partition('.')[0]} {kind.__name__}")
    with _reporting(spool.name, spool.name):
        if (contents := _parts_of(source, spool.name)) is None:
            return None
        columns, parts = contents
        spool.fill(columns, takewhile(lambda _: is_wanted(), parts))
    return Dataset(spool.name, spool.rows)


def _values_of(row: Any, columns: Sequence[str]) -> list[Any]:
    return [row[name] for name in columns] if isinstance(row, Mapping) else [*row]


def _copied(view: Any) -> tuple[Any, ...]:
    return bytes, (view.tobytes(),)


_PICKLED = {**dispatch_table, memoryview: _copied}
"""How values are pickled: a driver may return binary values as views."""


def _parts_of(source: Any, name: str) -> tuple[Sequence[str], Iterable[Sequence[Any]]] | None:
    """Return the columns and the parts of a source that can be read once; None for a source of another kind.

    Such a source is a result of SQLAlchemy, a cursor of the DB-API or of DuckDB, or anything with Arrow's C stream.
    """
    if isinstance(source, sa.Result | sa.MappingResult):
        result = cast("sa.Result[Any]", source)
        return list(result.keys()), result.partitions(PART)
    kind = cast("type[Any]", type(source))
    if not hasattr(kind, "__arrow_c_stream__"):
        if not hasattr(kind, "fetchmany") or not hasattr(source, "description"):
            return None
        if source.description is None:
            raise DatasetError("has no result: execute a query that returns rows, and give its cursor.", source=name)
        return [str(column[0]) for column in source.description], iter(lambda: source.fetchmany(PART) or None, None)
    try:
        reader = import_module("pyarrow").RecordBatchReader.from_stream(source)
    except ImportError:
        frame = polars(name).DataFrame(source)  # as a whole: polars reads no part of a stream
        return frame.columns, (part.rows() for part in frame.iter_slices(PART))
    slices = (batch.slice(start, PART) for batch in reader for start in range(0, batch.num_rows, PART))
    return reader.schema.names, (part.to_pylist() for part in slices)
