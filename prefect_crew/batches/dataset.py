"""Data sets: files, addresses, frames and iterables as rows that can be read again."""

from __future__ import annotations

import base64
import csv
import json
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit, urlunsplit

import fsspec  # pyright: ignore[reportMissingTypeStubs]
import sqlalchemy as sa

from prefect_crew.exceptions import DatasetError

ENDINGS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".jsonl": "lines", ".ndjson": "lines", ".json": "array"}
PARQUET = (".parquet", ".pq")
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".lzma": "lzma"}
"""The names that fsspec has for a compression, by its ending."""
FIELD_LIMIT = 1 << 28
"""Characters of a field. Without a limit, a quote that is never closed makes one field of a whole file."""
FIRST_LINES = 20
"""Lines of a CSV file that tell its delimiter."""
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


def open_dataset(source: Any) -> Dataset:
    """Return the data set of a path, a URL, an fsspec address, a data frame, or an iterable of mappings or named rows.

    Raises DatasetError if the format is unknown, or `source` is no data set. Faults of rows come while they are read.
    """
    if isinstance(source, str | os.PathLike):
        address = os.fspath(cast("str | os.PathLike[str]", source))
        file = _File(address)
        return Dataset(file.name, file.rows, address)
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
    """Return a remote address as it is, and any other as the one path of its file, without `file://`, links and `..`.

    `~` is the home folder.
    """
    if is_remote(address):
        return address
    path = os.path.expanduser(address.removeprefix("file://"))  # noqa: PTH111  for `~name` of no user, pathlib raises
    return os.path.realpath(path)


def shown_address(address: str) -> str:
    """Return an address for people: without user, password and query, since a query may be a signature.

    fsspec chains addresses, as in `simplecache::https://user:password@host/rows.csv`.
    """
    return "::".join(_shown_link(link) for link in address.split("::")) if is_remote(address) else address


def error_text(error: Exception, address: str) -> str:
    """Return the text of an error, or only its type if the address holds secrets, which the text may quote."""
    if shown_address(address) != address:
        return type(error).__name__
    # SQLAlchemy's own text, and the next lines of a driver's, may quote the statement, its parameters or a row.
    error = getattr(error, "orig", None) or error
    first_line = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": .")
    return getattr(error, "strerror", None) or first_line


def ending_of(address: str) -> tuple[str, str]:
    """Return the ending of a file, in small letters, and that of its compression, which may be empty."""
    path = Path(address.partition("?")[0] if is_remote(address) else address)
    packed = path.suffix.lower() if path.suffix.lower() in COMPRESSED else ""
    return (Path(path.stem).suffix if packed else path.suffix).lower(), packed


def _shown_link(link: str) -> str:
    if "://" not in link:
        return link
    parts = urlsplit(link)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


# Files


