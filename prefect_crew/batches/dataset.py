"""Data sets: files, addresses, frames and iterables as rows that can be read again."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit, urlunsplit

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
COMPRESSED = {".gz", ".bz2", ".xz", ".lzma"}
ROW_LIMIT = 1 << 28
"""Characters of a line, and of a field. Without a limit, a quote that is never closed makes one row of a whole file."""
PART = 5_000
"""Rows of a frame or of a query that are converted at once."""
_fsspec = cast("Any", fsspec)


@dataclass(frozen=True)
class Row:
    """One row. `line` is its line in the file, from 1, or its number where there is no file.

    `fault` is the reason why the line holds no row; None for a row.
    """

    line: int
    values: Mapping[str, Any]
    fault: str | None = None


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
    """Return the data set of a path, a URL, an fsspec address, a data frame, or an iterable of mappings or named rows.

    `delimiter` separates the fields of a CSV file; left out, the header shows it.

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
    kind = cast("type[Any]", type(source))
    library = kind.__module__.partition(".")[0]
    if library in ("polars", "pandas", "pyarrow") and kind.__name__ in ("DataFrame", "LazyFrame", "Table"):
        name = f"{library} {kind.__name__}"
        return Dataset(name, lambda: _of_mappings(_frame_rows(source, library, name)))
    if not isinstance(source, Iterable):
        raise DatasetError(
            f"is of type {kind.__name__}, which is not a data set: give a path, an iterable of mappings, or a data "
            "frame.",
            source="data set",
        )
    rows = cast("Iterable[Any]", source)
    mappings = rows if isinstance(rows, list | tuple) else list(rows)  # rows are read twice
    return Dataset(f"{kind.__name__} of rows", lambda: _of_mappings(mappings))


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
        with _fsspec.open(self.address, "rb", compression="infer") as source:
            while chunk := source.read(1 << 20):
                yield chunk

    @contextmanager
    def open(self) -> Generator[tuple[IO[bytes], Callable[[], None]]]:
        """Yield the file, decompressed by its extension, and a check that raises DatasetError if the file changed."""
        is_stored = self._path is not None or self._is_http
        compression = _fsspec.utils.infer_compression(self.address.partition("?")[0]) if is_stored else None
        opener: Any = None if compression is None else _fsspec.compression.compr[compression]
        with self.fetch().open("rb") as file, opener(file, mode="rb") if opener else nullcontext(file) as content:
            buffered = content if hasattr(content, "read1") else io.BufferedReader(content)
            yield buffered, lambda: self._check(os.fstat(file.fileno()))


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


def _csv(lines: Iterator[str], name: str, usual: str, delimiter: str | None) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), ROW_LIMIT))  # of the whole process; a document is long
    first = next(lines, "")
    if delimiter is None:  # Excel writes semicolons where a comma is the decimal point
        delimiter = next((sign for sign in (usual, *";\t|,") if sign in first), usual)
    reader = csv.reader(chain((first,), lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    while True:
        try:
            fields = next(reader)
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
                check_columns(header, name, line=1)
            elif len(fields) == len(header):
                yield Row(line, dict(zip(header, fields, strict=True)))
            elif fields:
                yield Row(line, {}, f"has {len(fields)} fields, the header has {len(header)}")
        line = reader.line_num + 1
    if not header:
        raise DatasetError("is empty: it has no header line.", source=name)


def check_columns(columns: Sequence[str], name: str, *, line: int | None = None) -> None:
    """Raise DatasetError if two columns have the same name."""
    if doubled := sorted({column for column in columns if columns.count(column) > 1}):
        raise DatasetError(f"the columns {', '.join(map(repr, doubled))} appear twice.", source=name, line=line)


def _jsonl(lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield Row(number, {}, f"is not JSON: {error}")
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
        value = cast("Any", value)._mapping  # noqa: SLF001  the name of SQLAlchemy's documentation
    if not hasattr(value, "keys"):
        return Row(line, {}, f"is of type {type(value).__name__}, not a mapping")
    return Row(line, {str(name): value[name] for name in value.keys()})  # noqa: SIM118  sqlite3.Row yields values


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


def _frame_rows(frame: Any, library: str, name: str) -> Iterator[Mapping[Any, Any]]:
    """Yield the rows of a data frame or an Arrow table. A large frame is converted part by part."""
    if library == "polars":
        yield from (frame.collect() if hasattr(frame, "collect") else frame).iter_rows(named=True)
        return
    columns = frame.schema.names if library == "pyarrow" else map(str, frame.columns)
    check_columns(list(columns), name)
    for start in range(0, len(frame), PART):
        if library == "pyarrow":
            yield from frame.slice(start, PART).to_pylist()
        else:
            part = frame.iloc[start : start + PART]
            yield from part.astype(object).where(part.notna(), None).to_dict("records")
