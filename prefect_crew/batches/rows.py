"""From rows to inputs and keys, and everything that is wrong with them."""

from __future__ import annotations

import asyncio
import hashlib
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any, cast

from pydantic_core import to_json

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._text import SHOWN, listed_names, listed_rows, with_guesses
from prefect_crew.batches.dataset import Dataset, Row
from prefect_crew.client.inputs import STATE_ID, encode_inputs, inputs_digest, missing_inputs, unknown_inputs
from prefect_crew.client.models import CrewInput
from prefect_crew.client.redaction import MASK, Redactor, holds_secret
from prefect_crew.crew import CrewSession
from prefect_crew.exceptions import (
    AuthenticationError,
    ConfigurationError,
    CrewConnectionError,
    CrewError,
    DatasetError,
    ServerError,
)
from prefect_crew.templates import compiled, names_in

Values = Mapping[str, Any]
InputsFrom = Mapping[str, Any] | Callable[[Values], Values]
"""A function of the row; or inputs by name, each a template over the row's columns, a column's name, a function of the
row, or any constant that is no text."""
KeyFrom = str | Callable[[Values], Any]
"""The name of a column, or a function of the row."""
BAD_ROWS = 1000
"""Bad rows that are kept."""
MAX_KEY = 200
"""Characters of a row's key."""
TRIES = 3
_UNFIT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


async def expected_inputs(session: CrewSession) -> list[CrewInput]:
    """Return what the crew names as its inputs; empty where it does not say.

    Raises:
        AuthenticationError: The token is refused.
        CrewConnectionError: The crew's server does not answer.
    """
    for left in reversed(range(TRIES)):
        try:
            return await session.call(lambda client: client.inputs())
        except AuthenticationError:
            raise
        except CrewError as error:
            # A moment's trouble must not make all columns inputs, and so every row another one.
            if left and isinstance(error, CrewConnectionError | ServerError):
                await asyncio.sleep(1.0)
                continue
            if isinstance(error, CrewConnectionError):
                raise
            run_logger().warning("The crew's inputs are not known, so rows are not checked for them: %s", error)
            break
    return []


@dataclass(frozen=True, slots=True)
class RowJob:
    """One row, ready to be kicked off. `inputs` are encoded, `digest` is theirs; `number` counts rows from 0.

    `hidden` names the inputs that were given as one of pydantic's secrets.
    """

    number: int
    line: int
    key: str
    inputs: dict[str, Any] = field(repr=False)
    digest: str
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be run, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class Checked:
    """What the first reading of a data set found. `fingerprint` does not depend on the rows' order."""

    total: int
    bad: Sequence[BadRow]
    bad_count: int
    duplicates: int
    fingerprint: str


