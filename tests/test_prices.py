"""What a run costs, and when nobody can say."""

import pytest
from pydantic import SecretStr, ValidationError

from prefect_crew import DeployedCrew
from prefect_crew.blocks import crew_of
from prefect_crew.client.models import TokenUsage
from prefect_crew.prices import Price, cost_of

USAGE = TokenUsage(total_tokens=1100, prompt_tokens=1000, completion_tokens=100)
TOKENS = Price(per_1k_input=0.5, per_1k_output=2)


@pytest.mark.parametrize(
    ("price", "usage", "cost"),
    [
        (None, USAGE, None),
        (Price(per_run=0.25), None, 0.25),
        (Price(per_run=0), None, 0),
        (TOKENS, USAGE, 0.7),
        (Price(per_run=0.1, per_1k_input=0.5, per_1k_output=2), USAGE, 0.8),
        (TOKENS, TokenUsage(prompt_tokens=1000, completion_tokens=100), 0.7),
        (TOKENS, TokenUsage(total_tokens=0, prompt_tokens=0, completion_tokens=0), 0),
        (Price(per_1k_input=2, per_1k_output=2), TokenUsage(total_tokens=500), 1),
        # What nobody reported is unknown, and never zero.
        (TOKENS, None, None),
        (TOKENS, TokenUsage(), None),
        (TOKENS, TokenUsage(total_tokens=1100), None),
        (TOKENS, TokenUsage(total_tokens=1100, completion_tokens=100), None),
        (Price(per_run=1, per_1k_input=0.5, per_1k_output=2), TokenUsage(prompt_tokens=1000), None),
    ],
)
def test_parts_of_a_price_are_added_up(price: Price | None, usage: TokenUsage | None, cost: float | None):
    assert cost_of(price, usage) == (None if cost is None else pytest.approx(cost))


@pytest.mark.parametrize(
    "fields",
    [
        {"per_1k_input": 1},
        {"per_run": -1},
        {"per_token": 1},
    ],
)
def test_a_price_that_makes_no_sense_is_refused(fields: dict[str, object]):
    with pytest.raises(ValidationError):
        Price.model_validate(fields)


def crew(**fields: object) -> DeployedCrew:
    return DeployedCrew.model_validate({"url": "https://c.test", "token": SecretStr("t"), **fields})


def test_a_number_on_the_block_is_the_price_of_a_run():
    assert crew(price=0.5).price == 0.5
    assert crew_of(crew(price=0.5)).price == Price(per_run=0.5)
    assert crew_of(crew()).price is None
    assert crew_of(crew(price={"per_1k_input": 1, "per_1k_output": 2})).price == Price(per_1k_input=1, per_1k_output=2)
    for wrong in (-1, {"per_run": -1}, {"per_1k_inputs": 1, "per_1k_output": 1}):
        with pytest.raises(ValidationError):
            crew(price=wrong)
    # As a later version may have stored it.
    assert crew(price={"per_run": 1, "surcharge_of_a_later_version": 2}).price == Price(per_run=1)
