"""Data frames, Arrow tables and Parquet files as rows, a few thousand at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prefect_crew.batches.readers import DatasetError, Row

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["frame_reader", "polars", "read_parquet"]

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
