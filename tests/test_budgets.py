"""Budgets as values: what they limit, in which period, and under which name that is counted."""

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from prefect.types.names import WITHOUT_BANNED_CHARACTERS
from pydantic import ValidationError

from prefect_crew import Budget, DeployedCrew
from prefect_crew.blocks import crew_of
from prefect_crew.budgets import MOST, slots_of

AT = datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_cost": 0},
        {"max_cost": float("inf")},
        {"max_cost": MOST / 10_000 + 1},
        {"max_tokens": MOST + 1},
        {"max_kickoffs": -1},
        {"max_kickoffs": 1, "per": "week"},
        {"max_kickoffs": 1, "on_limit": "ignore"},
        {"max_kickoffs": 1, "name": ""},
        {"max_kickofs": 1, "max_tokens": 1},
    ],
    ids=str,
)
def test_what_limits_nothing_or_cannot_be_counted_is_refused(fields: dict[str, Any]):
    with pytest.raises(ValidationError):
        Budget(**fields)


@pytest.mark.parametrize(
    ("per", "counter", "resets_at"),
    [
        ("batch", "prefect-crew.budget.travel.batch.leads.kickoffs", None),
        ("day", "prefect-crew.budget.travel.2026-12-31.kickoffs", datetime(2027, 1, 1, tzinfo=UTC)),
        ("month", "prefect-crew.budget.travel.2026-12.kickoffs", datetime(2027, 1, 1, tzinfo=UTC)),
    ],
)
def test_a_period_has_a_counter_and_an_end(per: Any, counter: str, resets_at: datetime | None):
    (period,) = Budget(max_kickoffs=3, per=per).periods(name="travel", batch="leads", at=AT)
    assert period.counter == counter
    assert period.resets_at == resets_at
    assert slots_of(period.measure, period.limit) == 3


@pytest.mark.parametrize(
    ("amount", "slots"), [(0.07, 700), (0.1 + 0.2, 3000), (0.000001, 1), (0.12345, 1235), (0.0, 0)]
)
def test_costs_are_rounded_up(amount: float, slots: int):
    assert slots_of("cost", amount) == slots


def test_names_that_prefect_would_refuse_have_counters_of_their_own():
    names = ["a/b", "a%b", "a b", "a-b", "ä", "x" * 200, "x" * 201, "crew.example/path?q#f"]
    found = {Budget(max_cost=1, name=name).periods(name="", batch=name, at=AT)[0].counter for name in names}
    assert len(found) == len(names)
    assert all(re.fullmatch(WITHOUT_BANNED_CHARACTERS, name) and len(name) < 250 for name in found)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in found)


def test_a_block_keeps_them_and_a_crew_takes_more():
    block = DeployedCrew(url="https://c.test", token="t", budgets=({"max_cost": 1, "per": "day"},))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    assert block.budgets == [Budget(max_cost=1, per="day")]
    crew = crew_of(block).under([Budget(max_kickoffs=2), Budget(max_kickoffs=3, name="own")], name="flow", batch="b")
    assert [budget.name for budget in crew.budgets] == [None, "flow", "own"]
    assert crew.batch == "b"
