"""The rows of a data set become inputs and keys, or bad rows with a reason."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._text import listed_names, listed_rows, with_guesses
from prefect_crew.batches.dataset import Dataset, Row
from prefect_crew.batches.options import BatchOptions, InputsFrom, KeyFrom, is_column
from prefect_crew.client._retry_safety import kickoff_delay
from prefect_crew.client.inputs import STATE_ID, Inputs, missing_inputs, unknown_inputs
from prefect_crew.client.models import CrewInput
from prefect_crew.client.redaction import Redactor, holds_secret
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import (
    AuthenticationError,
    ConfigurationError,
    CrewAPIError,
    CrewConnectionError,
    CrewError,
    DatasetError,
)
from prefect_crew.runs.request import RunOptions
from prefect_crew.runs.start import check_is_crew
from prefect_crew.templates import compiled, names_in

Values = Mapping[str, Any]
BAD_ROWS = 1000
"""Bad rows that are kept in memory and in the crew database."""
MAX_KEY = 200
"""Characters of a row's key."""
_SHOWN = {
    "key": "logs and artifacts show keys",
    "session": "logs show sessions",
}
CONSTANT = " (for a constant text, write it as a template, with both pairs of braces: {{ 'text' }})"
_UNFIT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


async def expected_inputs(session: CrewSession) -> list[CrewInput]:
    """Return the inputs that the crew names; none if the crew cannot name them.

    Raises AuthenticationError, ConfigurationError if a web page or a redirect is the answer, or CrewConnectionError
    or CrewAPIError (429, 5xx) if the server cannot answer now.
    """
    for is_last in (False, False, True):
        try:
            return await session.call(lambda client: client.inputs())
        except AuthenticationError:
            raise
        except CrewError as error:
            status = error.status_code if isinstance(error, CrewAPIError) else 0
            if isinstance(error, CrewConnectionError) or status == 429 or status >= 500:
                # Not taken for a crew that names no inputs: all columns would be inputs, and every row would change.
                if is_last:
                    raise
                await asyncio.sleep(kickoff_delay(error) or 1.0)
                continue
            check_is_crew(error, session.crew)
            run_logger().warning("The crew does not name its inputs, so rows are not checked for them: %s", error)
            break
    return []


@dataclass(frozen=True, slots=True)
class RowJob:
    """One row, ready to be kicked off. `number` counts rows from 0."""

    number: int
    key: str
    inputs: Inputs


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be run, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class BadRows:
    """The bad rows of a batch: their number, and the first 1,000 of them."""

    count: int = 0
    rows: Sequence[BadRow] = ()

    def error(self, source: str, *, alone: bool) -> DatasetError:
        """Return the error that refuses the data set. `alone`: no row can be run."""
        cannot = "a row cannot be run" if self.count == 1 else f"{self.count:,} rows cannot be run"
        reason = (
            f"{cannot}: {listed_rows(self.rows, self.count)}. Correct them, or skip them with on_bad_row='skip' "
            "(--on-bad-row skip)."
        )
        if alone:
            reasons = {row.reason for row in self.rows}
            why = reasons.pop() if len(reasons) == 1 else listed_rows(self.rows, self.count)
            reason = f"none of its {self.count:,} rows can be run: {why}."
        return DatasetError(reason, source=source, rows=self.rows)


