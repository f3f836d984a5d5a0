"""The price of a crew's runs, and the sum of what runs have used and cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import floor, log10
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefect_crew.client.models import TokenUsage


class Price(BaseModel):
    """The price of a crew's runs: the sum of its parts. The currency is your own.

    Example:
        ```python
        Price(per_run=0.10, per_1k_input=0.0025, per_1k_output=0.01)
        ```
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    per_run: float = Field(default=0, ge=0, description="Price of each run, in addition to its tokens.")
    per_1k_input: float | None = Field(
        default=None, ge=0, title="Per 1,000 input tokens", description="Price of 1,000 prompt tokens."
    )
    per_1k_output: float | None = Field(
        default=None, ge=0, title="Per 1,000 output tokens", description="Price of 1,000 completion tokens."
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Price:
        if (self.per_1k_input is None) is not (self.per_1k_output is None):
            raise ValueError("give per_1k_input and per_1k_output together, with 0 for tokens that cost nothing")
        return self


def cost_of(price: Price | None, usage: TokenUsage | None) -> float | None:
    """Return the cost of a run, None if the price needs input and output tokens that nobody reported."""
    if price is None or price.per_1k_input is None or price.per_1k_output is None:
        return price and price.per_run
    if usage is None:
        return None
    put_in, out = usage.prompt_tokens, usage.completion_tokens
    if price.per_1k_input == price.per_1k_output and usage.total_tokens is not None:
        put_in, out = usage.total_tokens, 0
    if put_in is None or out is None:
        return None
    return price.per_run + (put_in * price.per_1k_input + out * price.per_1k_output) / 1000


@dataclass(frozen=True)
class Spending:
    """The sum of the use and the cost of ended runs.

    Attributes:
        runs: The number of runs. `reported`: the number that reported tokens; `priced`: the number with a known cost.
        usage: The sum of the reported tokens, None if no run reported any.
        cost: The sum of the known costs, None if no cost is known.
    """

    runs: int = 0
    reported: int = 0
    priced: int = 0
    usage: TokenUsage | None = None
    cost: float | None = None

    @classmethod
    def sum(cls, parts: Iterable[Spending]) -> Spending:
        """Add up several sums."""
        every = list(parts)
        counts = {name: sum(getattr(part, name) for part in every) for name in ("runs", "reported", "priced")}
        usage = TokenUsage.sum(part.usage for part in every if part.usage is not None)
        costs = [part.cost for part in every if part.cost is not None]
        return cls(**counts, usage=usage, cost=sum(costs) if costs else None)

    @property
    def tokens(self) -> int:
        """The total of all reported tokens."""
        return 0 if self.usage is None else self.usage.total_tokens or 0

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**vars(self), "usage": self.usage and self.usage.model_dump(exclude_none=True)}

    @property
    def unknown(self) -> str:
        """A text for people about runs without tokens or cost; "" if there are none."""
        of = f"of {self.runs:,} runs"
        parts = [f"{self.runs - self.reported:,} {of} reported no tokens"] if self.reported < self.runs else []
        if 0 < self.priced < self.runs:
            parts.append(f"the cost of {self.runs - self.priced:,} {of} is unknown")
        return "; ".join(parts)

    def __str__(self) -> str:
        tokens = f"{self.tokens:,} tokens" if self.reported else "Unknown tokens"
        text = tokens if self.cost is None else f"{tokens}, cost {money(self.cost)}"
        return f"{text} ({self.unknown})" if self.unknown else text


def money(cost: float | None) -> str:
    """Return a cost for people, with two decimals or three significant digits; a dash if it is unknown."""
    if cost is None:
        return "–"
    digits = 2 if cost >= 1 or cost <= 0 else min(9, 2 - floor(log10(cost)))
    return f"{cost:,.{digits}f}"
