"""Budgets: limits for the total use of the runs of a crew, a flow, a batch or a pipeline."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST = 2**31 - 1
_Count = Annotated[int, Field(gt=0, le=MOST)]


class Budget(BaseModel):
    """A limit for the total use of runs in a day, a month or a batch, such as `Budget(max_cost=20, per="day")`.

    A start adds the estimate of its run to a sum, and its end adds the difference. So runs in flight count, in all
    processes that share a crew database. If a run has several budgets, all of them hold.

    The estimate for `max_kickoffs` is 1, and for `max_cost` the crew's price of a run if that is fixed. Otherwise
    `max_cost` needs `estimate_cost`. `max_tokens` always needs `estimate_tokens`.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    max_cost: Annotated[float, Field(gt=0, le=MOST, allow_inf_nan=False)] | None = Field(
        default=None, description="Most that the runs may cost together, in the currency of the crew's price."
    )
    max_tokens: _Count | None = Field(default=None, description="Most tokens that the runs may use together.")
    max_kickoffs: _Count | None = Field(default=None, description="Most runs that may be started.")
    estimate_cost: Annotated[float, Field(gt=0, le=MOST, allow_inf_nan=False)] | None = Field(
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
        description="Budgets of one name share their sums. Empty: the name of the crew, flow, batch or pipeline.",
    )

    @model_validator(mode="after")
    def _limits_something(self) -> Budget:
        if self.max_cost is self.max_tokens is self.max_kickoffs is None:
            raise ValueError("give max_cost, max_tokens or max_kickoffs")
        return self