class RowPlan:
    """How a data set's rows become runs.

    Args:
        dataset: The rows.
        inputs: How a row becomes inputs; None takes the crew's inputs from the columns of their names, or all columns
            of a crew that does not name its inputs. Only the input `id` is never taken so.
        key: A column, or a function of the row; None makes a digest of the inputs and how many equal ones came before.
        expected: The crew's inputs.
        as_json: Whether inputs are sent as JSON values.
        deduplicate: Whether equal rows are one run.
        secret: Names of inputs that are secret. No reason of a bad row shows them, and no key may hold one.
        allow_extra: Whether `inputs` may give what the crew does not name.
        rows: Which rows of the data set are taken, counted from 0; None takes all.

    Raises:
        ConfigurationError: A template is none, or the mapping gives inputs that the crew does not name.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        inputs: InputsFrom | None = None,
        key: KeyFrom | None = None,
        expected: Sequence[CrewInput] = (),
        as_json: bool = False,
        deduplicate: bool = False,
        secret: Sequence[str] = (),
        allow_extra: bool = False,
        rows: slice | None = None,
    ) -> None:
        self.dataset = dataset
        self._rows = rows or slice(None)
        self._inputs_of = _by_name(expected) if inputs is None else _chosen(inputs)
        self._key = key
        self._expected = expected
        self._as_json = as_json
        self._deduplicate = deduplicate
        self._secret = secret
        self._secret_columns = _columns_of(secret, inputs)
        self._allow_extra = allow_extra
        self._names = [item.name for item in expected]
        self._is_id_mapped = inputs is not None and not callable(inputs) and STATE_ID in inputs
        self._is_id_by_name = inputs is None and (not expected or STATE_ID in self._names)
        self._is_id_left_out = False
        if inputs is not None and not callable(inputs) and (unknown := self._unknown(inputs)):
            raise ConfigurationError(
                f"The mapping of inputs {unknown}. Nothing was started. To send them all the same: "
                "allow_extra_inputs=True on the block."
            )

    def notes(self) -> list[str]:
        """Return what is to be said of all rows, once they were read."""
        if self._is_id_mapped:
            return [
                "The rows give the input id. To a Flow it is the id of its state: it must be a UUID, and another one "
                "in each row, since one that was used before leads to the run that used it."
            ]
        if self._is_id_left_out:
            return [
                "The column id is not sent: to a Flow an input of that name is the id of its state. Map it where the "
                "crew takes it for something else."
            ]
        return []

    def check(self, set_aside: Callable[[BadRow, Any], None] = lambda bad, shown: None) -> Checked:
        """Read every row once and note all that is wrong.

        Args:
            set_aside: Called with each row that cannot be run, and what it holds, without secrets.

        Raises:
            DatasetError: The data set cannot be read to its end, or is empty.
        """
        bad: list[BadRow] = []
        bad_count = total = duplicates = fingerprint = 0
        try:
            for row, job in self._read():
                if isinstance(job, RowJob):
                    total += 1
                    digest = hashlib.sha256(f"{job.key}\0{job.digest}".encode()).digest()
                    fingerprint = (fingerprint + int.from_bytes(digest[:16], "big")) % (1 << 128)
                elif job is None:
                    duplicates += 1
                else:
                    bad_count += 1
                    set_aside(job, self._shown(row))
                    if len(bad) < BAD_ROWS:
                        bad.append(job)
        except DatasetError as error:
            if not bad:
                raise
            reason = f"{error.reason} Rows before it cannot be run: {listed_rows(bad, len(bad))}."
            raise DatasetError(reason, source=error.source, line=error.line) from error
        if total == bad_count == 0:
            where = "" if self._rows == slice(None) else f" from row {self._rows.start or 0} on"
            raise DatasetError(f"has no rows{where}.", source=self.dataset.name)
        return Checked(total, bad, bad_count, duplicates, f"{fingerprint:032x}")

    def jobs(self) -> Iterator[RowJob]:
        """Yield the rows that can be run, in the order of the data set."""
        return (job for _, job in self._read() if isinstance(job, RowJob))

    def _read(self) -> Iterator[tuple[Row, RowJob | BadRow | None]]:
        """Yield each row, and with it its job, why it is bad, or None for one that equals an earlier one."""
        keys, number = _Keys(), 0
        try:
            for row in islice(self.dataset.rows(), self._rows.start, self._rows.stop):
                try:
                    job = self._job(row, keys, number)
                except Exception as error:  # noqa: BLE001  whatever a user's function raises is wrong with its row
                    job = BadRow(row.line, self._redactor(row.values)(_reason(error)))
                number += isinstance(job, RowJob)
                yield row, job
        finally:
            keys.close()

    def _job(self, row: Row, keys: _Keys, number: int) -> RowJob | BadRow | None:
        if row.fault is not None:
            return BadRow(row.line, row.fault)
        given = self._inputs_of(row.values)
        encoded = encode_inputs(given, as_json=self._as_json)
        hidden = tuple(name for name, value in given.items() if holds_secret(value))
        self._is_id_left_out = self._is_id_left_out or (self._is_id_by_name and STATE_ID in row.values)
        if missing := missing_inputs(self._expected, encoded):
            by_name = STATE_ID in missing and self._is_id_by_name
            mapped = ", which is never taken from a column by its name alone: map it" if by_name else ""
            return BadRow(row.line, f"lacks {', '.join(missing)}{mapped}")
        if unknown := self._unknown(encoded):
            return BadRow(row.line, unknown)
        digest = inputs_digest(encoded, is_text=not self._as_json)
        if self._key is None:
            count = keys.count(digest)
            if count > 1 and self._deduplicate:
                return None
            return RowJob(number, row.line, f"{digest}-{count}", encoded, digest, hidden)
        key = _key_of(self._key, row.values)
        secret = [encoded[name] for name in (*self._secret, *hidden) if name in encoded]
        if secret and Redactor(secret).hides(key):
            return BadRow(row.line, "its key holds a secret input, and keys stand in logs, artifacts and the ledger")
        earlier = keys.put(key, row.line, digest)
        if earlier is None:
            return RowJob(number, row.line, key, encoded, digest, hidden)
        line, earlier_digest = earlier
        if not self._deduplicate:
            return BadRow(row.line, f"has the key {key!r} of line {line} again")
        if digest != earlier_digest:
            return BadRow(row.line, f"has the key {key!r} of line {line}, and other inputs")
        return None

    def _unknown(self, inputs: Mapping[str, Any]) -> str | None:
        unknown = [] if self._allow_extra else unknown_inputs(self._expected, inputs)
        if not unknown:
            return None
        guessed = with_guesses(unknown, self._names)
        return f"gives the unknown inputs {guessed}; the crew takes {listed_names(self._names)}"

    def _shown(self, row: Row) -> Any:
        """Return what a row holds, with secret columns masked; None where nobody can tell which they are."""
        if self._secret_columns is None or (self._secret and row.fault is not None):
            return None
        if row.fault is not None:
            return row.raw
        secret = self._secret_columns
        return {name: MASK if name in secret or holds_secret(value) else value for name, value in row.values.items()}

    def _redactor(self, values: Values) -> Redactor:
        columns = values if self._secret_columns is None else self._secret_columns
        return Redactor([value for name, value in values.items() if name in columns or holds_secret(value)])


class _Keys:
    """The keys of the rows that were read, each with a number and a digest. It belongs to one thread at a time."""

    def __init__(self) -> None:
        # An empty name is SQLite's own temporary database, which spills to disk and goes with the connection. Rows are
        # read in a thread, one at a time, but not always the same one.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA cache_size=-4000")
        self._database.execute("CREATE TABLE keys (key TEXT PRIMARY KEY, number INTEGER, digest TEXT) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def put(self, key: str, line: int, digest: str) -> tuple[int, str] | None:
        """Keep the line and the digest of a key; return those of an earlier row that has it."""
        query = "INSERT INTO keys VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        if self._database.execute(query, (key, line, digest)).rowcount:
            return None
        return self._database.execute("SELECT number, digest FROM keys WHERE key = ?", (key,)).fetchone()

    def count(self, key: str) -> int:
        """Note one more of a key and return how many there are now."""
        query = "INSERT INTO keys VALUES (?, 1, '') ON CONFLICT DO UPDATE SET number = number + 1 RETURNING number"
        return int(self._database.execute(query, (key,)).fetchone()[0])

    def close(self) -> None:
        self._database.close()


def _columns_of(secret: Sequence[str], inputs: InputsFrom | None) -> set[str] | None:
    """Return the columns that secret inputs are made of, None where that may be any of them."""
    columns = set(secret)
    if inputs is None or not secret:
        return columns
    if callable(inputs):
        return None
    for name in secret:
        source = inputs.get(name)
        if callable(source):
            return None
        if isinstance(source, str):
            columns |= names_in(source, collections=frozenset({"row"})) if _is_template(source) else {source}
    return columns


def _is_template(source: str) -> bool:
    return "{{" in source or "{%" in source


def _reason(error: Exception) -> str:
    if isinstance(error, ConfigurationError) or type(error) in (TypeError, ValueError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _is_empty(value: Any) -> bool:
    """Whether a column holds nothing: an empty field of a CSV is no text, and no value of a required input."""
    return value is None or (isinstance(value, str) and not value.strip())


def _by_name(expected: Sequence[CrewInput]) -> Callable[[Values], Values]:
    names = {known.name for known in expected} - {STATE_ID}

    def inputs_of(values: Values) -> Values:
        if names and names.isdisjoint(values):
            raise ConfigurationError(f"has no column of the crew's inputs: {', '.join(sorted(names))}")
        return {
            name: value
            for name, value in values.items()
            if name != STATE_ID and (not expected or name in names) and not _is_empty(value)
        }

    return inputs_of


def _chosen(inputs: InputsFrom) -> Callable[[Values], Values]:
    if callable(inputs):
        return inputs
    sources = {name: _source(name, source) for name, source in inputs.items()}

    def inputs_of(values: Values) -> Values:
        return {name: value for name, source in sources.items() if not _is_empty(value := source(values))}

    return inputs_of


def _source(name: str, source: Any) -> Callable[[Values], Any]:
    """Return what gives one input of a row."""
    if callable(source):
        return cast("Callable[[Values], Any]", source)
    if not isinstance(source, str):
        return lambda values: source
    if _is_template(source):
        return _template(name, source)

    def column(values: Values) -> Any:
        if source not in values:
            raise ConfigurationError(
                f"input {name!r} is taken from column {source!r}, which is not there (for a constant text give a "
                "function that returns it)"
            )
        return values[source]

    return column


def _template(name: str, source: str) -> Callable[[Values], Any]:
    """Return what fills a template over the columns; `row["a name"]` is a column whose name is no word."""
    needed = names_in(source, collections=frozenset({"row"}))
    fill = compiled(source)

    def rendered(values: Values) -> str:
        if unknown := needed - set(values):
            raise ConfigurationError(f"input {name!r} uses {', '.join(sorted(unknown))}, which is no column")
        plain = {column: "" if value is None else value for column, value in values.items()}
        return fill({"row": plain, **plain})

    return rendered


def _key_of(key: KeyFrom, values: Values) -> str:
    if callable(key):
        value = key(values)
    elif key in values:
        value = values[key]
    else:
        names = [str(name) for name in values]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise ConfigurationError(
            f"has no column {key!r}, which is the key; its columns are {', '.join(names[:SHOWN]) or 'none'}{more}"
        )
    text = "" if value is None else str(value)
    if not text.strip():
        raise ConfigurationError("its key is empty")
    if len(text) > MAX_KEY:
        raise ConfigurationError(f"its key has {len(text)} characters, the limit is {MAX_KEY}")
    # A ledger stores it: PostgreSQL takes no NUL, and no database half a character.
    if _UNFIT.search(text):
        raise ConfigurationError(f"its key {text!r} holds a character that no ledger can keep")
    return text


def rejected_name(output: str) -> str:
    """Return where the rows go that are set aside, by the batch's output."""
    return f"{output}.rejected.jsonl"


@dataclass(frozen=True)
class SetAside:
    """The rows of a batch that cannot be run.

    Attributes:
        count: How many there are.
        rows: The first 1,000, with their lines and why.
        output: Where all of them are, for people; None where there are none.
    """

    count: int = 0
    rows: Sequence[BadRow] = ()
    output: str | None = None

    def shown(self, most: int) -> list[str]:
        """Return some of them for people, and how many more there are."""
        found = [f"line {row.line}: {row.reason}" for row in self.rows[:most]]
        return [*found, f"{self.count - len(found):,} more"] if self.count > len(found) else found


class SetAsideFile:
    """Keeps rows that cannot be run in a temporary file, until it is known whether the batch goes on without them."""

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(prefix="prefect-crew-")  # noqa: SIM115  closed by `close`

    def put(self, bad: BadRow, shown: Any) -> None:
        """Keep a row: its line, why it cannot be run, and what it holds, without secrets."""
        line = {"line": bad.line, "reason": bad.reason, "row": shown}
        self.file.write(to_json(line, inf_nan_mode="null", serialize_unknown=True) + b"\n")

    def close(self) -> None:
        """Give the file back."""
        self.file.close()
