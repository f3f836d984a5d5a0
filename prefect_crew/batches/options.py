"""What a batch is asked to do, in one value that is checked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.batches.rows import InputsFrom
from prefect_crew.waiting import WaitPolicy

__all__ = ["BatchOptions", "OnFailure"]

OnFailure = Literal["continue", "stop"] | int | float
SHARE_AFTER = 20
"""Rows that must have ended before a share of failures stops a batch."""


@dataclass(frozen=True)
class BatchOptions:
    """The options of `run_batch`, as its docstring tells them."""

    key: str | Callable[[Mapping[str, Any]], str] | None = None
    inputs: InputsFrom | None = None
    max_in_flight: int = 100
    kickoffs_per_second: float | None = None
    on_failure: OnFailure = "continue"
    on_bad_row: Literal["refuse", "set-aside"] = "refuse"
    on_change: Literal["refuse", "continue"] = "refuse"
    on_cancel: Literal["stop", "drain", "leave"] = "stop"
    deduplicate: bool = False
    order: Literal["ended", "input"] = "ended"
    retries: int | Mapping[str, int] = 0
    retry_failed: bool = False
    max_kickoffs: int | None = None
    wait: WaitPolicy | None = None
    output_type: type[BaseModel] | None = None
    meta: Mapping[str, Any] | None = None
    chunk_size: int = 200
    task_per_row: bool = False

    def __post_init__(self) -> None:
        if self.max_in_flight < 1 or self.chunk_size < 1:
            raise ConfigurationError("max_in_flight and chunk_size must be at least 1.")
        if self.kickoffs_per_second is not None and self.kickoffs_per_second <= 0:
            raise ConfigurationError("kickoffs_per_second must be more than 0.")
        if isinstance(self.on_failure, str):
            if self.on_failure not in ("continue", "stop"):
                raise ConfigurationError(
                    f"on_failure is {self.on_failure!r}: say 'continue', 'stop', how many rows may fail, or a share."
                )
        elif isinstance(self.on_failure, bool) or self.on_failure <= 0:
            raise ConfigurationError("on_failure as a number says how many rows, or which share below 1, may fail.")

    def stop_when(self, failed: int, ended: int) -> str | None:
        """Return why the policy buys nothing more after so many failures among so many ends, None if it goes on."""
        limit = self.on_failure
        if limit == "continue":
            return None
        if limit == "stop":
            return "a row failed, and on_failure is 'stop'." if failed else None
        if isinstance(limit, float) and limit < 1:
            over = ended >= SHARE_AFTER and failed / ended > limit
            return f"{failed} of {ended} rows failed, more than {limit:.0%}." if over else None
        return f"{failed} rows failed, the limit is {limit:g}." if failed >= float(limit) else None
