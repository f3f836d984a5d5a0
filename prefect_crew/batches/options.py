"""The options of a batch: checked once, and stored for a later call."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import BaseModel, ValidationError

from prefect_crew.batches.dataset import Dataset, is_remote, shown_address, whole_address
from prefect_crew.batches.outcomes import RETRYABLE, Retries
from prefect_crew.batches.rows import InputsFrom, KeyFrom
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.runs.options import check_choices

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks


OnFailure = Literal["continue", "stop"] | int | float
SHARE_AFTER = 20
"""Rows that must have ended before a share of failures stops a batch."""
IN_FLIGHT = 100
KICKOFFS_AT_ONCE = 16
"""Kickoffs under way at a time. They bound the rows that a crash leaves uncertain, so they are few."""
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "on_bad_row": ("refuse", "set-aside"),
    "on_change": ("refuse", "continue"),
    "on_cancel": ("stop", "drain", "leave"),
    "order": ("ended", "input"),
}


@dataclass(frozen=True)
class BatchOptions:
    """The options of `run_batch`, as its docstring tells them.

    Raises:
        ConfigurationError: One of them makes no sense.
    """

    key: KeyFrom | None = None
    inputs: InputsFrom | None = None
    max_in_flight: int | None = None
    kickoffs_per_second: float | None = None
    kickoffs_at_once: int = KICKOFFS_AT_ONCE
    on_failure: OnFailure = "continue"
    on_bad_row: Literal["refuse", "set-aside"] = "refuse"
    on_change: Literal["refuse", "continue"] = "refuse"
    on_cancel: Literal["stop", "drain", "leave"] = "stop"
    breaker: int | None = 20
    breaker_pause: float = 30.0
    deduplicate: bool = False
    order: Literal["ended", "input"] = "ended"
    retries: Retries = 0
    retry_failed: bool | Collection[str] = False
    max_kickoffs: int | None = None
    wait: WaitPolicy | None = None
    output_type: type[BaseModel] | None = None
    meta: Mapping[str, Any] | None = None
    webhooks: Webhooks | None = None
    rows: str | None = None

    def __post_init__(self) -> None:
        check_choices(wait=self.wait, output_type=self.output_type, meta=self.meta, webhooks=self.webhooks)
        for name in ("max_in_flight", "kickoffs_at_once", "breaker", "max_kickoffs"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"{name} is {value!r}: give a number of 1 or more.")
        for name in ("kickoffs_per_second", "breaker_pause"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigurationError(f"{name} is {value!r}: give a number above 0.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}: say {', '.join(map(repr, choices))}.")
        if isinstance(self.retry_failed, str):
            raise ConfigurationError("retry_failed is True, or a list of keys.")
        if not isinstance(self.retry_failed, bool):
            # Every failed row looks itself up in it.
            object.__setattr__(self, "retry_failed", frozenset(self.retry_failed))
        self._check_on_failure()
        self._check_retries()
        _ = self.row_range

    @property
    def row_range(self) -> slice | None:
        """The rows of `rows`, counted from 0, the last one excluded; None for all.

        Raises:
            ConfigurationError: `rows` is no range.
        """
        if self.rows is None:
            return None
        given = re.fullmatch(r"(\d*):(\d*)", str(self.rows))
        start, stop = (int(number) if number else None for number in given.groups()) if given else (None, None)
        if (start is stop is None) or (stop is not None and (start or 0) >= stop):
            raise ConfigurationError(
                f"rows is {self.rows!r}: give a range START:STOP of row numbers from 0, the last one excluded, such as "
                "'0:500000' or '500000:'."
            )
        return slice(start, stop)

    def _check_on_failure(self) -> None:
        limit: Any = self.on_failure
        if isinstance(limit, str):
            if limit not in ("continue", "stop"):
                raise ConfigurationError(
                    f"on_failure is {limit!r}: say 'continue', 'stop', after how many failed rows to stop, or after "
                    "which share below 1."
                )
        elif type(limit) not in (int, float) or limit <= 0 or (limit > 1 and limit != int(limit)):
            raise ConfigurationError(
                f"on_failure is {limit!r}: as a number it is a count of failed rows, or a share of rows below 1."
            )

    def _check_retries(self) -> None:
        counts = self.retries.values() if isinstance(self.retries, Mapping) else [self.retries]
        if any(type(count) is not int or count < 0 for count in counts):
            raise ConfigurationError(f"retries is {self.retries!r}: give numbers of 0 or more.")
        unknown = set(self.retries) - set(RETRYABLE) if isinstance(self.retries, Mapping) else set[str]()
        if unknown:
            raise ConfigurationError(
                f"retries names {', '.join(sorted(unknown))}. A row is bought again after {', '.join(RETRYABLE)} only: "
                "anything else bought nothing, or left a run that may go on."
            )

    def stop_when(self, failed: int, ended: int) -> str | None:
        """Return why the policy buys nothing more after so many failures among so many ends, None if it goes on."""
        limit = self.on_failure
        if limit == "continue" or not failed:
            return None
        if limit == "stop":
            return "a row failed, and on_failure is 'stop'."
        if isinstance(limit, float) and limit < 1:
            over = ended >= SHARE_AFTER and failed / ended > limit
            return f"{failed} of {ended} rows failed, more than {limit:.0%}." if over else None
        return f"{failed} rows failed, and on_failure is {limit:g}." if failed >= float(limit) else None


OF_ONE_CALL = ("retry_failed", "on_change")
"""Options that are about one call only."""


def plain_call(
    *,
    crew: str | None,
    secret_inputs: Sequence[str],
    dataset: Dataset,
    output: str,
    ledger: str,
    options: BatchOptions,
) -> dict[str, Any]:
    """Return a call as JSON values. Where that cannot be, its only key is `why_not`.

    Args:
        crew: The name of its stored block, None if it is not stored.
        secret_inputs: Its secret inputs. A call that has the value of one is not stored.
        dataset: The data set.
        output: Where the lines go.
        ledger: Where the ledger is, without a password.
        options: The options.
    """
    address = dataset.address
    if crew is None:
        return {"why_not": "its crew is no stored block"}
    if address is None:
        return {"why_not": "its data set was given by code"}
    if is_remote(address) and shown_address(address) != address:
        return {"why_not": "the address of its data set holds what is not for everyone"}
    if is_remote(output) and shown_address(output) != output:
        return {"why_not": "the address of its output holds what is not for everyone"}
    if given := [name for name in secret_inputs if _holds_value(options.inputs, name)]:
        return {"why_not": f"the secret inputs {', '.join(given)} were given by code and not by a column"}
    try:
        chosen = plain_options(options, without=OF_ONE_CALL)
    except ConfigurationError as error:
        return {"why_not": str(error)}
    return {
        "crew": crew,
        "dataset": whole_address(address),
        "format": dataset.format,
        "encoding": dataset.encoding,
        "output": whole_address(output),
        "ledger": ledger,
        "options": chosen,
    }


def _holds_value(inputs: InputsFrom | None, name: str) -> bool:
    """Return whether options say what an input is, rather than which column it comes from."""
    if inputs is None or callable(inputs):
        return False
    source = inputs.get(name)
    if not isinstance(source, str):
        return source is not None
    # Of a template, what is not within its braces, or is quoted there.
    return "{{" in source and (re.sub(r"\{\{[^'\"]*?\}\}", "", source).strip() != "")


def plain_options(options: BatchOptions, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the options that are not left at their defaults as JSON values.

    Raises:
        ConfigurationError: One of them is none, such as a function.
    """
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in without or value == field.default:
            continue
        plain[field.name] = _plain(field.name, value)
    return plain


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, WaitPolicy):
        return value.model_dump(mode="json")
    if isinstance(value, type):
        kind = cast("type[Any]", value)
        where = f"{kind.__module__}:{kind.__qualname__}"
        if kind.__module__ == "__main__" or "<" in where:
            raise ConfigurationError(f"{name} {where} cannot be imported elsewhere")
        return where
    if isinstance(value, (set, frozenset, tuple)):
        value = sorted(cast("set[str]", value))
    if callable(value):
        raise ConfigurationError(f"{name} is a function")
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        raise ConfigurationError(f"{name} is no plain value") from None


