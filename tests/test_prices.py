"""What a run costs, and when nobody can say."""

import importlib.util
import sys

import pytest
from pydantic import SecretStr, ValidationError

from prefect_crew import DeployedCrew
from prefect_crew.blocks import crew_of
from prefect_crew.client.models import TokenUsage
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.prices import ONE_TOKEN, Price, cost_of

USAGE = TokenUsage(total_tokens=1100, prompt_tokens=1000, completion_tokens=100)
by_model = pytest.mark.skipif(importlib.util.find_spec("genai_prices") is None, reason="needs prefect-crew[prices]")
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
        (TOKENS, TokenUsage(total_tokens=1100, completion_tokens=100), 0.7),
        (TOKENS, TokenUsage(total_tokens=0, prompt_tokens=0, completion_tokens=0), 0),
        (Price(per_1k_input=2, per_1k_output=2), TokenUsage(total_tokens=500), 1),
        # What nobody reported is unknown, and never zero.
        (TOKENS, None, None),
        (TOKENS, TokenUsage(), None),
        (TOKENS, TokenUsage(total_tokens=1100), None),
        (Price(per_run=1, per_1k_input=0.5, per_1k_output=2), TokenUsage(prompt_tokens=1000), None),
    ],
)
def test_parts_of_a_price_are_added_up(price: Price | None, usage: TokenUsage | None, cost: float | None):
    assert cost_of(price, usage) == (None if cost is None else pytest.approx(cost))


@by_model
def test_the_list_price_of_a_model_is_in_dollars():
    usage = TokenUsage(prompt_tokens=1_000_000, completion_tokens=0)
    half_cached = TokenUsage(prompt_tokens=1_000_000, completion_tokens=0, cached_prompt_tokens=500_000)
    for name in ("gpt-4o", "openai/gpt-4o"):
        assert cost_of(Price(model=name), usage) == pytest.approx(2.5, rel=0.5)
        assert cost_of(Price(model=name), half_cached) < cost_of(Price(model=name), usage)
    assert cost_of(Price(model="nobody/gpt-4o"), usage) == cost_of(Price(model="gpt-4o"), usage)


@by_model
def test_the_models_that_were_called_count_where_all_tokens_are_told_by_model():
    small, big = "openai/gpt-4o-mini", "openai/gpt-4o"
    half = TokenUsage(prompt_tokens=500, completion_tokens=50)
    both, price = {small: half, big: half}, Price(model=big)
    alone = [cost_of(Price(model=model), half) for model in both]
    assert cost_of(price, USAGE, both) == pytest.approx(sum(alone))
    # One of them is missing: everything counts as the model that the price names.
    assert cost_of(price, USAGE, {small: half}) == cost_of(price, USAGE)
    # Nobody lists the price of a model of one's own.
    assert cost_of(price, USAGE, {"mine": half, big: half}) == pytest.approx(cost_of(price, USAGE))


@by_model
def test_a_model_that_nobody_knows_is_refused_in_words():
    cost_of(Price(model="gpt-4o"), ONE_TOKEN)
    cost_of(Price(per_run=1), ONE_TOKEN)
    with pytest.raises(ConfigurationError, match=r"does not know the model 'no-such-model'.* per_1k_input"):
        cost_of(Price(model="no-such-model"), ONE_TOKEN)


def test_without_the_package_a_price_by_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'prefect-crew\[prices\]'"):
        cost_of(Price(model="gpt-4o"), ONE_TOKEN)
    assert cost_of(TOKENS, USAGE) == pytest.approx(0.7)


@pytest.mark.parametrize(
    "fields",
    [
        {"per_1k_input": 1},
        {"per_run": -1},
        {"model": "gpt-4o", "per_1k_input": 1, "per_1k_output": 1},
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
