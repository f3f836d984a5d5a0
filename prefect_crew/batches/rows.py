"""From rows to what is bought: inputs, a key each, and all that is wrong with them before anything is started."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefect_crew.api.errors import ConfigurationError, CrewError
from prefect_crew.api.inputs import encode_inputs, inputs_digest, missing_inputs
from prefect_crew.api.models import CrewInput
from prefect_crew.batches.datasets import Dataset, DatasetError, Row
from prefect_crew.templates import names_in, render

__all__ = ["BadRow", "BadRowsError", "Checked", "InputsFrom", "Keys", "RowJob", "RowPlan"]

InputsFrom = Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Inputs by name: a template over the row's columns, a column's name, a function of the row, or any other constant."""
SHOWN = 20
"""Bad rows that a message lists."""


@dataclass(frozen=True)
class RowJob:
    """One row, ready to be bought. `inputs` are encoded, `digest` is theirs; `number` counts rows from 0."""

    number: int
    line: int
    key: str
    inputs: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be run, and why."""

    line: int
    reason: str


class BadRowsError(DatasetError):
    """Rows of a data set cannot be run. Attributes: rows (all of them, up to 1,000), count."""

    def __init__(self, rows: Sequence[BadRow], count: int, *, source: str) -> None:
        self.rows = list(rows)
        self.count = count
        listed = "; ".join(f"line {row.line}: {row.reason}" for row in self.rows[:SHOWN])
        more = f"; and {count - SHOWN} more" if count > SHOWN else ""
        super().__init__(
            f"{count} rows cannot be run: {listed}{more}. Mend them, or set them aside with on_bad_row='set-aside'.",
            source=source,
        )


class Keys:
    """A multiset of texts that lives in a temporary file once it is large, so that memory stays flat."""

    def __init__(self) -> None:
        # An empty name is SQLite's own temporary database, which spills to disk and goes with the connection. Rows are
        # read in a thread, one at a time, but not always the same one.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA cache_size=-8000")
        self._database.execute("CREATE TABLE keys (key TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def __contains__(self, key: str) -> bool:
        return self.value(key) is not None

    def value(self, key: str) -> int | None:
        """Return what is kept for a key, None if it is not there."""
        found = self._database.execute("SELECT value FROM keys WHERE key = ?", (key,)).fetchone()
        return None if found is None else int(found[0])

    def put(self, key: str, value: int = 0) -> None:
        """Keep a number for a key."""
        self._database.execute("INSERT OR REPLACE INTO keys VALUES (?, ?)", (key, value))

    def count(self, key: str) -> int:
        """Note one more of a key and return how many there are now."""
        query = "INSERT INTO keys VALUES (?, 1) ON CONFLICT (key) DO UPDATE SET value = value + 1 RETURNING value"
        return int(self._database.execute(query, (key,)).fetchone()[0])

    def close(self) -> None:
        """Give the file back."""
        self._database.close()


@dataclass(frozen=True)
class Checked:
    """What the first reading of a data set found. `fingerprint` does not depend on the rows' order."""

    total: int
    bad: Sequence[BadRow]
    bad_count: int
    duplicates: int
    fingerprint: str


