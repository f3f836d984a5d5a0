"""Data sets: files, addresses, frames and iterables as rows that can be read again."""

from __future__ import annotations

import codecs
import csv
import io
import json
import lzma
import os
import pickle
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit, urlunsplit

import fsspec  # pyright: ignore[reportMissingTypeStubs]
import httpx

from prefect_crew.exceptions import DatasetError

if TYPE_CHECKING:
    from types import ModuleType


CHUNK = 1 << 20
ROW_LIMIT = 1 << 28
"""Characters of one row. A quote that is never closed would else make one row of a whole file."""
_SPACE = re.compile(r"[ \t\r\n]*")
_CUT = 16
"""Characters before the end of what was read within which an error may be the end's own."""


@dataclass(frozen=True)
class Row:
    """One row. `line` is that of the file, 1-based, or the row's number where there is no file.

    `fault` is why it is no row of this data set, None where it is one; `raw` is then what stands there.
    """

    line: int
    values: Mapping[str, Any]
    fault: str | None = None
    raw: Any = None


def faulty(line: int, fault: str, raw: Any = None) -> Row:
    """Return what stands in the place of a row and is none."""
    return Row(line, {}, fault, raw)


def read_text(file: IO[bytes], kind: str, name: str, encoding: str) -> Iterator[Row]:
    """Yield the rows of a text file.

    Args:
        file: The file, decompressed, from its beginning.
        kind: One of TEXT_FORMATS.
        name: What errors call it.
        encoding: Any that Python knows.

    Raises:
        DatasetError: It cannot be read to its end. Rows before that may have been yielded.
    """
    return TEXT_FORMATS[kind](_lines(file, name, encoding), name)


def mapping_row(value: Any, line: int) -> Row:
    """Return a mapping as a row."""
    if not isinstance(value, Mapping):
        return faulty(line, f"holds a {type(value).__name__}, not an object with inputs", value)
    return Row(line, {str(key): item for key, item in cast("Mapping[Any, Any]", value).items()})


def _lines(file: IO[bytes], name: str, encoding: str) -> Iterator[str]:
    """Yield the lines with their ends. Only a line feed ends one."""
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
    except LookupError:
        raise DatasetError(f"there is no encoding {encoding!r}.", source=name) from None
    number = 1
    pieces: list[str] = []
    size = 0
    while True:
        chunk = file.read(CHUNK)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            shown = error.object[error.start : error.end][:8].hex(" ")
            line = number + error.object[: error.start].decode(error.encoding, "ignore").count("\n")
            raise DatasetError(
                f"the bytes {shown} are not {encoding}. Give the file's encoding=….", source=name, line=line
            ) from None
        first, *more = text.split("\n")
        pieces.append(first)
        size += len(first)
        if size > ROW_LIMIT:
            raise _too_long(name, number)
        for start in more:
            yield "".join((*pieces, "\n"))
            number += 1
            pieces, size = [start], len(start)
        if not chunk:
            break
    if size:
        yield "".join(pieces)


def _too_long(name: str, line: int) -> DatasetError:
    reason = f"has a row of more than {ROW_LIMIT >> 20:,} million characters. Is there a quote that is never closed?"
    return DatasetError(reason, source=name, line=line)


