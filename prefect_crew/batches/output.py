"""The output of a batch: a line a row, JSON Lines that grows, or Parquet at the end.

The ledger is what counts; the file is written from it. So a crash costs nothing but the file's last half line, which is
cut off, and rows that have ended but are not in the file are written again from the ledger.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import fsspec  # pyright: ignore[reportMissingTypeStubs]
from pydantic import BaseModel
from pydantic_core import to_json

from prefect_crew.api.errors import CrewError
from prefect_crew.batches.rows import Keys
from prefect_crew.records import RunRecord

__all__ = ["OutputError", "OutputFile", "line_of"]

_files = cast("Any", fsspec)
COLUMNS = ("key", "inputs", "state", "output", "data", "tasks", "kickoff_id", "seconds", "usage", "error")


class OutputError(CrewError):
    """The output cannot be written. What has ended is in the ledger: run the batch again with the same name."""


def line_of(key: str, inputs: Mapping[str, Any], record: RunRecord, *, data: Any = None) -> dict[str, Any]:
    """Return the line of a row that has ended. `seconds` is the server's execution time, else the time of the wait."""
    result = record.result
    seconds = None if result is None else result.execution_time
    if seconds is None and record.ended_at is not None and record.kicked_off_at is not None:
        seconds = round((record.ended_at - record.kicked_off_at).total_seconds(), 3)
    return {
        "key": key,
        "inputs": dict(inputs),
        "state": str(record.state or record.phase),
        "output": None if result is None else result.output,
        "data": data if data is not None else (None if result is None else result.data),
        "tasks": [] if result is None else [task.model_dump(exclude_none=True) for task in result.tasks],
        "kickoff_id": record.kickoff_id,
        "seconds": seconds,
        "usage": None if result is None or result.usage is None else result.usage.model_dump(exclude_none=True),
        "error": record.error or record.reason,
    }


class OutputFile:
    """The file that grows. One process writes it.

    For an output that is Parquet or is not on this machine, the lines grow in a local file beside the ledger, and are
    brought to their place by `finish`.
    """

    def __init__(self, output: str, *, spool: Path | None = None) -> None:
        self.output = output
        self._final = output
        local = "://" not in output or output.startswith("file://")
        direct = local and not output.endswith((".parquet", ".pq"))
        if not direct and spool is None:
            raise OutputError(f"The output {output} needs a place for its lines until the end.")
        self.path = Path(output.removeprefix("file://")) if direct else cast("Path", spool)
        self._direct = direct
        self.keys = Keys()
        self._file: Any = None
        self._unsynced = 0

    def open(self, keep: Callable[[str, str], bool]) -> None:
        """Open the file, cut off a half line, and drop the lines of rows that are to be run again.

        Args:
            keep: Says of a row's key and state whether its line stays.

        Raises:
            OutputError: It cannot be written, or holds what is no line of a batch.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._take_over(keep)
            self._file = self.path.open("ab")
        except OSError as error:
            raise OutputError(f"The output {self.path} cannot be written: {error.strerror or error}.") from error

    def _take_over(self, keep: Callable[[str, str], bool]) -> None:
        good = 0
        dropped = False
        with self.path.open("r+b") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                key, state = self._key_of(line, number)
                if key in self.keys or not keep(key, state):
                    dropped = True
                else:
                    self.keys.put(key)
                good += len(line)
            file.truncate(good)
        if dropped:
            self._rewrite(keep)

    def _rewrite(self, keep: Callable[[str, str], bool]) -> None:
        """Write the file anew with one line for each key that is kept; a crash leaves the old one or the new one."""
        fresh = self.path.with_name(f".{self.path.name}.new")
        written = Keys()
        with self.path.open("rb") as old, fresh.open("wb") as new:
            for number, line in enumerate(old, start=1):
                key, state = self._key_of(line, number)
                if keep(key, state) and key not in written:
                    written.put(key)
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())
        written.close()
        fresh.replace(self.path)

    def _key_of(self, line: bytes, number: int) -> tuple[str, str]:
        try:
            value = json.loads(line)
            return str(value["key"]), str(value["state"])
        except (ValueError, KeyError, TypeError):
            raise OutputError(
                f"{self.path}, line {number} is no line of a batch. Choose another output, or move this file away."
            ) from None

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line, unless the file has one of its key."""
        key = str(line["key"])
        if key in self.keys:
            return
        try:
            self._file.write(to_json({name: line.get(name) for name in COLUMNS}, serialize_unknown=True) + b"\n")
            self._unsynced += 1
            if self._unsynced >= 100:
                self.flush()
        except OSError as error:
            raise OutputError(f"The output {self.path} cannot be written: {error.strerror or error}.") from error
        self.keys.put(key)

    def flush(self) -> None:
        """Hand the lines to the operating system, so that others can read them."""
        self._file.flush()
        self._unsynced = 0

    def close(self) -> None:
        """Sync and close."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
        self.keys.close()

    def finish(self, *, output_type: type[BaseModel] | None = None) -> None:
        """Bring the closed file to its place, where that is not a JSON Lines file on this machine.

        Raises:
            OutputError: It cannot be written there, or the extra is missing for Parquet.
        """
        if self._direct:
            return
        if self._final.endswith((".parquet", ".pq")):
            self._to_parquet(output_type)
            return
        try:
            with self.path.open("rb") as source, _files.open(self._final, "wb") as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)
        except (OSError, ImportError, ValueError) as error:
            raise OutputError(
                f"The output {self._final} cannot be written: {error}. Its lines are in {self.path}."
            ) from error

    def _to_parquet(self, output_type: type[BaseModel] | None) -> None:
        try:
            polars: Any = importlib.import_module("polars")
        except ImportError:
            raise OutputError(
                f"Parquet needs polars: pip install 'prefect-crew[data]'. The lines are in {self.path}."
            ) from None
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        typed = list(output_type.model_fields) if output_type is not None else []
        fields: dict[str, list[Any]] = {f"data_{name}": [] for name in typed}
        for line in self._lines():
            for name in COLUMNS:
                value = line.get(name)
                structured = name in ("inputs", "data", "tasks", "usage") and value is not None
                columns[name].append(to_json(value).decode() if structured else value)
            data = line.get("data")
            for name in typed:
                fields[f"data_{name}"].append(data.get(name) if isinstance(data, dict) else None)  # pyright: ignore
        try:
            with _files.open(self._final, "wb") as target:
                polars.DataFrame({**columns, **fields}, strict=False).write_parquet(target)
        except (OSError, ImportError, ValueError) as error:
            raise OutputError(
                f"The output {self._final} cannot be written: {error}. Its lines are in {self.path}."
            ) from error

    def _lines(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for line in file:
                yield json.loads(line)
