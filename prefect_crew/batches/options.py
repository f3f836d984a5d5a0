"""What a batch is asked to do, in one value that is checked once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.batches.pacing import KICKOFFS_AT_ONCE
from prefect_crew.batches.retries import RETRYABLE, Retries
from prefect_crew.batches.rows import InputsFrom, KeyFrom
from prefect_crew.choices import check_choices
from prefect_crew.waiting import WaitPolicy

if TYPE_CHECKING:
    from prefect_crew.api.webhooks import Webhooks

__all__ = ["IN_FLIGHT", "BatchOptions", "OnFailure"]

OnFailure = Literal["continue", "stop"] | int | float
SHARE_AFTER = 20
"""Rows that must have ended before a share of failures stops a batch."""
IN_FLIGHT = 100
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
    chunk_size: int = 200
    task_per_row: bool = False

    def __post_init__(self) -> None:
        check_choices(wait=self.wait, output_type=self.output_type, meta=self.meta, webhooks=self.webhooks)
        for name in ("max_in_flight", "kickoffs_at_once", "breaker", "max_kickoffs", "chunk_size"):
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
