"""What runs cost by crew, day, flow and batch; and that the totals are those that the crew's server counted."""

import json
import uuid
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from prefect_crew import CrewFailedError, Price, aget_result, arun_crew
from prefect_crew._internal.clock import utcnow
from prefect_crew.artifacts.run import artifact_key
from prefect_crew.client.models import TokenUsage
from prefect_crew.costs import grouped, read_costs
from prefect_crew.devserver import CrewScript
from prefect_crew.devserver._runs import Outcome, Run
from prefect_crew.devserver._scripts import ScriptedProgram
from prefect_crew.prices import Spending, money
from prefect_crew.runs.database import in_store
from prefect_crew.store.attempts import of_key
from prefect_crew.store.spending import CostLine
from prefect_crew.testing import CrewServerFactory
from support.deployed import load_flow
from support.prefect_server import PrefectServer

TOKENS = Price(per_1k_input=2, per_1k_output=10)
ASKING = {
    "name": "asking",
    "inputs": ["text"],
    "tasks": [{"name": "answer", "output": "{{ text }}", "fail": "{{ 'no' if text == 'bad' }}"}],
    "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100},
}


def line(runs: int = 1, tokens: int | None = None, cost: float | None = None) -> CostLine:
    known = {"runs_with_tokens": int(tokens is not None), "runs_with_cost": int(cost is not None)}
    return CostLine(group=None, runs=runs, tokens=tokens or 0, cost=cost or 0.0, **known)


def test_lines_are_added_up_and_what_is_unknown_stays_so():
    crews = grouped([("travel", line(2, 10, 0.5)), ("news", line(1, 5, 2.0)), ("travel", line(1))], "crew")
    assert list(crews) == ["news", "travel"], "the dearest first"
    assert crews["travel"] == Spending(3, 1, 1, TokenUsage(total_tokens=10), 0.5)
    assert crews["travel"].unknown == "2 of 3 runs reported no tokens; the cost of 2 of 3 runs is unknown"
    assert list(grouped([("2001-05-02", line()), ("2001-05-01", line())], "day")) == ["2001-05-01", "2001-05-02"]
    assert {name: one.runs for name, one in grouped([("leads", line()), (None, line(2))], "batch").items()} == {
        "leads": 1,
        "no batch": 2,
    }
    assert Spending.sum([]) == Spending(), "None, and not zero"


@pytest.mark.parametrize(
    ("cost", "shown"),
    [(None, "–"), (0.0, "0.00"), (0.25, "0.250"), (1.005, "1.00"), (1234.5, "1,234.50"), (0.0000123, "0.0000123")],
)
def test_a_cost_is_rounded_only_when_it_is_shown(cost: float | None, shown: str):
    assert money(cost) == shown


@pytest.fixture
def batch(prefect_api: PrefectServer, tmp_path: Path) -> Any:
    """Run a batch in this test's folder."""
    from support.batches import Batches

    return Batches(tmp_path)


async def test_a_runs_cost_is_in_result_record_artifact(prefect_api: PrefectServer, crew_server: CrewServerFactory):
    crew = crew_server(CrewScript.model_validate(ASKING), response_format="live").crew(price=TOKENS)
    name = f"costs {uuid.uuid4()}"
    result = await arun_crew(crew, {"text": "tea"}, idempotency_key=name)
    assert result.cost == pytest.approx(3.0)
    again = await arun_crew(crew, {"text": "tea"}, idempotency_key=name)
    read = await aget_result(name)
    assert (again.cost, again.usage) == (read.cost, read.usage) == (result.cost, result.usage)
    assert result.idempotency_key == again.idempotency_key == read.idempotency_key == name
    (kept,) = await in_store(of_key, name)
    assert result.usage is not None
    assert (kept.cost, kept.tokens) == (result.cost, result.usage.total_tokens)
    async with get_client() as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(like_=f"{artifact_key(crew.label)}%"))
        pages = [str(one.data) for one in await client.read_artifacts(artifact_filter=wanted)]
    assert any(result.kickoff_id in page and "| Cost | 3.00 |" in page and "1,100" in page for page in pages)
    with pytest.raises(CrewFailedError):
        await arun_crew(crew, {"text": "bad"}, idempotency_key=f"{name} failed")
    (failed,) = await in_store(of_key, f"{name} failed")
    assert (failed.cost, failed.tokens) == (kept.cost, kept.tokens)


class Counting(ScriptedProgram):
    """Reports other tokens for each row, and none for each tenth."""

    async def execute(self, run: Run) -> Outcome:
        number = int(run.inputs["text"])
        usage = TokenUsage(prompt_tokens=number, completion_tokens=7, total_tokens=number + 7)
        return replace(await super().execute(run), usage=None if number % 10 == 0 else usage)


async def test_the_totals_of_a_batch_are_what_the_server_counted(batch: Any, crew_server: CrewServerFactory):
    server = crew_server(Counting(CrewScript.model_validate(ASKING), speed=float("inf")), response_format="live")
    name = f"counted {uuid.uuid4()}"
    report = await batch(server.crew(price=TOKENS), [{"text": n} for n in range(200)], name=name)
    usages = [run.usage for run in server.runs]
    assert len(usages) == report.completed == 200
    told = [usage for usage in usages if usage is not None]
    prompt, completion = sum(one.prompt_tokens or 0 for one in told), sum(one.completion_tokens or 0 for one in told)
    counted = TokenUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
    assert report.usage == TokenUsage(total_tokens=counted.total_tokens)
    assert report.cost == pytest.approx((2 * prompt + 10 * completion) / 1000)
    assert report.spending.runs == 200
    assert report.spending.reported == 180
    assert report.spending.priced == 180
    assert "20 of 200 runs reported no tokens" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["spending"]["usage"]["total_tokens"] == counted.total_tokens
    for by, group in (("batch", name), ("flow", "run-batch")):
        sums = (await read_costs(by, since=utcnow().date() - timedelta(days=1))).groups[group]  # pyright: ignore[reportArgumentType]
        assert sums.tokens == counted.total_tokens
        assert sums.cost == pytest.approx(report.cost)


async def test_a_flow_keeps_the_page(prefect_api: PrefectServer, crew_server: CrewServerFactory):
    crew = crew_server(CrewScript.model_validate(ASKING), response_format="live").crew(price=TOKENS)

    @flow
    async def once() -> None:
        await arun_crew(crew, {"text": "tea"})

    await once()
    summary = await load_flow("costs_page.py:costs_page")(days=2)
    assert "tokens, cost" in summary
    async with get_client() as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=["crew-costs-by-crew", "crew-costs-by-day"]))
        tables = [json.loads(str(page.data)) for page in await client.read_artifacts(artifact_filter=wanted)]
    assert {str(utcnow().date()), crew.label} <= {row.get("day", row.get("crew")) for table in tables for row in table}
