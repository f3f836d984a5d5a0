"""The options of a batch: what is refused, when it stops, and what is stored of a call."""

import json
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr, create_model

import prefect_crew as pc
from prefect_crew.batches.options import BatchOptions, stored_call

WRONG: dict[str, list[Any]] = {
    "max_in_flight": [0, 1.5, True],
    "kickoffs_at_once": [0],
    "on_failure": ["halt", 0, float("inf"), None, 2.5, True],
    "output_type": [dict, "json:Nothing"],
    "breaker": [0],
    "rows": ["5", ":", "7:7", "-5:"],
    **{option: ["x"] for option in ("wait", "meta", "webhooks", "no_such_option")},
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option in WRONG for value in WRONG[option]])
def test_options_that_make_no_sense_are_refused(option: str, value: Any):
    with pytest.raises(pc.ConfigurationError, match=option):
        BatchOptions(**{option: value})


@pytest.mark.parametrize(
    ("policy", "failed", "ended", "stops"),
    [
        pytest.param("continue", 99, 100, False, id="continue"),
        pytest.param("stop", 0, 100, False, id="stop without a failure"),
        pytest.param("stop", 1, 1, True, id="stop"),
        pytest.param(3, 2, 100, False, id="below the number"),
        pytest.param(3, 3, 3, True, id="at the number"),
        pytest.param(0.1, 5, 10, False, id="share of too few"),
        pytest.param(0.1, 2, 20, False, id="at the share"),
        pytest.param(0.1, 3, 20, True, id="above the share"),
        pytest.param(1.0, 1, 50, True, id="one as a float is a number"),
    ],
)
def test_when_a_policy_stops(policy: Any, failed: int, ended: int, stops: bool):
    assert (BatchOptions(on_failure=policy).why_stop(failed, ended) is not None) is stops


def call(**options: Any) -> dict[str, Any]:
    given = {"crew": "payer", "dataset": "https://files.test/rows.csv", "export": "out.jsonl", **options}
    chosen = BatchOptions(**{name: given.pop(name) for name in [*given] if name in BatchOptions.model_fields})
    return stored_call(secret_inputs=["pin"], options=chosen, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"inputs": {"pin": 4711}},
        {"inputs": {"pin": SecretStr("4711")}},
        {"inputs": {"pin": "{{ user }}:4711"}},
        {"inputs": {"other": [SecretStr("4711")]}},
        {"meta": {"other": SecretStr("4711")}},
        {"export": "s3://key:4711@bucket/out.jsonl"},
        {"dataset": "simplecache::https://user:4711@files.test/rows.csv"},
    ],
    ids=["number", "type", "template", "list", "meta", "export", "data set"],
)
def test_a_call_that_holds_a_secret_is_not_stored(given: dict[str, Any]):
    assert call(**given) == {}


def test_a_stored_call_gives_the_same_options_again():
    inputs = {"topic": "{{ name }}", "limit": 5, "pin": "code"}  # a secret from a column
    given: dict[str, Any] = {"key": "id", "inputs": inputs, "max_in_flight": 7, "on_failure": 0.5}
    given |= {"wait": pc.WaitPolicy(timeout=60), "output_type": pc.TokenUsage}
    stored = call(**given)["options"]
    assert json.loads(json.dumps(stored)) == stored
    assert BatchOptions(**stored) == BatchOptions(**given)


class Local(BaseModel):
    city: str


@pytest.mark.parametrize(
    "given",
    [
        {"crew": None},
        {"dataset": None},
        {"key": lambda row: row["id"]},
        {"inputs": lambda row: row},
        {"inputs": {"topic": lambda row: "x"}},
        {"inputs": {"price": Decimal("5.10")}},  # its text would be the name of a column
        {"output_type": create_model("Nested", __base__=Local, __qualname__="a.Nested")},
        {"webhooks": pc.Webhooks(crew="https://hooks.test/x")},
    ],
    ids=["crew", "data set", "key", "inputs", "input", "number", "type", "webhooks"],
)
def test_a_call_with_what_is_no_plain_value_is_not_stored(given: dict[str, Any]):
    assert call(**given) == {}
    assert call() != {}
