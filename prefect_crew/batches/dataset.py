"""Data sets: files, addresses, frames and iterables as rows that can be read again."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import lzma
import os
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
CHUNK = 1 << 20
ROW_LIMIT = 1 << 28
"""Characters of one row. A quote that is never closed would else make one row of a whole file."""
PART = 5_000
"""Rows of a frame that are converted at once."""
_fsspec = cast("Any", fsspec)
_UNREADABLE = (OSError, EOFError, ImportError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Row:
    """One row. `line` is that of the file, 1-based, or the row's number where there is no file.

    `fault` is why it is not a row of this data set, None where it is one; `raw` is then what is there instead.
    """

    line: int
    values: Mapping[str, Any]
    fault: str | None = None
    raw: Any = None


@dataclass(frozen=True)
class Dataset:
    """Rows that can be read again and again. `name` is for people, without any secret of an address.

    `rows` gives all of them, also what is in the place of a row and is none, with its `fault`; iterating over the data
    set itself raises DatasetError there.

    `address` is where another machine would read it, with its format and encoding; `digest` gives the SHA-256 of the
    file there. They are None for what only this process has.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    address: str | None = None
    format: DatasetFormat | None = None
    encoding: str = "utf-8-sig"
    digest: Callable[[], str] | None = None

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
        DatasetError: The format is unknown, or this is not a data set. What is wrong within it is raised while it is
            read.
    """
    if isinstance(source, str | os.PathLike):
        address = os.fspath(cast("str | os.PathLike[str]", source))
        name = shown_address(address)
        kind = format or _format_of(address, name)
        file = _File(address, name)
        return Dataset(name, lambda: _read_file(file, kind, encoding), address, kind, encoding, file.digest)
    kind_name = cast("type[Any]", type(source)).__name__
    library = cast("type[Any]", type(source)).__module__.partition(".")[0]
    reader = _FRAMES.get((library, kind_name))
    if reader is not None:
        name = f"{library} {kind_name}"
        return Dataset(name, lambda: reader(source, name))
    if isinstance(source, Mapping | bytes | bytearray) or not isinstance(source, Iterable):
        raise DatasetError(
            f"A {kind_name} is not a data set: give a path, an iterable of mappings, or a data frame.",
            source="data set",
        )
    rows = cast("Iterable[Any]", source)
    kept = rows if isinstance(rows, list | tuple) else list(rows)  # rows are read twice
    return Dataset(f"{kind_name} of rows", lambda: _of_mappings(kept))


# Addresses


def is_remote(address: str) -> bool:
    """Return whether an address is not a path on this machine."""
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
        f"the format is not known from the file ending {ending!r}. Known: {', '.join(sorted(ENDINGS))}; or give "
        "format=….",
        source=name,
    )


# Files


class _File:
    """A file on this machine, which must not change between two readings; or one elsewhere, fetched once."""

    def __init__(self, address: str, name: str) -> None:
        self.name = name
        self._address = address
        self._path = None if is_remote(address) else Path(address.removeprefix("file://"))
        self._seen: tuple[int, int] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def fetch(self) -> Path:
        """Return where the file is on this machine."""
        if self._path is not None:
            stat = self._path.stat()
            now = (stat.st_size, stat.st_mtime_ns)
            if self._seen not in (None, now):
                raise DatasetError(
                    "changed while it was read. Run the batch again when it does not change any more.", source=self.name
                )
            self._seen = now
            return self._path
        if self._folder is None:
            folder = tempfile.TemporaryDirectory(prefix="prefect-crew-")
            with (Path(folder.name) / "data").open("wb") as target:
                for chunk in self._chunks():
                    target.write(chunk)
            self._folder = folder
        return Path(self._folder.name) / "data"

    def digest(self) -> str:
        """Return the SHA-256 of the file as it is stored. Raises DatasetError: it cannot be read."""
        with _reporting(self.name), self.fetch().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _chunks(self) -> Iterator[bytes]:
        if self._address.startswith(("http://", "https://")):
            # Not by fsspec, which needs a further package for it.
            with httpx.stream("GET", self._address, follow_redirects=True, timeout=60.0) as response:
                response.raise_for_status()
                yield from response.iter_bytes(CHUNK)
            return
        with _fsspec.open(self._address, "rb") as source:
            while chunk := source.read(CHUNK):
                yield chunk

    @contextmanager
    def open(self) -> Generator[IO[bytes]]:
        """Open it, decompressed as its ending says."""
        ending = self._address
        if self._path is None:
            # The first link of a chain names the file: zip://rows.csv.gz::s3://bucket/all.zip.
            link, _, rest = self._address.partition("::")
            ending = (link if "://" in link else rest).partition("?")[0]
        compression = _fsspec.utils.infer_compression(ending)
        if ending.endswith(".zst") and compression is None:
            raise DatasetError("needs zstandard to be decompressed: pip install zstandard.", source=self.name)
        with self.fetch().open("rb") as file:
            if compression is None:
                yield file
                return
            with _fsspec.compression.compr[compression](file, mode="rb") as content:
                yield content if hasattr(content, "read1") else io.BufferedReader(content)


def _read_file(file: _File, kind: DatasetFormat, encoding: str) -> Iterator[Row]:
    with _reporting(file.name):
        if kind == "parquet":
            yield from _read_parquet(file.fetch(), file.name)
            return
        with file.open() as content:
            yield from _TEXT_FORMATS[kind](_lines(content, file.name, encoding), file.name)


@contextmanager
def _reporting(name: str) -> Generator[None]:
    """Raise what is wrong with a file as a DatasetError."""
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


def _lines(file: IO[bytes], name: str, encoding: str) -> Iterator[str]:
    """Yield the lines with their ends. Only a line feed ends one."""
    try:
        text = io.TextIOWrapper(cast("Any", file), encoding, newline="\n")
    except LookupError:
        raise DatasetError(f"there is no encoding {encoding!r}.", source=name) from None
    number = 1
    try:
        while line := text.readline(ROW_LIMIT + 1):
            if len(line) > ROW_LIMIT:
                raise _too_long(name, number)
            yield line
            number += 1
    except UnicodeDecodeError as error:
        shown = error.object[error.start : error.end][:8].hex(" ")
        number += error.object[: error.start].decode(error.encoding, "ignore").count("\n")
        raise DatasetError(
            f"the bytes {shown} are not {encoding}. Give the file's encoding=….", source=name, line=number
        ) from None


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
        _check_columns(header, name, line=1)
        start = reader.line_num + 1
    except csv.Error as error:
        raise DatasetError(f"is not CSV: {_csv_reason(error)}.", source=name, line=start) from None
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if _OPEN_QUOTE in str(error):  # it has taken all lines to the end of the file with it
                raise DatasetError(f"is not CSV: {_csv_reason(error)}.", source=name, line=start) from None
            line, start, size = start, reader.line_num + 1, 0
            yield Row(line, {}, f"is not CSV: {_csv_reason(error)}")
            continue
        line, start, size = start, reader.line_num + 1, 0
        if not fields:
            continue
        if len(fields) != len(header):
            yield Row(line, {}, f"has {len(fields)} fields, the header has {len(header)}", fields)
        else:
            yield Row(line, dict(zip(header, fields, strict=True)))


_OPEN_QUOTE = "unexpected end of data"


def _csv_reason(error: csv.Error) -> str:
    return "a quote that opens in this row is never closed" if _OPEN_QUOTE in str(error) else str(error)


def _check_columns(columns: Sequence[str], name: str, *, line: int | None = None) -> None:
    doubled = sorted({column for column in columns if columns.count(column) > 1})
    if doubled:
        listed = ", ".join(repr(column) for column in doubled)
        raise DatasetError(f"the columns {listed} appear twice.", source=name, line=line)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [key for key, _ in pairs]
        doubled = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the name {doubled!r} appears twice in one object")
    return value


_decode = json.JSONDecoder(object_pairs_hook=_object).decode


def _jsonl(lines: Iterable[str], name: str) -> Iterator[Row]:
    del name
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        try:
            value = _decode(text)
        except (ValueError, RecursionError) as error:
            yield Row(number, {}, f"is not JSON: {error}", text)
        else:
            yield _mapping_row(value, number)


def _json(lines: Iterable[str], name: str) -> Iterator[Row]:
    """Yield the objects of a JSON array, which is read into memory whole; a file of one object is one row."""
    try:
        value = _decode("".join(lines))
    except json.JSONDecodeError as error:
        hint = " Is it JSON Lines? Then give format='jsonl'." if error.msg == "Extra data" else ""
        raise DatasetError(f"is not JSON: {error.msg}.{hint}", source=name, line=error.lineno) from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"is not JSON: {error}.", source=name) from None
    if not isinstance(value, list | dict):
        raise DatasetError("is not a JSON array of objects.", source=name)
    yield from _of_mappings(cast("list[Any]", value) if isinstance(value, list) else [value])


_TEXT_FORMATS: dict[str, Callable[[Iterable[str], str], Iterator[Row]]] = {
    "csv": lambda lines, name: _csv(lines, name, ","),
    "tsv": lambda lines, name: _csv(lines, name, "\t"),
    "jsonl": _jsonl,
    "json": _json,
}


# Mappings and frames


def _mapping_row(value: Any, line: int) -> Row:
    if not isinstance(value, Mapping):
        return Row(line, {}, f"holds a {type(value).__name__}, not an object with inputs", value)
    return Row(line, {str(key): item for key, item in cast("Mapping[Any, Any]", value).items()})


def _of_mappings(rows: Iterable[Any]) -> Iterator[Row]:
    for number, value in enumerate(rows, start=1):
        yield _mapping_row(value, number)


def polars(what: str) -> ModuleType:
    """Return polars, which the extra `data` brings. Raises DatasetError."""
    try:
        import polars
    except ImportError:
        raise DatasetError("needs polars: pip install 'prefect-crew[data]'.", source=what) from None
    return polars


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    library: Any = polars(name)
    if not path.is_file():
        raise DatasetError("cannot be opened: there is no such file.", source=name)
    try:
        scan, start, part = library.scan_parquet(path), 0, [None]
        while len(part):
            part = scan.slice(start, PART).collect()
            for number, values in enumerate(part.iter_rows(named=True), start=start + 1):
                yield Row(number, values)
            start += PART
    except (library.exceptions.PolarsError, OSError) as error:
        raise DatasetError(f"is not a Parquet file: {error}.", source=name) from None


def _polars_frame(frame: Any, name: str) -> Iterator[Row]:
    del name
    whole = frame.collect() if hasattr(frame, "collect") else frame
    for number, values in enumerate(whole.iter_rows(named=True), start=1):
        yield Row(number, values)


def _pandas_frame(frame: Any, name: str) -> Iterator[Row]:
    _check_columns([str(column) for column in frame.columns], name)
    for start in range(0, len(frame), PART):
        part = frame.iloc[start : start + PART]
        part = part.astype(object).where(part.notna(), None)
        for number, values in enumerate(part.to_dict("records"), start=start + 1):
            yield Row(number, {str(key): value for key, value in values.items()})


def _arrow_table(table: Any, name: str) -> Iterator[Row]:
    _check_columns(table.schema.names, name)
    for start in range(0, table.num_rows, PART):
        for number, values in enumerate(table.slice(start, PART).to_pylist(), start=start + 1):
            yield Row(number, values)


_FRAMES: dict[tuple[str, str], Callable[[Any, str], Iterator[Row]]] = {
    ("polars", "DataFrame"): _polars_frame,
    ("polars", "LazyFrame"): _polars_frame,
    ("pandas", "DataFrame"): _pandas_frame,
    ("pyarrow", "Table"): _arrow_table,
    ("pyarrow", "RecordBatch"): _arrow_table,
}