class _File:
    """A file on this machine, which must not change after the first read, or a remote file, which is fetched once."""

    def __init__(self, address: str) -> None:
        self.name, self._address = shown_address(address), address
        links = [ending_of(link) for link in address.split("::")]  # the innermost first
        known = [link for link in links if link[0] in ENDINGS or link[0] in PARQUET]
        if not known:
            raise DatasetError(
                f"the format is not known from the file ending {links[-1][0]!r}. Known: "
                f"{', '.join(sorted([*ENDINGS, *PARQUET]))}.",
                source=self.name,
            )
        self._ending, self._packed = known[0]
        self._path = None if is_remote(address) else Path(whole_address(address))
        self._seen: tuple[int, int] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def rows(self) -> Iterator[Row]:
        """Yield the rows. Raises DatasetError if the file cannot be read, or changes."""
        with self._reporting():
            path = self._fetched()
            for row in self._parquet(path) if self._ending in PARQUET else self._text(path):
                self._check(path)
                yield row
            self._check(path)

    def _fetched(self) -> Path:
        if self._path is not None:
            return self._path
        if self._folder is None:
            folder = tempfile.TemporaryDirectory(prefix="prefect-crew-")
            with (Path(folder.name) / "data").open("wb") as target, self._remote() as source:
                shutil.copyfileobj(source, target, 1 << 20)
            self._folder = folder
        return Path(self._folder.name) / "data"

    def _remote(self) -> Any:
        if not self._address.startswith(("http://", "https://")):
            return _fsspec.open(self._address, "rb")
        # Not by fsspec, which needs a further package for it; and not by httpx, which logs a URL with its secrets.
        parts = urlsplit(self._address)
        user, _, host = parts.netloc.rpartition("@")
        headers = {"Authorization": f"Basic {base64.b64encode(unquote(user).encode()).decode()}"} if user else {}
        url = urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)  # noqa: S310

    def _check(self, path: Path) -> None:
        stat = path.stat()
        now = (stat.st_size, stat.st_mtime_ns)
        if self._seen not in (None, now):
            raise DatasetError(
                "changed during the read. Run the batch again when it does not change any more.", source=self.name
            )
        self._seen = now

    @contextmanager
    def _reporting(self) -> Generator[None]:
        """Raise each error of a file as a DatasetError."""
        try:
            yield
        except DatasetError:
            raise
        except Exception as error:  # noqa: BLE001  each library that fsspec takes raises errors of its own
            is_http = isinstance(error, HTTPError)
            problem = f"HTTP {error.code}" if is_http else error_text(error, self._address)
            raise DatasetError(f"cannot be read: {problem}.", source=self.name) from None

    def _text(self, path: Path) -> Iterator[Row]:
        read = {"lines": _jsonl, "array": self._array}.get(ENDINGS[self._ending], self._csv)
        with _fsspec.open(str(path), "rb", compression=COMPRESSED.get(self._packed)) as content:
            yield from read(self._lines(content))

    def _lines(self, content: IO[bytes]) -> Iterator[str]:
        """Yield each line with its line feed. Nothing else ends one."""
        for number, line in enumerate(content, start=1):
            if b"\0" in line:
                raise DatasetError("holds a NUL, as UTF-16 does. Save it as UTF-8.", source=self.name, line=number)
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                digits = line[error.start : error.end][:8].hex(" ")
                raise DatasetError(
                    f"the bytes {digits} are not UTF-8. Save the file as UTF-8.", source=self.name, line=number
                ) from None

    def _csv(self, lines: Iterator[str]) -> Iterator[Row]:
        csv.field_size_limit(max(csv.field_size_limit(), FIELD_LIMIT))  # of the whole process; a document is long
        first = [*islice(lines, FIRST_LINES)]
        reader = csv.reader(chain(first, lines), delimiter=self._delimiter(first), strict=True)
        try:
            header = next(reader, None)
        except csv.Error as error:
            raise DatasetError(f"is not CSV: {error}.", source=self.name, line=1) from None
        if not header:
            raise DatasetError("is empty: it has no header line.", source=self.name)
        check_columns(header, self.name, line=1)
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                # Before these two errors the reader took all lines to the end of the file, or far too many.
                if "unexpected end of data" in str(error) or "field larger" in str(error):
                    reason = "is not CSV: a quote that opens in this row is never closed."
                    raise DatasetError(reason, source=self.name, line=line) from None
                yield Row(line, {}, f"is not CSV: {error}")
            else:
                if len(fields) == len(header):
                    yield Row(line, dict(zip(header, fields, strict=True)))
                elif fields:
                    yield Row(line, {}, f"has {len(fields)} fields, the header has {len(header)}")

    def _delimiter(self, first: Sequence[str]) -> str:
        """Return the sign that splits the header: Excel writes semicolons where a comma is the decimal point.

        Of several signs, one that leaves quotes in the names splits within them, and one that fits gives each of the
        first rows the header's width. Raises DatasetError unless exactly one fits.
        """
        usual = ENDINGS[self._ending]
        headers = {sign: next(_csv_rows(first, sign), list[str]()) for sign in (usual, *",;\t|")}
        splitting = [sign for sign, header in headers.items() if len(header) > 1]
        signs = [sign for sign in splitting if '"' not in "".join(headers[sign])] or splitting
        if len(signs) > 1 and not (usual == "\t" and usual in signs):
            possible = " and ".join(map(repr, signs))
            signs = [sign for sign in signs if {*map(len, _csv_rows(first, sign))} <= {0, len(headers[sign])}]
            if len(signs) != 1:
                raise DatasetError(
                    f"both {possible} may separate the columns. Rename each column that has one of them in its name.",
                    source=self.name,
                    line=1,
                )
        return signs[0] if signs else usual

    def _array(self, lines: Iterable[str]) -> Iterator[Row]:
        """Yield the objects of a JSON array after a read of the whole array. A file of one object is one row."""
        try:
            value = json.loads("".join(lines))
        except json.JSONDecodeError as error:
            hint = " Is it JSON Lines? Then name it .jsonl." if error.msg == "Extra data" else ""
            raise DatasetError(f"is not JSON: {error.msg}.{hint}", source=self.name, line=error.lineno) from None
        if not isinstance(value, list | dict):
            raise DatasetError("is not a JSON array of objects.", source=self.name)
        yield from _of_mappings(cast("list[Any]", value) if isinstance(value, list) else [value])

    def _parquet(self, path: Path) -> Iterator[Row]:
        try:
            import polars
        except ImportError:
            raise DatasetError("needs polars: pip install 'prefect-crew[data]'.", source=self.name) from None
        scan: Any = polars.scan_parquet(path)
        count = scan.select(polars.len()).collect().item()
        parts = (scan.slice(start, PART).collect().iter_rows(named=True) for start in range(0, count, PART))
        return _of_mappings(chain.from_iterable(parts))


def check_columns(columns: Sequence[str], name: str, *, line: int | None = None) -> None:
    """Raise DatasetError if two columns have the same name."""
    if doubled := sorted({column for column in columns if columns.count(column) > 1}):
        raise DatasetError(f"the columns {', '.join(map(repr, doubled))} appear twice.", source=name, line=line)


def _csv_rows(first: Sequence[str], sign: str) -> Iterator[list[str]]:
    """Yield the rows of the first lines, up to one that is not CSV with this delimiter, or that is cut off."""
    with suppress(csv.Error):
        yield from csv.reader(first, delimiter=sign, strict=True)


def _jsonl(lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if text := line.strip():
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield Row(number, {}, f"is not JSON: {error}")
            else:
                yield _mapping_row(value, number)


# Mappings and frames


def _mapping_row(value: Any, line: int) -> Row:
    if isinstance(value, sa.Row):
        value = cast("Any", value)._mapping  # noqa: SLF001  the name of SQLAlchemy's documentation
    if not hasattr(value, "keys"):
        return Row(line, {}, f"is of type {type(value).__name__}, not a mapping")
    return Row(line, {str(name): value[name] for name in value.keys()})  # noqa: SIM118  sqlite3.Row yields values


def _of_mappings(rows: Iterable[Any]) -> Iterator[Row]:
    return (_mapping_row(value, number) for number, value in enumerate(rows, start=1))


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