class RowPlan:
    """Turns the rows of a data set into jobs; `expected` are the crew's inputs.

    Without a mapping, the columns with the names of the crew's inputs are the inputs, or all columns if the crew names
    no inputs; a column `id` never is an input that way. Without `key`, a row's key is a digest of its inputs and the
    number of equal rows before it. No reason of a bad row shows a secret input, and no key may hold one.

    Raises:
        ConfigurationError: The key is a secret input, a template is not valid, or the mapping gives inputs which the
            crew does not name.
    """

    def __init__(self, dataset: Dataset, options: BatchOptions, crew: Crew, expected: Sequence[CrewInput] = ()) -> None:
        self.dataset = dataset
        self._options = options
        self._crew = crew
        self._expected = expected
        self._names = [item.name for item in expected]
        self._rows = options.row_range
        inputs = options.inputs
        self._inputs_of = _chosen(inputs, expected)
        for name, column in (("key", options.key), ("session", options.session)):
            if isinstance(column, str) and column in crew.secret_inputs:
                raise ConfigurationError(
                    f"The {name} column {column!r} is a secret input, but {_SHOWN[name]}. Use another column, or leave "
                    f"{name} out."
                )
        if options.session is not None:
            crew.check_has_sessions()
        if unknown := self._unknown({} if inputs is None or callable(inputs) else inputs):
            raise ConfigurationError(
                f"The inputs mapping {unknown}. Nothing was started. To send inputs that the crew does not name, set "
                "allow_extra_inputs=True on the block."
            )

    def check(self) -> tuple[int, BadRows]:
        """Read every row once, and return the number of rows that can be run, and the bad rows.

        Raises:
            DatasetError: The data set cannot be read to its end, or is empty.
        """
        bad: list[BadRow] = []
        bad_count = total = 0
        for job in self._read():
            if isinstance(job, RowJob):
                total += 1
            else:
                bad_count += 1
                if len(bad) < BAD_ROWS:
                    bad.append(job)
        if total == bad_count == 0:
            where = "" if self._rows == slice(None) else f" from row {self._rows.start or 0} on"
            raise DatasetError(f"has no rows{where}.", source=self.dataset.name)
        return total, BadRows(bad_count, bad)

    def jobs(self) -> Iterator[RowJob]:
        """Yield the rows that can be run, in the order of the data set."""
        return (job for job in self._read() if isinstance(job, RowJob))

    def _read(self) -> Iterator[RowJob | BadRow]:
        """Yield the job of each row, or the reason why it is bad."""
        keys, number = dict[str, int](), 0
        for row in islice(self.dataset.rows(), self._rows.start, self._rows.stop):
            try:
                yield self._job(row, keys, number)
                number += 1
            except Exception as error:  # noqa: BLE001  any error of a user's function is a fault of its row
                yield BadRow(row.line, self._masked_reason(row, error))

    def _masked_reason(self, row: Row, error: Exception) -> str:
        try:
            # Any column may be the source of a secret input.
            secret = [value for value in row.values.values() if self._crew.secret_inputs or holds_secret(value)]
            reason = Redactor(secret)(_reason(error))
        except (RecursionError, TypeError):  # the values are nested too deeply, or have keys of a strange type
            reason = f"{type(error).__name__}, and secrets cannot be looked for in its values"
        return reason.encode("utf-8", "backslashreplace").decode()

    def _job(self, row: Row, keys: dict[str, int], number: int) -> RowJob:
        """Return the job of a row. `keys` has the lines of the keys before, or how often inputs were there."""
        if row.fault is not None:
            raise ConfigurationError(row.fault)
        session = self._session_of(row.values)
        values: Any = self._inputs_of(row.values)
        if values is None:  # for a single run it means no inputs; here a `return` is missing
            raise ConfigurationError("the function of the inputs returned None, not a mapping")
        inputs = self._crew.take(Inputs.of(values), session=session)
        self._check_shown(inputs, "session", session or "")
        encoded = inputs.encoded
        if missing := missing_inputs(self._expected, encoded):
            by_name = STATE_ID in missing and self._options.inputs is None
            mapped = f"; {STATE_ID} never comes from a column by its name alone: map it" if by_name else ""
            raise ConfigurationError(f"has no value for {', '.join(missing)}{mapped}")
        if unknown := self._unknown(encoded):
            raise ConfigurationError(unknown)
        if self._options.key is None:
            keys[inputs.digest] = count = keys.get(inputs.digest, 0) + 1
            key = f"{inputs.digest}-{count}"
        else:
            key = _key_of(self._options.key, row.values)
            self._check_shown(inputs, "key", key)
            if (earlier := keys.setdefault(key, row.line)) != row.line:
                raise ConfigurationError(f"has the key {key!r} of line {earlier} again")
        return RowJob(number, key, inputs)

    def _check_shown(self, inputs: Inputs, what: str, text: str) -> None:
        if inputs.secret_names and Redactor(inputs.secret_values.values()).hides(text):
            raise ConfigurationError(f"its {what} holds a secret input, but {_SHOWN[what]}")

    def _session_of(self, values: Values) -> str | None:
        """Return the session of a row; None for an empty column, and without `session` among the options."""
        source = self._options.session
        name = None if source is None else _value_of(source, values, what="session")
        if holds_secret(name):
            raise ConfigurationError(f"its session holds a secret, but {_SHOWN['session']}")
        try:
            return None if _is_empty(name) else RunOptions.of(session=str(name)).session
        except ConfigurationError:  # its text would quote the session, whose column may hold a secret
            kind = RunOptions.model_fields["session"].description
            raise ConfigurationError(f"its session is not {kind}") from None

    def _unknown(self, inputs: Mapping[str, Any]) -> str | None:
        unknown = [] if self._crew.allow_extra_inputs else unknown_inputs(self._expected, inputs)
        if not unknown:
            return None
        guessed = with_guesses(unknown, self._names)
        return f"gives the unknown inputs {guessed}; the crew takes {listed_names(self._names)}"


