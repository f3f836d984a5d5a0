"""Budgets: what they limit, when a start is refused, and what a refusal says."""

import asyncio
import logging
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
from prefect import flow
from pydantic import ValidationError

import prefect_crew as pc
from prefect_crew import Budget, DeployedCrew
from prefect_crew.blocks import crew_of
from prefect_crew.budgets import MOST
from prefect_crew.testing import CrewServerFactory
from support.seen import Seen


@pytest.fixture
def name() -> str:
    return f"budget-{uuid.uuid4().hex[:8]}"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_cost": 0},
        {"max_cost": float("inf")},
        {"max_cost": MOST + 1},
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


def test_a_block_keeps_them_and_a_crew_takes_more():
    block = DeployedCrew(url="https://c.test", token="t", budgets=({"max_cost": 1, "per": "day"},))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    assert block.budgets == [Budget(max_cost=1, per="day")]
    crew = crew_of(block).under([Budget(max_kickoffs=2), Budget(max_kickoffs=3, name="own")], name="flow", batch="b")
    assert [budget.name for budget in crew.budgets] == [None, "flow", "own"]
    assert crew.batch == "b"


@pytest.mark.usefixtures("prefect_api", "instant_polling")
def test_a_start_beyond_the_budget_is_refused(crew_server: CrewServerFactory, name: str, seen: Seen):
    server = crew_server("echo")

    def run(text: str, per: Any = "day", most: int = 2) -> str:
        crew = server.crew(budgets=[Budget(max_kickoffs=most, per=per, name=name)])
        return pc.run_crew(crew, {"text": text}, idempotency_key=f"{name}-{text}").output

    assert [run(text) for text in "aba"] == ["a", "b", "a"], "a run that is found does not count"
    now = datetime.now(UTC)
    for per in ("day", "month", "day"):
        with pytest.raises(pc.BudgetExceededError, match="no room for another run") as raised:
            run("c", per)
        error = raised.value
        facts = {"budget": name, "measure": "kickoffs", "used": 2, "limit": 2, "estimate": 1}
        assert {fact: getattr(error, fact) for fact in facts} == facts
        assert error.resets_at is not None
        assert f"{error.resets_at:%Y-%m-%d %H:%M} UTC" in str(error)
        assert 0 < (error.resets_at - now).total_seconds() <= (31 if per == "month" else 1) * 86_400 + 1
        assert error.resets_at.day == 1 or per == "day"
    (event,) = seen.events(error.counter, "budget")
    assert event["event"] == "prefect-crew.budget.exceeded"
    assert event["payload"] | facts == event["payload"]
    assert run("c", most=3) == "c", "a refusal uses nothing up"
    assert server.kickoffs == 3


@pytest.mark.usefixtures("prefect_api", "instant_polling")
def test_budgets_of_flow_pipeline_and_block_all_hold(crew_server: CrewServerFactory, name: str):
    server = crew_server("echo")
    crew = server.crew(budgets=[Budget(max_kickoffs=4, per="day", name=name)])

    @flow(name=f"flow-{name}")
    def each() -> None:
        for text in "ab":
            pc.run_crew(crew, {"text": text}, budgets=[Budget(max_kickoffs=1)])

    for _ in range(2):  # a flow run has sums of its own
        with pytest.raises(pc.BudgetExceededError, match=f"Budget 'flow-{name}' .*Raise max_kickoffs"):
            each()
    steps = [pc.CrewStep(step, crew, {"text": step}) for step in "abc"]
    with pytest.raises(pc.PipelineFailedError) as raised:
        pc.run_pipeline(steps, name=f"pipe-{name}", budgets=[Budget(max_kickoffs=1)])
    assert [getattr(error, "budget", None) for error in raised.value.errors.values()] == [f"pipe-{name}"] * 2
    pc.run_crew(crew, {"text": "the fourth"})
    with pytest.raises(pc.BudgetExceededError, match=f"Budget '{name}'"):
        pc.run_crew(crew, {"text": "the fifth"})
    assert server.kickoffs == 4


@pytest.mark.usefixtures("prefect_api", "instant_polling")
async def test_a_budget_that_warns_is_told_once_in_a_flow_run(
    crew_server: CrewServerFactory, name: str, caplog: pytest.LogCaptureFixture
):
    limits: Any = ((5, "refuse"), (3, "refuse"), (1, "warn"), (4, "refuse"))
    budgets = [Budget(max_kickoffs=most, per="day", name=name, on_limit=how) for most, how in limits]
    crew = crew_server("echo").crew(budgets=budgets)

    @flow
    async def all_of() -> None:
        await asyncio.gather(*(pc.arun_crew(crew, {"text": text}) for text in "abc"))

    with caplog.at_level(logging.WARNING):
        await all_of()
    assert caplog.text.count(f"Budget {name!r} has no room") == caplog.text.count("starts anyway") == 1
    with pytest.raises(pc.BudgetExceededError, match="3 of 3 kickoffs"):
        await pc.arun_crew(crew, {"text": "d"})


@pytest.mark.usefixtures("prefect_api", "instant_polling")
@pytest.mark.parametrize("budget", [{"max_tokens": 5000}, {"max_cost": 5}], ids=str)
async def test_a_budget_without_an_estimate_is_refused(crew_server: CrewServerFactory, name: str, budget: Any):
    server = crew_server("echo")
    with pytest.raises(pc.ConfigurationError, match=rf"Budget '{name}' .* estimate_(tokens|cost)=…"):
        await pc.arun_crew(server.crew(budgets=[Budget(name=name, **budget)]), {"text": "a"})
    assert not server.kickoffs
    await pc.arun_crew(server.crew(budgets=[Budget(name=name, max_cost=5)], price=0.2), {"text": "a"})
