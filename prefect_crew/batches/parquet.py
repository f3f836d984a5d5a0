"""Lines as a Parquet file, a few thousand at a time.

Structured columns are JSON; a typed result has columns of its own.
"""

from __future__ import annotations

import json
import tempfile
import types
import typing
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import IO, Any, cast

from pydantic import BaseModel
from pydantic_core import to_json

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.batches.frames import polars
from prefect_crew.batches.readers import DatasetError

__all__ = ["check_parquet", "write_parquet"]

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