def _reason(error: Exception) -> str:
    is_plain = isinstance(error, ConfigurationError) or type(error) in (TypeError, ValueError)
    text = str(error) if is_plain else f"{type(error).__name__}: {error}"
    return text.removesuffix(" Nothing was started.").rstrip(".")  # it becomes a part of a sentence


def _is_empty(value: Any) -> bool:
    """Whether a column holds nothing. An empty field of a CSV is no text, and no value of a required input."""
    return value is None or (isinstance(value, str) and not value.strip())


def _chosen(inputs: InputsFrom | None, expected: Sequence[CrewInput]) -> Callable[[Values], Values]:
    """Return the function that makes the inputs of a row."""
    if callable(inputs):
        return inputs
    names = {item.name for item in expected} - {STATE_ID}
    sources = {name: _source(name, source) for name, source in (inputs or {}).items()}

    def inputs_of(values: Values) -> Values:
        if inputs is not None:
            chosen = {name: source(values) for name, source in sources.items()}
        elif names and names.isdisjoint(values):
            raise ConfigurationError(
                f"no column has the name of an input of the crew ({', '.join(sorted(names))}): rename or map columns"
            )
        else:
            chosen = {name: values[name] for name in values if name != STATE_ID and (not expected or name in names)}
        return {name: value for name, value in chosen.items() if not _is_empty(value)}

    return inputs_of


def _source(name: str, source: Any) -> Callable[[Values], Any]:
    """Return the function that gives one input of a row."""
    if callable(source):
        return cast("Callable[[Values], Any]", source)
    if not isinstance(source, str):
        return lambda values: source
    if not is_column(source):
        needed, fill = names_in(source, collections=frozenset({"row"})), compiled(source)

        def rendered(values: Values) -> str:
            """Fill a template over the columns: `{{ name }}` or `{{ row["a name"] }}`."""
            _check_columns(name, needed, values)
            plain = {column: "" if value is None else value for column, value in values.items()}
            return fill({"row": plain, **plain})

        return rendered

    def column(values: Values) -> Any:
        _check_columns(name, {source}, values, CONSTANT)
        return values[source]

    return column


def _check_columns(name: str, needed: Set[str], values: Values, advice: str = "") -> None:
    if unknown := needed - set(values):
        wrong = with_guesses(sorted(unknown), map(str, values))
        raise ConfigurationError(f"input {name!r} needs column {wrong}, which the row does not have{advice}")


def _value_of(source: KeyFrom, values: Values, *, what: str) -> Any:
    """Return the value of a column, or of a function of the row. `what` is its meaning, for messages.

    A whole number stays one where pandas has made the column floats, since another row has none.
    """
    if not callable(source) and source not in values:
        columns = listed_names([str(name) for name in values]) or "none"
        raise ConfigurationError(f"there is no column {source!r}, which is the {what}; the columns are {columns}")
    value = source(values) if callable(source) else values[source]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _key_of(key: KeyFrom, values: Values) -> str:
    value = _value_of(key, values, what="key")
    text = "" if value is None else str(value)
    if not text.strip():
        raise ConfigurationError("its key is empty")
    if len(text) > MAX_KEY:
        raise ConfigurationError(f"its key has {len(text)} characters, the limit is {MAX_KEY}")
    if _UNFIT.search(text):
        raise ConfigurationError(f"its key {text!r} holds a control character or half a character")
    return text
