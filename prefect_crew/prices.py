"""The cost of a run: a price of each run, of its tokens, or of its model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import floor, log10
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefect_crew.client.models import TokenUsage
from prefect_crew.exceptions import ConfigurationError


class Price(BaseModel):
    """The price of a crew's runs: the sum of its parts. The currency is your own.

    Example:
        ```python
        Price(per_run=0.10, per_1k_input=0.0025, per_1k_output=0.01)
        Price(model="openai/gpt-4o")  # in US dollars, with prefect-crew[prices]
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
    model: str | None = Field(
        default=None,
        description=(
            "The model whose list price counts, in US dollars. It needs prefect-crew[prices]. If streamed events "
            "name the models of all tokens, those count."
        ),
        examples=["openai/gpt-4o", "claude-sonnet-4-5"],
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Price:
        if (self.per_1k_input is None) is not (self.per_1k_output is None):
            raise ValueError("give per_1k_input and per_1k_output together, with 0 for tokens that cost nothing")
        if self.model is not None and self.per_1k_input is not None:
            raise ValueError("give per_1k_input and per_1k_output, or a model for its list price, not both")
        return self


ONE_TOKEN = TokenUsage(prompt_tokens=1, completion_tokens=0)
"""A use by which a price is checked: `cost_of` raises for it only if nobody knows the price's model."""


def cost_of(
    price: Price | None, usage: TokenUsage | None, by_model: Mapping[str, TokenUsage] | None = None
) -> float | None:
    """Return the cost of a run, None if the price needs input and output tokens that nobody reported.

    `by_model` has the reported tokens by the called model.

    Raises:
        ConfigurationError: The price is by model, and the package genai-prices is missing or does not know the model.
    """
    if price is None or (price.model is None and price.per_1k_input is None):
        return price and price.per_run
    if usage is None:
        return None
    split = _input_and_output(usage)
    if price.model is None:
        put_in, out = price.per_1k_input or 0, price.per_1k_output or 0
        if split is None and usage.total_tokens is not None and put_in == out:
            split = usage.total_tokens, 0
        return None if split is None else price.per_run + (split[0] * put_in + split[1] * out) / 1000
    if split is None:
        return None
    calls = dict(by_model or {})
    if sum(sum(_input_and_output(call) or ()) for call in calls.values()) < sum(split):
        calls = {price.model: usage}  # the report by model is incomplete
    return price.per_run + sum(_list_price(model, call, price.model) for model, call in calls.items())


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


def _input_and_output(usage: TokenUsage) -> tuple[int, int] | None:
    """Return the input and the output tokens, None if one of the two is not known."""
    put_in, out, total = usage.prompt_tokens, usage.completion_tokens, usage.total_tokens
    if total is not None:
        put_in = total - out if put_in is None and out is not None else put_in
        out = total - put_in if out is None and put_in is not None else out
    return None if put_in is None or out is None or min(put_in, out) < 0 else (put_in, out)


def _list_price(model: str, usage: TokenUsage, otherwise: str | None = None) -> float:
    """Return the cost of tokens by the list of genai-prices, in US dollars. Try the model `otherwise` second.

    Raises:
        ConfigurationError: genai-prices is not installed, or knows neither model.
    """
    try:
        from genai_prices import Usage, calc_price  # an extra, and 30 ms to import
    except ImportError:
        raise ConfigurationError(
            f"The price of model {model!r} needs the package genai-prices. Install it: pip install "
            "'prefect-crew[prices]'. Or give the crew's price as per_1k_input and per_1k_output."
        ) from None
    put_in, out = _input_and_output(usage) or (0, 0)
    cached = min(usage.cached_prompt_tokens or 0, put_in)
    tokens = Usage(input_tokens=put_in, output_tokens=out, cache_read_tokens=cached)
    for full_name in dict.fromkeys(filter(None, (model, otherwise))):
        # CrewAI names a model "provider/model"; the provider may be a reseller that the list does not have.
        *providers, name = full_name.split("/")
        for provider in (*providers[:1], None):
            with suppress(LookupError, ValueError):
                return float(calc_price(tokens, name, provider_id=provider).total_price)
    raise ConfigurationError(
        f"genai-prices does not know the model {model!r}. Write the model as CrewAI does, such as 'openai/gpt-4o', or "
        "give the crew's price as per_1k_input and per_1k_output."
    )
