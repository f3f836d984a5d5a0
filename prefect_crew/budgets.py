"""Budgets: limits for the total use of the runs of a crew, a flow, a batch or a pipeline."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

UNITS = {"cost": 10_000, "tokens": 1, "kickoffs": 1}
"""The measures, and for each the slots of a counter for one unit: a counter has whole numbers, up to `MOST`."""
MOST = 2**31 - 1
PREFIX = "prefect-crew.budget"
_Count = Annotated[int, Field(gt=0, le=MOST)]


class Budget(BaseModel):
    """A limit for the total use of runs in a day, a month or a batch, such as `Budget(max_cost=20, per="day")`.

    A start adds the estimate of its run to a counter, and its end adds the difference. So runs in flight count, in all
    processes that share a Prefect server. If a run has several budgets, all of them hold.

    The estimate for `max_kickoffs` is 1, and for `max_cost` the crew's price of a run if that is fixed. Otherwise
    `max_cost` needs `estimate_cost`. `max_tokens` always needs `estimate_tokens`.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    max_cost: Annotated[float, Field(gt=0, le=MOST // UNITS["cost"], allow_inf_nan=False)] | None = Field(
        default=None, description="Most that the runs may cost together, in the currency of the crew's price."
    )
    max_tokens: _Count | None = Field(default=None, description="Most tokens that the runs may use together.")
    max_kickoffs: _Count | None = Field(default=None, description="Most runs that may be started.")
    estimate_cost: Annotated[float, Field(gt=0, le=MOST // UNITS["cost"], allow_inf_nan=False)] | None = Field(
        default=None,
        description="Expected cost of a run, for max_cost. Not needed if the crew's price of a run is fixed.",
    )
    estimate_tokens: _Count | None = Field(default=None, description="Expected tokens of a run, for max_tokens.")
    per: Literal["batch", "day", "month"] = Field(
        default="batch",
        description="The period: a day or a month in UTC, or one batch, one run of a pipeline or one flow run.",
    )
    on_limit: Literal["refuse", "warn"] = Field(
        default="refuse",
        description="Whether to refuse a run without room, or to start it with a warning.",
    )
    name: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Budgets of one name share a counter. Empty: the name of the crew, flow, batch or pipeline.",
    )

    @model_validator(mode="after")
    def _limits_something(self) -> Budget:
        if self.max_cost is self.max_tokens is self.max_kickoffs is None:
            raise ValueError("give max_cost, max_tokens or max_kickoffs")
        return self

    def periods(self, *, name: str, batch: str, at: datetime) -> list[BudgetPeriod]:
        """Return the counters for runs that start at a moment. A budget without a name gets `name`; `batch` is the
        batch of the runs."""
        period, resets_at = f"batch.{_plain(batch)}", None
        if self.per == "day":
            period, resets_at = f"{at:%Y-%m-%d}", datetime(at.year, at.month, at.day, tzinfo=UTC) + timedelta(days=1)
        elif self.per == "month":
            in_next = datetime(at.year, at.month, 1, tzinfo=UTC) + timedelta(days=32)
            period, resets_at = f"{at:%Y-%m}", in_next.replace(day=1)
        name = self.name or name
        counter = f"{PREFIX}.{_plain(name)}.{period}"
        limits = (
            ("cost", self.max_cost, self.estimate_cost),
            ("tokens", self.max_tokens, self.estimate_tokens),
            ("kickoffs", self.max_kickoffs, 1),
        )
        return [
            BudgetPeriod(name, f"{counter}.{measure}", measure, limit, estimate, resets_at, self.on_limit)
            for measure, limit, estimate in limits
            if limit is not None
        ]


@dataclass(frozen=True)
class BudgetPeriod:
    """One measure of a budget in one period. `counter` is the name of its global concurrency limit in Prefect.

    `estimate` is the expected use of one run, None if the budget has none.
    """

    budget: str
    counter: str
    measure: str
    limit: float
    estimate: float | None
    resets_at: datetime | None
    on_limit: str


def slots_of(measure: str, amount: float) -> int:
    """Return the slots for an amount, rounded up, `MOST` at most."""
    return min(math.ceil(round(amount * UNITS[measure], 3)), MOST)


def _plain(name: str) -> str:
    """Return a name in a form that Prefect accepts for a limit and in a path. Different names stay different."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:80]
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return plain if plain == name else f"{plain}-{digest}"
