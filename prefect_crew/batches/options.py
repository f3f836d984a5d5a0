"""The options of a batch: checked once, and stored for a later call."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ImportString, ValidationError, field_serializer, field_validator
from pydantic_core import PydanticSerializationError

from prefect_crew._text import problems_of
from prefect_crew.batches.dataset import is_remote, shown_address, whole_address
from prefect_crew.budgets import Budget
from prefect_crew.client.redaction import holds_secret
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import ConfigurationError

SHARE_AFTER = 20
"""Rows that must have ended before a share of failures stops a batch."""
IN_FLIGHT = 100

RowFunction = Callable[[Mapping[str, Any]], Any]
"""A function of the row, which is a mapping of the columns."""
InputsFrom = Mapping[str, RowFunction | object] | Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""A function of the row; or inputs by name, each a template over the row's columns, a column's name, a function of the
row, or any constant that is not text."""
KeyFrom = str | RowFunction
"""The name of a column, or a function of the row."""
Count = Annotated[int, Field(strict=True, ge=1)]
OnFailure = Literal["continue", "stop"] | int | float


class BatchOptions(BaseModel):
    """The options of `run_batch`, whose docstring explains them. Raises ConfigurationError for a wrong option.

    `wait` may be the fields of a `WaitPolicy`, and `output_type` the text `module:Model`, as a deployment's parameters
    hold them.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    key: KeyFrom | None = None
    session: KeyFrom | None = None
    inputs: Mapping[str, Any] | Callable[..., Any] | None = None
    rows: str | None = None
    max_in_flight: Count | None = None
    kickoffs_at_once: Count = 64
    on_failure: OnFailure = "continue"
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    breaker: Count | None = 20
    wait: WaitPolicy | None = None
    output_type: ImportString[type[BaseModel]] | None = None
    meta: Mapping[str, Any] | None = None
    webhooks: Webhooks | None = None
    budgets: tuple[Budget, ...] = ()

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise ConfigurationError(f"{'; '.join(problems_of(error))}. Nothing was started.") from None

    @property
    def row_range(self) -> slice:
        """The rows of `rows`, counted from 0, the last one excluded."""
        return slice(*(int(number) if number else None for number in (self.rows or ":").split(":")))

    @field_validator("rows")
    @classmethod
    def _check_rows(cls, rows: str | None) -> str | None:
        start, _, stop = (rows or "0:").partition(":")
        if not re.fullmatch(r"\d+:\d*|:\d+", rows or "0:") or (stop and int(start or 0) >= int(stop)):
            raise ValueError(
                f"it is {rows!r}; give a range START:STOP of row numbers from 0, such as '0:500000' or '500000:', "
                "which ends before row STOP"
            )
        return rows

    @field_validator("on_failure", mode="before")
    @classmethod
    def _check_on_failure(cls, limit: Any) -> Any:
        is_number = type(limit) in (int, float) and limit > 0 and (limit <= 1 or limit % 1 == 0)
        if not is_number and limit not in ("continue", "stop"):
            raise ValueError("give 'continue', 'stop', a number of failed rows, or a share of the rows below 1")
        return limit

    @field_serializer("output_type", when_used="json-unless-none")
    def _importable(self, model: type[BaseModel]) -> str:
        if model.__module__ == "__main__" or model.__qualname__ != model.__name__:
            raise ValueError(f"the output_type {model.__qualname__} cannot be imported elsewhere")
        return f"{model.__module__}:{model.__name__}"

    def why_stop(self, failed: int, ended: int) -> str | None:
        """Return the reason to start no more rows after `failed` of `ended` rows; None if the batch goes on."""
        limit = self.on_failure
        if limit == "continue" or not failed:
            return None
        if limit == "stop":
            return "a row failed, and on_failure is 'stop'."
        if isinstance(limit, float) and limit < 1:
            over = ended >= SHARE_AFTER and failed / ended > limit
            return f"{failed} of {ended} rows failed, more than {limit:.0%}." if over else None
        return f"{failed} rows failed, and on_failure is {limit:g}." if failed >= limit else None


def stored_call(
    *, crew: str | None, secret_inputs: Sequence[str], dataset: str | None, export: str, options: BatchOptions
) -> dict[str, Any]:
    """Return a call as JSON values; an empty one if it cannot be stored: it needs a stored crew, a data set with an
    address, and options that are plain values. A call that may hold a secret is not stored.

    `crew` is the name of its block, `dataset` the address of its data set.
    """
    try:
        fields = options.model_dump(mode="json", exclude_defaults=True)
    except (PydanticSerializationError, ValueError):
        return {}
    if callable(options.inputs):
        return {}
    sources = options.inputs or {}
    # What JSON changes is no plain value: a function, a number that becomes the text of a column's name, a secret.
    is_plain = all((fields.get(name) or {}) == (getattr(options, name) or {}) for name in ("inputs", "meta"))
    is_secret = any(name in sources and not is_column(sources[name]) for name in secret_inputs)
    is_secret = is_secret or holds_secret(sources) or holds_secret(options.meta)
    # The password of sql://BLOCK?query=… is in the block.
    places = [place for place in (dataset or "", export) if is_remote(place) and not place.startswith("sql://")]
    is_secret = is_secret or any(shown_address(place) != place for place in places)
    if crew is None or dataset is None or options.webhooks is not None or is_secret or not is_plain:
        return {}
    return {"crew": crew, "dataset": whole_address(dataset), "export": whole_address(export), "options": fields}


def is_column(source: Any) -> bool:
    """Return whether the source of an input is the name of a column, and not a template."""
    return isinstance(source, str) and "{{" not in source and "{%" not in source