def options_from(plain: Mapping[str, Any], **more: Any) -> BatchOptions:
    """Return the options again.

    Raises:
        ConfigurationError: The class of `output_type` cannot be imported here, or an option makes no sense.
    """
    return BatchOptions(**from_plain({**plain, **more}))


def from_plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of `run_batch` from JSON values, as a deployment's parameters hold them.

    `wait` may be the fields of a `WaitPolicy`, `output_type` is `module:Model`.

    Raises:
        ConfigurationError: One of these two makes no sense.
    """
    found = dict(given)
    if isinstance(found.get("wait"), Mapping):
        try:
            found["wait"] = WaitPolicy.model_validate(found["wait"])
        except ValidationError as error:
            said = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise ConfigurationError(f"wait makes no sense: {'; '.join(said)}.") from None
    if isinstance(found.get("output_type"), str):
        found["output_type"] = imported_model(found["output_type"])
    return found


def imported_model(where: str) -> type[BaseModel]:
    """Return the pydantic model that `module:Model` names.

    Raises:
        ConfigurationError: It cannot be imported here, or is none.
    """
    module, _, name = where.partition(":")
    if not module or not name:
        raise ConfigurationError(f"output_type {where!r} is to be module:Model.")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"The output_type {where} cannot be imported here: {error}.") from None
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise ConfigurationError(f"The output_type {where} is no pydantic model.")
    return found