def _csv(lines: Iterable[str], name: str, delimiter: str) -> Iterator[Row]:
    # The limit of 131,072 characters a field is a process-wide default from 1999; documents are longer.
    csv.field_size_limit(2**31 - 1)
    size, start = 0, 1

    def counted() -> Iterator[str]:
        nonlocal size
        for line in lines:
            size += len(line)
            if size > ROW_LIMIT:
                raise _too_long(name, start)
            yield line

    reader = csv.reader(counted(), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise DatasetError("is empty: it has no header line.", source=name)
        _check_header(header, name)
        start = reader.line_num + 1
    except csv.Error as error:
        raise DatasetError(f"is no CSV: {_csv_reason(error)}.", source=name, line=start) from None
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if _OPEN_QUOTE in str(error):  # it has taken all lines to the end of the file with it
                raise DatasetError(f"is no CSV: {_csv_reason(error)}.", source=name, line=start) from None
            line, start, size = start, reader.line_num + 1, 0
            yield faulty(line, f"is no CSV: {_csv_reason(error)}")
            continue
        line, start, size = start, reader.line_num + 1, 0
        if not fields:
            continue
        if len(fields) != len(header):
            yield faulty(line, f"has {len(fields)} fields, the header has {len(header)}", fields)
        else:
            yield Row(line, dict(zip(header, fields, strict=True)))


_OPEN_QUOTE = "unexpected end of data"


def _csv_reason(error: csv.Error) -> str:
    return "a quote that opens in this row is never closed" if _OPEN_QUOTE in str(error) else str(error)


def _check_header(header: list[str], name: str) -> None:
    doubled = sorted({column for column in header if header.count(column) > 1})
    if doubled:
        listed = ", ".join(repr(column) for column in doubled)
        raise DatasetError(f"the columns {listed} are there twice.", source=name, line=1)


class _TwiceError(ValueError):
    """A name is twice in one object: which value is meant?"""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [key for key, _ in pairs]
        doubled = next(key for key in names if names.count(key) > 1)
        raise _TwiceError(f"the name {doubled!r} is twice in one object")
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def _jsonl(lines: Iterable[str], name: str) -> Iterator[Row]:
    del name
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        try:
            value = _decoder.decode(text)
        except (ValueError, RecursionError) as error:
            yield faulty(number, f"is no JSON: {error}", text)
        else:
            yield mapping_row(value, number)


def _json(lines: Iterable[str], name: str) -> Iterator[Row]:
    """Yield the objects of a JSON array one by one; a file of one object is one row."""
    text = _Text(lines, name)
    first = text.peek()
    if first == "{":
        yield text.row()
        if text.peek():
            raise text.error("has something after its object. Is it JSON Lines? Then give format='jsonl'.")
        return
    if first != "[":
        raise text.error("is empty." if first == "" else "is no JSON array of objects.")
    text.skip()
    while text.peek() != "]":
        yield text.row()
        if text.peek() == ",":
            text.skip()
            if text.peek() == "]":
                raise text.error("is no JSON: a comma before the end of the array.")
        elif text.peek() != "]":
            what = "ends in the middle of its array." if text.peek() == "" else "is no JSON: expected ',' or ']'."
            raise text.error(what)
    text.skip()
    if text.peek():
        raise text.error("has something after its end.")


class _Text:
    """A text read in pieces, from which whole JSON values are taken. `line` is where the next one stands."""

    def __init__(self, lines: Iterable[str], name: str) -> None:
        self._lines = iter(lines)
        self._name = name
        self._buffer = ""
        self._at = 0
        self.line = 1

    def error(self, reason: str) -> DatasetError:
        return DatasetError(reason, source=self._name, line=self.line)

    def _more(self) -> bool:
        """Read on; at least as much again as is held, so that one long value is not parsed over and over."""
        held = self._buffer[self._at :]
        pieces, size = [held], 0
        for line in self._lines:
            pieces.append(line)
            size += len(line)
            if size >= max(CHUNK, len(held)):
                break
        self._buffer, self._at = "".join(pieces), 0
        return size > 0

    def _move(self, end: int) -> None:
        self.line += self._buffer.count("\n", self._at, end)
        self._at = end

    def peek(self) -> str:
        """Return the next character that is no white space, "" at the end."""
        while True:
            space = _SPACE.match(self._buffer, self._at)
            self._move(space.end() if space else self._at)
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        self._move(self._at + 1)

    def row(self) -> Row:
        line = self.line
        return mapping_row(self._value(), line)

    def _value(self) -> Any:
        while True:
            try:
                value, end = _decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                if len(self._buffer) - self._at > ROW_LIMIT:
                    raise _too_long(self._name, self.line) from None
                # Wrong, or only cut off where the reading stopped so far? Then the rest of the file decides.
                cut = error.pos >= len(self._buffer) - _CUT or error.msg.startswith("Unterminated string")
                if not cut or not self._more():
                    self._move(min(error.pos, len(self._buffer)))
                    raise self.error(f"is no JSON: {error.msg}.") from None
            except (ValueError, RecursionError) as error:
                raise self.error(f"is no JSON: {error}.") from None
            else:
                self._move(end)
                return value


TEXT_FORMATS: dict[str, Callable[[Iterable[str], str], Iterator[Row]]] = {
    "csv": lambda lines, name: _csv(lines, name, ","),
    "tsv": lambda lines, name: _csv(lines, name, "\t"),
    "jsonl": _jsonl,
    "json": _json,
}
"""The formats that need nothing further, each with what yields its rows."""

SLICE = 5_000
"""Rows that are held at once."""


def polars(what: str) -> ModuleType:
    """Return polars, which the extra `data` brings.

    Raises:
        DatasetError: It is not installed; `what` is what needs it.
    """
    try:
        import polars
    except ImportError:
        raise DatasetError("needs polars: pip install 'prefect-crew[data]'.", source=what) from None
    return polars


def frame_reader(source: Any) -> tuple[str, Callable[[], Iterator[Row]]] | None:
    """Return the name of a data frame or a table and what yields its rows; None for anything else.

    Raises:
        DatasetError: It has two columns of one name.
    """
    kind: type[Any] = cast("Any", type)(source)
    library = kind.__module__.partition(".")[0]
    reader = _FRAMES.get((library, kind.__name__))
    if reader is None:
        return None
    name = f"{library} {kind.__name__}"
    return name, lambda: reader(source, name)


def read_parquet(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file on this machine.

    Raises:
        DatasetError: It is none, it is not there, or polars is missing.
    """
    library: Any = polars(name)
    if not path.is_file():
        raise DatasetError("cannot be opened: there is no such file.", source=name)
    try:
        scan = library.scan_parquet(path)
        number = 0
        while True:
            part = scan.slice(number, SLICE).collect()
            for values in part.iter_rows(named=True):
                number += 1
                yield Row(number, values)
            if len(part) < SLICE:
                return
    except (library.exceptions.PolarsError, OSError) as error:
        raise DatasetError(f"is no Parquet file: {error}.", source=name) from None


def _polars_frame(frame: Any, name: str) -> Iterator[Row]:
    del name
    whole = frame.collect() if hasattr(frame, "collect") else frame
    for number, values in enumerate(whole.iter_rows(named=True), start=1):
        yield Row(number, values)


def _pandas_frame(frame: Any, name: str) -> Iterator[Row]:
    _check_columns([str(column) for column in frame.columns], name)
    number = 0
    for start in range(0, len(frame), SLICE):
        part = frame.iloc[start : start + SLICE]
        part = part.astype(object).where(part.notna(), None)
        for values in part.to_dict("records"):
            number += 1
            yield Row(number, {str(key): value for key, value in values.items()})


def _arrow_table(table: Any, name: str) -> Iterator[Row]:
    _check_columns(table.schema.names, name)
    number = 0
    for start in range(0, table.num_rows, SLICE):
        for values in table.slice(start, SLICE).to_pylist():
            number += 1
            yield Row(number, values)


def _check_columns(columns: Sequence[str], name: str) -> None:
    doubled = sorted({column for column in columns if columns.count(column) > 1})
    if doubled:
        raise DatasetError(f"the columns {', '.join(map(repr, doubled))} are there twice.", source=name)


_FRAMES: dict[tuple[str, str], Callable[[Any, str], Iterator[Row]]] = {
    ("polars", "DataFrame"): _polars_frame,
    ("polars", "LazyFrame"): _polars_frame,
    ("pandas", "DataFrame"): _pandas_frame,
    ("pyarrow", "Table"): _arrow_table,
    ("pyarrow", "RecordBatch"): _arrow_table,
}

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
COMPRESSED = {".gz", ".bz2", ".xz", ".lzma", ".zip", ".zst"}
_files = cast("Any", fsspec)
_COPY = 1 << 20
_UNREADABLE = (OSError, EOFError, ImportError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Dataset:
    """Rows that can be read again and again. `name` is for people, without any secret of an address.

    `rows` gives all of them, also what stands in the place of a row and is none, with its `fault`; who iterates over
    the data set itself gets a DatasetError there.

    `address` is where another machine would read it, with its format and encoding; None for what only this process has.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    address: str | None = None
    format: DatasetFormat | None = None
    encoding: str = "utf-8-sig"

    def __iter__(self) -> Iterator[Row]:
        for row in self.rows():
            if row.fault is not None:
                raise DatasetError(f"{row.fault}.", source=self.name, line=row.line)
            yield row


def open_dataset(source: Any, *, format: DatasetFormat | None = None, encoding: str = "utf-8-sig") -> Dataset:  # noqa: A002
    """Return a data set.

    Args:
        source: A path, a URL or any fsspec address, compressed if its ending says so; an iterable of mappings; a pandas
            or polars data frame, or an Arrow table.
        format: The format of a file whose name does not tell it.
        encoding: That of a text file.

    Raises:
        DatasetError: The format is unknown, or this is no data set. What is wrong within it is raised while it is read.
    """
    if isinstance(source, str | os.PathLike):
        address = os.fspath(cast("str | os.PathLike[str]", source))
        name = shown_address(address)
        kind = format or _format_of(address, name)
        return Dataset(name, _file_reader(address, name, kind, encoding), address, kind, encoding)
    frame = frame_reader(source)
    if frame is not None:
        return Dataset(*frame)
    kind_name = cast("type[Any]", type(source)).__name__
    if isinstance(source, Mapping | bytes | bytearray) or not isinstance(source, Iterable):
        raise DatasetError(
            f"A {kind_name} is no data set: give a path, an iterable of mappings, or a data frame.", source="data set"
        )
    rows = cast("Iterable[Any]", source)
    name = f"{kind_name} of rows"
    if isinstance(rows, list | tuple):
        return Dataset(name, lambda: _of_mappings(rows))
    return Dataset(name, _spooled(rows, name))


def is_remote(address: str) -> bool:
    """Return whether an address is no path on this machine."""
    return "://" in address and not address.startswith("file://")


def whole_address(address: str) -> str:
    """Return an address that means the same in every working directory of this machine."""
    return address if is_remote(address) else str(Path(address.removeprefix("file://")).absolute())


def shown_address(address: str) -> str:
    """Return an address for people: without user, password, and a query, which may be a signature.

    fsspec chains addresses, as in `simplecache::https://user:password@host/rows.csv`.
    """
    return "::".join(_shown_link(link) for link in address.split("::")) if is_remote(address) else address


def _shown_link(link: str) -> str:
    if "://" not in link:
        return link
    parts = urlsplit(link)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _format_of(address: str, name: str) -> DatasetFormat:
    ending = ""
    for part in address.split("::"):  # fsspec chains addresses, the innermost first
        stem, ending = os.path.splitext(part.partition("?")[0])  # noqa: PTH122  an address is not always a path
        if ending.lower() in COMPRESSED:
            ending = os.path.splitext(stem)[1]  # noqa: PTH122
        found = ENDINGS.get(ending.lower())
        if found is not None:
            return found
    raise DatasetError(
        f"the ending {ending!r} tells no format. Known: {', '.join(sorted(ENDINGS))}; or give format=….", source=name
    )


def _file_reader(address: str, name: str, kind: DatasetFormat, encoding: str) -> Callable[[], Iterator[Row]]:
    place = _Remote(address, name) if is_remote(address) else _Local(address, name)

    def rows() -> Iterator[Row]:
        if kind not in TEXT_FORMATS:
            with _told(name):
                path = place.path()
            yield from read_parquet(path, name)
            return
        with _told(name), place.open() as file:
            yield from read_text(file, kind, name, encoding)

    return rows


@contextmanager
def _told(name: str) -> Generator[None]:
    """Say what is wrong with a file in our own words. The rows' reader is within; its errors are ours already."""
    try:
        yield
    except DatasetError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DatasetError(f"cannot be opened: {error.strerror or error}.", source=name) from None
    except httpx.HTTPError as error:
        status = f"HTTP {error.response.status_code}" if isinstance(error, httpx.HTTPStatusError) else str(error)
        raise DatasetError(f"cannot be fetched: {status or type(error).__name__}.", source=name) from None
    except _UNREADABLE as error:
        raise DatasetError(f"cannot be read: {type(error).__name__}: {error}.", source=name) from error


class _Local:
    """A file on this machine, which must not change between two readings."""

    def __init__(self, address: str, name: str) -> None:
        self._path = Path(address.removeprefix("file://"))
        self._name = name
        self._seen: tuple[int, int] | None = None

    def path(self) -> Path:
        stat = self._path.stat()
        now = (stat.st_size, stat.st_mtime_ns)
        if self._seen not in (None, now):
            raise DatasetError("has changed while it was read. Run the batch again once it stays.", source=self._name)
        self._seen = now
        return self._path

    @contextmanager
    def open(self) -> Generator[IO[bytes]]:
        with _decompressed(self.path(), str(self._path), self._name) as file:
            yield file


class _Remote:
    """A file elsewhere, fetched once into a temporary folder that goes with this object."""

    def __init__(self, address: str, name: str) -> None:
        self._address = address
        self._name = name
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def _over_http(self) -> bool:
        return self._address.startswith(("http://", "https://"))

    def path(self) -> Path:
        if self._folder is None:
            folder = tempfile.TemporaryDirectory(prefix="prefect-crew-")
            self._fetch(Path(folder.name) / "data")
            self._folder = folder
        return Path(self._folder.name) / "data"

    def _fetch(self, target: Path) -> None:
        with target.open("wb") as file:
            if self._over_http:
                # Not by fsspec, which needs a further package for it.
                with httpx.stream("GET", self._address, follow_redirects=True, timeout=60.0) as response:
                    response.raise_for_status()
                    for chunk in response.iter_bytes(_COPY):
                        file.write(chunk)
                return
            _check_compression(self._address, self._name)
            with _files.open(self._address, "rb", compression="infer") as source:
                while chunk := source.read(_COPY):
                    file.write(chunk)

    @contextmanager
    def open(self) -> Generator[IO[bytes]]:
        # What fsspec has fetched is decompressed already.
        ending = self._address.partition("?")[0] if self._over_http else ""
        with _decompressed(self.path(), ending, self._name) as file:
            yield file


@contextmanager
def _decompressed(path: Path, ending_of: str, name: str) -> Generator[IO[bytes]]:
    """Open a file on this machine, decompressed as the ending of `ending_of` says."""
    _check_compression(ending_of, name)
    compression = _files.utils.infer_compression(ending_of)
    with path.open("rb") as raw:
        if compression is None:
            yield raw
            return
        with _files.compression.compr[compression](raw, mode="rb") as file:
            yield io.BufferedReader(file) if not hasattr(file, "read1") else file


def _check_compression(ending_of: str, name: str) -> None:
    if ending_of.endswith(".zst") and _files.utils.infer_compression(ending_of) is None:
        raise DatasetError("needs zstandard to be decompressed: pip install zstandard.", source=name)


def _of_mappings(rows: Iterable[Any]) -> Iterator[Row]:
    for number, value in enumerate(rows, start=1):
        yield mapping_row(value, number)


def _spooled(rows: Iterable[Any], name: str) -> Callable[[], Iterator[Row]]:
    """Keep rows that can be read only once in a file that goes with this process."""
    spool = tempfile.TemporaryFile("w+b", prefix="prefect-crew-")  # noqa: SIM115  lives as long as the data set
    for row in _of_mappings(rows):
        try:
            pickle.dump(row, spool, pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise DatasetError(
                f"holds what cannot be kept for a second reading: {error}. Give a list of the rows.",
                source=name,
                line=row.line,
            ) from None
    end = spool.tell()

    def again() -> Iterator[Row]:
        # Each reader has a position of its own in the file.
        position = 0
        while position < end:
            spool.seek(position)
            row: Row = pickle.load(spool)  # noqa: S301  written by this process, above
            position = spool.tell()
            yield row

    return again