@dataclass(frozen=True)
class RowPlan:
    """How a data set's rows become runs.

    Args:
        dataset: The rows.
        inputs: How a row becomes inputs; None takes the crew's inputs from the columns of their names, or all columns
            of a crew that does not name its inputs.
        key: A column, or a function of the row; None makes a digest of the inputs and how many equal ones came before.
        expected: The crew's inputs.
        as_json: Whether inputs are sent as JSON values.
        deduplicate: Whether equal rows are one run.
    """

    dataset: Dataset
    inputs: InputsFrom | None = None
    key: str | Callable[[Mapping[str, Any]], str] | None = None
    expected: Sequence[CrewInput] = ()
    as_json: bool = False
    deduplicate: bool = False
    limit: int = field(default=1000, repr=False)

    def check(self) -> Checked:
        """Read every row once and note all that is wrong.

        Raises:
            DatasetError: The data set cannot be read to its end.
        """
        bad: list[BadRow] = []
        count = total = duplicates = 0
        mark = 0
        for job in self._jobs():
            if isinstance(job, BadRow):
                count += 1
                if len(bad) < self.limit:
                    bad.append(job)
            elif job is None:
                duplicates += 1
            else:
                total += 1
                seen = hashlib.sha256(f"{job.key}\0{job.digest}".encode("utf-8", "surrogatepass")).digest()
                mark = (mark + int.from_bytes(seen[:16], "big")) % (1 << 128)
        if total == count == 0:
            raise DatasetError("has no rows.", source=self.dataset.name)
        return Checked(total, bad, count, duplicates, f"{mark:032x}")

    def jobs(self) -> Iterator[RowJob]:
        """Yield the rows that can be run, in the order of the data set."""
        for job in self._jobs():
            if isinstance(job, RowJob):
                yield job

    def _jobs(self) -> Iterator[RowJob | BadRow | None]:
        """Yield each row as a job, as a bad row, or as None for one that equals an earlier one."""
        keys = Keys()
        try:
            number = 0
            for row in self.dataset:
                job = self._job(row, keys, number)
                number += isinstance(job, RowJob)
                yield job
        finally:
            keys.close()

    def _job(self, row: Row, keys: Keys, number: int) -> RowJob | BadRow | None:
        try:
            given = self._inputs_of(row.values)
            encoded = encode_inputs(given, as_json=self.as_json)
        except (CrewError, TypeError, ValueError, KeyError) as error:
            return BadRow(row.line, f"{error}")
        missing = missing_inputs(self.expected, encoded)
        if missing:
            return BadRow(row.line, f"lacks {', '.join(missing)}")
        digest = inputs_digest(encoded)
        if self.key is None:
            occurrence = keys.count(digest)
            if occurrence > 1 and self.deduplicate:
                return None
            key = f"{digest}-{occurrence}"
        else:
            named = self._key_of(row)
            if isinstance(named, BadRow):
                return named
            first = keys.value(named)
            if first is not None:
                return None if self.deduplicate else BadRow(row.line, f"has the key {named!r} of line {first} again")
            keys.put(named, row.line)
            key = named
        return RowJob(number, row.line, key, encoded, digest)

    def _key_of(self, row: Row) -> str | BadRow:
        if callable(self.key):
            try:
                value = self.key(row.values)
            except (CrewError, TypeError, ValueError, KeyError) as error:
                return BadRow(row.line, f"its key cannot be made: {type(error).__name__}: {error}")
        else:
            value = row.values.get(str(self.key))
        text = "" if value is None else str(value)
        if not text.strip():
            return BadRow(row.line, "its key is empty")
        return text if len(text) <= 200 else BadRow(row.line, f"its key has {len(text)} characters, the limit is 200")

    def _inputs_of(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.inputs is None:
            names = {known.name for known in self.expected}
            # An empty field of a CSV is a missing value, which a required input must not have.
            return {
                name: value
                for name, value in values.items()
                if (not names or name in names) and value is not None and value != ""
            }
        if callable(self.inputs):
            return self.inputs(values)
        return {name: _value(name, source, values) for name, source in self.inputs.items()}


def _value(name: str, source: Any, values: Mapping[str, Any]) -> Any:
    if callable(source):
        return source(values)
    if not isinstance(source, str):
        return source
    if "{{" in source or "{%" in source:
        unknown = names_in(source) - set(values)
        if unknown:
            raise ConfigurationError(f"input {name!r} uses {', '.join(sorted(unknown))}, which is no column")
        return render(source, values)
    if source not in values:
        raise ConfigurationError(f"input {name!r} is taken from column {source!r}, which is not there")
    return values[source]
