"""Data sets: a path, a URL, an iterable or a data frame as rows that can be read again and again.

A data set is read twice, once to check every row and once to run them. So what can be read only once is kept in a
temporary file first, and so is what lies on another machine: it is fetched once, and both readings see the same.
"""

from __future__ import annotations

import io
import lzma
import os
import pickle
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast
from urllib.parse import urlsplit, urlunsplit

import fsspec  # pyright: ignore[reportMissingTypeStubs]
import httpx

from prefect_crew.batches.frames import frame_reader, read_parquet
from prefect_crew.batches.readers import TEXT_FORMATS, DatasetError, Row, mapping_row, read_text

__all__ = [
    "Dataset",
    "DatasetError",
    "DatasetFormat",
    "Row",
    "is_remote",
    "open_dataset",
    "shown_address",
    "whole_address",
]

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
