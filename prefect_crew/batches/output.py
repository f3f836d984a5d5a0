"""The output of a batch: an export of its ledger as JSON Lines or Parquet."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import types
import typing
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import date, datetime
from pathlib import Path
from typing import IO, Annotated, Any, cast
from uuid import uuid4

import fsspec  # pyright: ignore[reportMissingTypeStubs]
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from prefect_crew.batches.database import create_private
from prefect_crew.batches.dataset import COMPRESSED, is_remote, polars, shown_address, told
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.outcomes import CONFLICT_REASON, RowState
from prefect_crew.batches.rows import rejected_name
from prefect_crew.exceptions import ConfigurationError, CrewError, DatasetError, OutputError

_fsspec = cast("Any", fsspec)
COLUMNS = ("key", "inputs", "state", "output", "data", "tasks", "kickoff_id", "seconds", "usage", "error")
LINES, PARQUET = (".jsonl", ".ndjson"), (".parquet", ".pq")
"""The endings of outputs. After an ending of lines may come the ending of a compression."""
STRUCTURED = ("inputs", "data", "tasks", "usage")
"""Columns that are JSON in Parquet."""


class Output:
    """The file of the lines of a batch: JSON Lines, compressed by its ending, or Parquet.

    `output_type` is the type of `data`; None leaves `data` as the crew's server gave it.

    Raises ConfigurationError if such an output cannot be written here.
    """

    def __init__(self, address: str, *, output_type: type[BaseModel] | None = None) -> None:
        self.address = address
        self.name = shown_address(address)
        self._output_type = output_type
        self._path = None if is_remote(address) else Path(address.removeprefix("file://"))
        file = Path(address.partition("?")[0] if self._path is None else address)
        self._is_parquet = file.suffix.lower() in PARQUET
        ending = Path(file.stem).suffix if file.suffix.lower() in COMPRESSED else file.suffix
        is_http = address.startswith(("http://", "https://"))
        problem = "is an http address, and nothing can be written there." if is_http else None
        if problem is None and not (self._is_parquet or ending.lower() in LINES):
            problem = (
                f"has the ending {file.suffix!r}, and an export is JSON Lines ({' or '.join(LINES)}, also compressed: "
                f"{', '.join(f'{LINES[0]}{kind}' for kind in sorted(COMPRESSED))}) or Parquet "
                f"({' or '.join(PARQUET)}). Give it such an ending."
            )
        try:
            if self._is_parquet:
                polars(self.name)
            if self._path is None and problem is None:
                _fsspec.core.url_to_fs(address)
        except DatasetError as error:
            problem = error.reason
        except (ImportError, ValueError) as error:
            problem = f"cannot be written: {told(error, address)}."
        if problem is not None:
            raise ConfigurationError(f"The export {self.name} {problem} Nothing was started.")

    def check(self, *, is_new: bool, advice: str = "or move that file. Nothing was started.") -> None:
        """Make sure that the file can be written, and that an existing file is of this batch. Raises OutputError.

        `is_new`: whether the batch has not written this file yet, so that an existing file is somebody else's. `advice`
        ends the error's sentence "Choose another, …".
        """
        with self._reporting():
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            if is_new and self.exists() and not (self._path and self._path.stat().st_size == 0):
                raise OutputError(f"{self.name} exists already and is not from this batch. Choose another, {advice}")

    def exists(self) -> bool:
        """Return whether the output exists; False for a remote output that nobody can read."""
        if self._path is not None:
            return self._path.exists()
        try:
            filesystem, path = _fsspec.core.url_to_fs(self.address)
            return bool(filesystem.exists(path))
        except (OSError, ImportError, ValueError):
            return False

    async def write(self, ledger: Ledger) -> int:
        """Write the lines of all rows that have ended, in the order of the data set; return how many there are.

        The new file is written on this machine, and replaces the old file once it is whole. A write that is cut off
        leaves the old file. Raises OutputError, LedgerError.
        """
        count = 0
        with self._reporting(), self._new() as new, tempfile.TemporaryDirectory(prefix="prefect-crew-") as folder:
            lines = Path(folder) / "lines.jsonl"
            with lines.open("wb") if self._is_parquet else self._opened(new) as file:
                async for page in ledger.lines():
                    count += await asyncio.to_thread(self._write_page, page, file)
            if self._is_parquet:
                await asyncio.to_thread(self._write_parquet, lines, new)
            await asyncio.to_thread(self._put, new)
        return count

    def write_rejected(self, lines: IO[bytes] | None) -> None:
        """Write the file of bad rows next to the output; None removes the file of an earlier call."""
        rejected = Output(rejected_name(self.address))
        with rejected._reporting():
            if lines is not None:
                lines.seek(0)
                with rejected._new() as new:
                    with rejected._opened(new) as target:
                        shutil.copyfileobj(lines, target)
                    rejected._put(new)
            elif rejected.exists():
                filesystem, path = _fsspec.core.url_to_fs(rejected.address)
                filesystem.rm(path)

    @contextmanager
    def _new(self) -> Generator[Path]:
        """Yield an empty file on this machine for the new output. Remove it at the end if it is still there."""
        with tempfile.TemporaryDirectory(prefix="prefect-crew-") if self._path is None else nullcontext("") as folder:
            # Next to a local output, since a rename replaces that. Another process may write the same output now.
            new = Path(folder) / "new" if self._path is None else self._path
            new = new.with_name(f".{new.name}.{uuid4().hex[:8]}.new")
            create_private(new)
            try:
                yield new
            finally:
                new.unlink(missing_ok=True)

    def _opened(self, new: Path) -> Any:
        name = self.address.partition("?")[0] if self._path is None else self._path.name
        return _fsspec.open(str(new), "wb", compression=_fsspec.utils.infer_compression(name))

    def _put(self, new: Path) -> None:
        """Replace the output by a whole file in one thread, since an exception during an upload would commit a part."""
        if self._path is not None:
            new.replace(self._path)
            return
        filesystem, path = _fsspec.core.url_to_fs(self.address)
        filesystem.put_file(str(new), path)

    @contextmanager
    def _reporting(self) -> Generator[None]:
        try:
            yield
        except CrewError:
            raise
        except Exception as error:  # noqa: BLE001  each library that fsspec takes raises errors of its own
            raise OutputError(
                f"The export {self.name} cannot be written: {told(error, self.address)}. All results are in the "
                "ledger. Make the same call again, which writes them."
            ) from None

    def _write_page(self, page: list[tuple[str, str, str, str | None, float | None]], file: IO[bytes]) -> int:
        lines = [self._line(*row) for row in page if RowState(row[2]).has_line]
        if self._is_parquet:
            lines = [self._flat(line) for line in lines]
        file.writelines(to_json(line, inf_nan_mode="null") + b"\n" for line in lines)
        return len(lines)

    def _line(self, key: str, inputs: str, state: str, record: str | None, seconds: float | None) -> dict[str, Any]:
        """Return the line of a row. `seconds` is the server's execution time, else the time from kickoff to end."""
        fields: dict[str, Any] = {} if record is None else from_json(record)
        result: Mapping[str, Any] = fields.get("result") or {}
        line: dict[str, Any] = dict.fromkeys(COLUMNS)
        line |= {"key": key, "inputs": from_json(inputs), "state": state, "tasks": []}
        line["kickoff_id"] = fields.get("kickoff_id")
        if state == RowState.CONFLICT:
            return line | {"error": CONFLICT_REASON}
        line["seconds"] = result.get("execution_time", None if seconds is None else round(seconds, 3))
        line["error"] = fields.get("error") or ("it was stopped" if state == RowState.STOPPED else None)
        if result:
            line |= {"output": result["output"], "usage": result.get("usage"), "tasks": result.get("tasks", [])}
            line["data"] = None if state == RowState.INVALID_OUTPUT else self._data(result)
        return line

    def _data(self, result: Mapping[str, Any]) -> Any:
        """Return the structured result as JSON values, in the form of `output_type` if the result fits."""
        data = result.get("data")
        if self._output_type is None:
            return data
        try:
            if data is None:
                return self._output_type.model_validate_json(result["output"]).model_dump(mode="json", by_alias=False)
            return self._output_type.model_validate(data).model_dump(mode="json", by_alias=False)
        except Exception:  # noqa: BLE001  a validator or a serializer of the user's raises anything
            return data

    # Parquet: `seconds` is a number and all else text; each field of `output_type` also has a column `data_NAME`, by
    # its name in `data`, not by an alias.

    def _flat(self, line: dict[str, Any]) -> dict[str, Any]:
        data: Any = line["data"]
        for name, kind in self._fields().items():
            line[f"data_{name}"] = _cell(
                cast("dict[str, Any]", data).get(name) if isinstance(data, dict) else None, kind
            )
        return line | {name: None if line[name] is None else to_json(line[name]).decode() for name in STRUCTURED}

    def _fields(self) -> dict[str, type]:
        fields = {} if self._output_type is None else self._output_type.model_fields
        return {name: _plain_type(field.annotation) for name, field in fields.items()}

    def _write_parquet(self, lines: Path, new: Path) -> None:
        library: Any = polars("Parquet")
        types_of: dict[type, Any] = {
            int: library.Int64,
            float: library.Float64,
            bool: library.Boolean,
            date: library.Date,
            datetime: library.Datetime("us", "UTC"),
            str: library.String,
        }
        schema = dict.fromkeys(COLUMNS, library.String) | {"seconds": library.Float64}
        schema |= {f"data_{name}": types_of[kind] for name, kind in self._fields().items()}
        library.scan_ndjson(lines, schema=schema).sink_parquet(new)


_CELLS: dict[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (float, bool, date, datetime)}
_CELLS[int] = TypeAdapter(Annotated[int, Field(ge=-(2**63), lt=2**63)])


def _cell(value: Any, kind: type) -> Any:
    """Return a value in the type of a Parquet column, None if the value does not fit. `data` has the value anyway."""
    if kind is str:
        return value if value is None or isinstance(value, str) else to_json(value).decode()
    try:
        return _CELLS[kind].dump_python(_CELLS[kind].validate_python(value), mode="json")
    except ValidationError:
        return None


def _plain_type(annotation: Any) -> type:
    """Return the column type for a field of this annotation, text if nothing better fits."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        annotation = parts[0] if len(parts) == 1 else str
    return annotation if annotation in (int, float, bool, date, datetime) else str
