"""What the engine of a batch is given: how rows are run, and a row with what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import BaseModel

from prefect_crew.batches.retries import RetryRule
from prefect_crew.batches.rows import RowJob
from prefect_crew.records import RunRecord

if TYPE_CHECKING:
    from prefect_crew.api.webhooks import Webhooks

__all__ = ["EngineOptions", "Work"]


@dataclass(frozen=True)
class EngineOptions:
    """How rows are run.

    `stop_when` gets the failed and the ended rows of this call, and says why nothing more is to be bought.
    """

    max_in_flight: int
    rule: RetryRule = field(default_factory=RetryRule)
    max_kickoffs: int | None = None
    stop_when: Callable[[int, int], str | None] = lambda failed, ended: None
    output_type: type[BaseModel] | None = None
    meta: Mapping[str, object] | None = None
    webhooks: Webhooks | None = None


@dataclass(slots=True)
class Work:
    """A row, and what the ledger knows of it."""

    job: RowJob
    attempts: Sequence[RunRecord] = ()
