"""Spans and metrics of runs, as a collector gets them from the real SDK and exporter."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prefect import flow
from prefect.runtime import flow_run
from pydantic import SecretStr

import prefect_crew as pc
from prefect_crew.artifacts import telemetry
from prefect_crew.artifacts.run import RunView
from prefect_crew.prices import Price
from prefect_crew.records.model import RunRecord
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import run as run_module
from prefect_crew.runs.stop import close_stopped
from prefect_crew.testing import CrewServerFactory
from support.collector import Collector, SeenSpan
from support.prefect_server import PrefectServer
from support.records import new_record
from support.scripts import ASKS, script, slow
from support.servers import until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

QUICK = pc.WaitPolicy(initial=0.05, factor=1)
STEPS = script(
    {"name": "research", "agent": "Researcher", "seconds": 0.4, "output": "notes on {{ topic }}"},
    {"name": "write", "agent": "Writer", "seconds": 0.4, "output": "a page on {{ topic }}"},
    inputs=["topic"],
    usage={"total_tokens": 1200, "prompt_tokens": 1000, "completion_tokens": 200, "cached_prompt_tokens": 30},
)
PRICE = Price(per_run=0.5, per_1k_input=0.1, per_1k_output=0.4)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector, collector.traced():
        yield collector


@pytest.fixture(scope="module")
def reader() -> InMemoryMetricReader:
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader]))  # once a process, and nothing else looks at it
    return reader


def key() -> str:
    return f"traced {uuid.uuid4()}"


def one(collector: Collector) -> SeenSpan:
    (span,) = collector.runs()
    return span


# Spans


def test_a_run_is_a_span_with_its_crew_its_flow_run_its_tokens_and_its_cost(
    crew_server: CrewServerFactory, collector: Collector
):
    server, idempotency_key, ids = crew_server(STEPS, response_format="union"), key(), []
    crew = server.crew(price=PRICE)

    @flow
    async def trip(topic: str) -> None:
        from prefect.context import FlowRunContext

        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        ids.append(str(context.flow_run.id))
        await pc.arun_crew(crew, {"topic": topic}, idempotency_key=idempotency_key)

    asyncio.run(trip("tea"))
    span = one(collector)
    label = span.attributes["crewai.crew.name"]
    assert (span.name, span.scope, span.failed) == (f"invoke_workflow {label}", "prefect_crew", False)
    kickoff_id = server.runs[0].id
    record = asyncio.run(PrefectRecords().of_kickoff(kickoff_id))
    assert record is not None
    assert record.kicked_off_at is not None
    assert record.ended_at is not None
    assert span.start == pytest.approx(record.kicked_off_at.timestamp(), abs=1e-6)
    assert span.end == pytest.approx(record.ended_at.timestamp(), abs=1e-6)
    assert span.attributes.pop("crewai.crew.execution_duration_ms") > 0
    assert span.attributes.pop("prefect.task_run.id")
    assert span.attributes == {
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.workflow.name": label,
        "gen_ai.agent.name": label,
        "crewai.crew.name": label,
        "crewai.execution_uuid": kickoff_id,
        "server.address": "127.0.0.1",
        "gen_ai.usage.input_tokens": 1000,
        "gen_ai.usage.output_tokens": 200,
        "gen_ai.usage.cache_read.input_tokens": 30,
        "prefect_crew.total_tokens": 1200,
        "prefect_crew.cost": pytest.approx(0.68),
        "prefect_crew.state": "completed",
        "prefect_crew.idempotency_key": idempotency_key,
        "prefect_crew.attempt": 1,
        "prefect_crew.kickoff.flow_run_id": ids[0],
        "prefect.flow_run.id": ids[0],
    }
    assert collector.hides("a page on tea")


def test_its_tasks_are_children_in_their_order_with_the_times_that_were_seen(
    crew_server: CrewServerFactory, collector: Collector
):
    pc.run_crew(crew_server(STEPS, response_format="union").crew(), {"topic": "tea"})
    run = one(collector)
    research, write = collector.tasks(run)
    assert [research.name, write.name] == ["execute_task research", "execute_task write"]
    assert [span.attributes["crewai.agent.role"] for span in (research, write)] == ["Researcher", "Writer"]
    assert [span.attributes["gen_ai.agent.name"] for span in (research, write)] == ["Researcher", "Writer"]
    assert [span.attributes["prefect_crew.task.number"] for span in (research, write)] == [1, 2]
    assert {span.attributes["crewai.execution_uuid"] for span in (research, write)} == {
        run.attributes["crewai.execution_uuid"]
    }
    assert {span.attributes["prefect_crew.task.times"] for span in (research, write)} == {"seen"}
    assert run.start <= research.start < research.end == write.start < write.end == run.end


def test_a_task_that_was_not_seen_at_work_has_no_times(crew_server: CrewServerFactory, collector: Collector):
    server = crew_server(STEPS, response_format="union", speed=100)
    run = server.crew().trigger({"topic": "tea"})
    until(lambda: server.runs[0].state.ended)
    run.wait_for_completion()
    span = one(collector)
    assert [task.attributes["prefect_crew.task.times"] for task in collector.tasks(span)] == ["unknown", "unknown"]
    assert all(task.start == task.end == span.end for task in collector.tasks(span))


def test_it_stands_within_prefects_own_span_of_the_wait(crew_server: CrewServerFactory, collector: Collector):
    crew = crew_server("echo", speed=100).crew()

    @flow
    async def trip() -> None:
        await pc.arun_crew(crew, {"text": "a"})

    asyncio.run(trip())
    run = one(collector)
    around = next(span for span in collector.all() if span.id == run.parent)
    assert (around.scope, around.attributes["prefect.run.type"]) == ("prefect", "task")
    assert around.attributes["prefect.run.id"] == run.attributes["prefect.task_run.id"]


def test_a_run_that_failed_says_why_and_in_which_tasks_it_was_seen(
    crew_server: CrewServerFactory, collector: Collector
):
    broken = script({"name": "look", "seconds": 0.3}, {"name": "fetch", "seconds": 0.3, "fail": "the site is down"})
    with pytest.raises(pc.CrewFailedError):
        pc.run_crew(crew_server(broken, response_format="union").crew(), {})
    span = one(collector)
    assert (span.failed, span.message, span.attributes["error.type"]) == (True, "the site is down", "failed")
    assert [task.name for task in collector.tasks(span)] == ["execute_task look", "execute_task fetch"]


def test_a_later_call_that_finds_the_run_writes_no_second_span(crew_server: CrewServerFactory, collector: Collector):
    crew, idempotency_key = crew_server("echo", speed=100).crew(), key()
    ids = {pc.run_crew(crew, {"text": "a"}, idempotency_key=idempotency_key).kickoff_id for _ in range(3)}
    assert {one(collector).attributes["crewai.execution_uuid"]} == ids


@pytest.mark.parametrize("early", ["the owner", "the other", "neither"])
async def test_a_run_that_two_wait_for_has_one_span(
    crew_server: CrewServerFactory, collector: Collector, early: str, monkeypatch: pytest.MonkeyPatch
):
    if early != "neither":
        monkeypatch.setattr("prefect_crew.runs.polling.fast_intervals", [])  # else both look at the same moment
    crew, idempotency_key = crew_server(slow(0.5)).crew(), key()
    quick, late = pc.WaitPolicy(initial=0.1, factor=1), pc.WaitPolicy(initial=2, factor=1, jitter=0)

    def wait(who: str) -> Any:
        policy = quick if early in (who, "neither") else late
        return pc.arun_crew(crew, {}, idempotency_key=idempotency_key, wait=policy)

    owner = asyncio.ensure_future(wait("the owner"))
    await asyncio.sleep(0.3)
    first, second = await asyncio.gather(owner, wait("the other"))
    assert first.kickoff_id == second.kickoff_id
    assert one(collector).attributes["crewai.execution_uuid"] == first.kickoff_id


async def test_a_run_that_somebody_stops_has_one_span(crew_server: CrewServerFactory, collector: Collector):
    crew = crew_server(slow(60), response_format="union").crew()
    run = await crew.atrigger({})
    waiting = asyncio.ensure_future(run.await_for_completion(wait=QUICK))
    await asyncio.sleep(0.5)
    await pc.stop_crew(crew, run.kickoff_id)
    with pytest.raises(pc.CrewStoppedError):
        await waiting
    span = one(collector)
    assert (span.failed, span.attributes["error.type"]) == (True, "stopped")


class SlowRecords(PrefectRecords):
    """Is held up at one of its steps until somebody else has stopped the run."""

    def __init__(self, at: str) -> None:
        self.at, self.held, self.go_on = at, asyncio.Event(), asyncio.Event()

    async def _hold(self, step: str) -> None:
        if step == self.at:
            self.held.set()
            await self.go_on.wait()

    async def end(self, record: RunRecord, **end: Any) -> bool:
        await self._hold("before it is written")
        is_first = await super().end(record, **end)
        await self._hold("after it is written")
        return is_first


@pytest.mark.parametrize("at", ["before it is written", "after it is written"])
async def test_a_run_that_two_stop_at_the_same_time_has_one_span(
    crew_server: CrewServerFactory, collector: Collector, at: str
):
    crew = crew_server(slow(60), response_format="union").crew()
    run = await crew.atrigger({})
    records, slow_records = PrefectRecords(), SlowRecords(at)
    first, second = [await records.of_kickoff(run.kickoff_id) for _ in range(2)]
    assert first is not None
    assert second is not None
    async with crew.client() as client:
        answer = await client.stop(run.kickoff_id)
        late = asyncio.ensure_future(close_stopped(client, crew.crew, first, answer, slow_records))
        await slow_records.held.wait()
        await close_stopped(client, crew.crew, second, answer, records)
        slow_records.go_on.set()
        await late
    assert one(collector).attributes["prefect_crew.state"] == "stopped"


async def test_a_run_that_ran_out_of_time_and_was_stopped_has_one_span(
    crew_server: CrewServerFactory, collector: Collector
):
    run = await crew_server(slow(60), response_format="union").crew().atrigger({})
    with pytest.raises(pc.CrewTimeoutError):
        await run.await_for_completion(wait=pc.WaitPolicy(initial=0.05, timeout=0.3, on_timeout="stop"))
    assert one(collector).attributes["prefect_crew.state"] == "stopped"


async def test_a_run_that_was_lost_has_a_span_of_the_wait_that_found_it_so(
    crew_server: CrewServerFactory, collector: Collector
):
    run = await crew_server(slow(60), faults=["status:forgotten@3"]).crew().atrigger({})
    with pytest.raises(pc.CrewLostError):
        await run.await_for_completion()
    span = one(collector)
    assert (span.failed, span.attributes["prefect_crew.state"]) == (True, "unknown")


def test_a_run_that_another_flow_run_takes_over_names_both(crew_server: CrewServerFactory, collector: Collector):
    crew, idempotency_key, ids = crew_server("echo").crew(), key(), []

    @flow
    async def begin() -> None:
        ids.append(str(flow_run.get_id()))
        await pc.kickoff_crew(crew, {"text": "a"}, idempotency_key=idempotency_key)

    @flow
    async def finish() -> None:
        ids.append(str(flow_run.get_id()))
        await pc.arun_crew(crew, {"text": "a"}, idempotency_key=idempotency_key)

    asyncio.run(begin())
    asyncio.run(finish())
    attributes = one(collector).attributes
    assert [attributes["prefect_crew.kickoff.flow_run_id"], attributes["prefect.flow_run.id"]] == ids


def test_each_row_of_a_batch_has_its_span(crew_server: CrewServerFactory, collector: Collector, tmp_path: Path):
    server = crew_server(STEPS, response_format="union", speed=20)
    rows = [{"topic": f"tea {number}"} for number in range(5)]
    pc.run_batch(server.crew(price=PRICE), rows, name=key(), export=str(tmp_path / "out.jsonl"))
    spans = collector.runs()
    assert {span.attributes["crewai.execution_uuid"] for span in spans} == {run.id for run in server.runs}
    assert len(spans) == 5
    assert [span.attributes["prefect_crew.cost"] for span in spans] == [pytest.approx(0.68)] * 5
    assert all(len(collector.tasks(span)) == 2 for span in spans)
    assert collector.hides("tea 3")


# What may stand on them

SECRETS = script(
    {
        "name": "log in as {{ user }}",
        "agent": "{{ password }}",
        "seconds": 0.3,
        "output": "{{ password }} for {{ user }}",
    },
    inputs=["user", "password"],
)


@pytest.fixture
def _content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_TRACE_CONTENT", "true")


@pytest.mark.usefixtures("_content")
def test_content_stands_on_the_spans_where_that_is_wanted(crew_server: CrewServerFactory, collector: Collector):
    pc.run_crew(crew_server(STEPS, response_format="union").crew(), {"topic": "tea"})
    run = one(collector)
    (asked,), (answered,) = (json.loads(run.attributes[f"gen_ai.{way}.messages"]) for way in ("input", "output"))
    assert (asked["role"], json.loads(asked["parts"][0]["content"])) == ("user", {"topic": "tea"})
    assert answered == {
        "role": "assistant", "parts": [{"type": "text", "content": "a page on tea"}], "finish_reason": "stop",
    }  # fmt: skip
    assert [task.attributes["crewai.task.output"] for task in collector.tasks(run)] == ["notes on tea", "a page on tea"]


@pytest.mark.usefixtures("_content")
@pytest.mark.parametrize("given", [{"password": "hunter22-secret"}, {"password": SecretStr("hunter22-secret")}])
def test_secrets_stand_on_no_span_with_content_on(
    crew_server: CrewServerFactory, collector: Collector, given: dict[str, Any]
):
    server = crew_server(SECRETS, response_format="union")
    secret = [] if isinstance(given["password"], SecretStr) else ["password"]
    pc.run_crew(server.crew(secret_inputs=secret), {"user": "ada", **given})
    span = one(collector)
    assert "ada" in span.attributes["gen_ai.input.messages"]
    assert "******** for ada" in span.attributes["gen_ai.output.messages"]
    assert [task.attributes["crewai.task.output"] for task in collector.tasks(span)] == ["******** for ada"]
    assert collector.hides("hunter22")
    assert collector.hides(server.token)


@pytest.mark.usefixtures("_content")
def test_of_a_run_whose_secrets_are_not_known_here_no_text_is_shown(
    crew_server: CrewServerFactory, collector: Collector, monkeypatch: pytest.MonkeyPatch
):
    server = crew_server(SECRETS, response_format="union")
    run = server.crew(secret_inputs=["password"]).trigger({"user": "ada", "password": "hunter22-secret"})
    monkeypatch.setattr(run_module, "_kicked_off", {})  # as in another process
    asyncio.run(_waited(server.crew(secret_inputs=["password"]), str(run.kickoff_id)))
    assert one(collector).attributes["prefect_crew.state"] == "completed"
    assert collector.tasks(one(collector)) == []
    assert collector.hides("hunter22")


async def _waited(crew: pc.DeployedCrew, kickoff_id: str) -> None:
    await pc.wait_for_crew(crew, kickoff_id, wait=QUICK)


@pytest.mark.usefixtures("_content")
@pytest.mark.parametrize(("show", "tasks"), [("summary", 1), ("none", 0)])
def test_what_a_crew_does_not_show_stands_on_no_span(
    crew_server: CrewServerFactory, collector: Collector, show: str, tasks: int
):
    server = crew_server(script({"name": "fetch", "seconds": 0.3, "fail": "no answer from tea.test"}, inputs=["topic"]))
    with pytest.raises(pc.CrewFailedError):
        pc.run_crew(server.crew(show=show), {"topic": "oolong"})
    assert len(collector.tasks(one(collector))) == tasks
    assert one(collector).message == ("" if show == "none" else "no answer from tea.test")
    assert collector.hides("oolong")


# Without an SDK


def test_without_an_sdk_nothing_is_made_of_a_run():
    def view() -> RunView:
        raise AssertionError("nobody has asked for it")

    assert not telemetry.is_tracing()
    telemetry.end_run(new_record(), view)


# Metrics


def points(reader: InMemoryMetricReader, crew: str) -> dict[str, Any]:
    """Return the metrics of one crew: by name and what tells its points apart."""
    found: dict[str, Any] = {}
    data = reader.get_metrics_data()
    for group in data.resource_metrics if data else ():
        for metric in (one for scope in group.scope_metrics for one in scope.metrics):
            for point in metric.data.data_points:
                labels = dict(point.attributes or {})
                if labels.pop("crewai.crew.name") == crew:
                    name = " ".join([metric.name.removeprefix("prefect_crew."), *map(str, labels.values())])
                    found[name] = getattr(point, "value", None) if hasattr(point, "value") else point.count
    return found


def test_runs_are_counted_with_their_time_their_tokens_and_their_cost(
    crew_server: CrewServerFactory, reader: InMemoryMetricReader
):
    server = crew_server(STEPS, response_format="union", speed=50)
    for _ in range(2):
        pc.run_crew(server.crew(price=PRICE), {"topic": "tea"})
    assert points(reader, f"127.0.0.1:{server.port}") == {
        "runs completed": 2,
        "run.duration completed": 2,
        "tokens input": 2000,
        "tokens output": 400,
        "cost": pytest.approx(1.36),
    }


def test_a_kickoff_that_became_uncertain_is_counted_once(crew_server: CrewServerFactory, reader: InMemoryMetricReader):
    server, idempotency_key = crew_server("echo", faults=["kickoff:500@1"]), key()
    for _ in range(2):
        with pytest.raises(pc.KickoffUncertainError):
            pc.run_crew(server.crew(), {"text": "a"}, idempotency_key=idempotency_key)
    assert points(reader, f"127.0.0.1:{server.port}") == {"kickoffs.uncertain": 1}


async def test_a_run_counts_as_waiting_while_it_waits_for_a_person(
    crew_server: CrewServerFactory, reader: InMemoryMetricReader
):
    server = crew_server(ASKS, response_format="union")
    run, name = await server.crew().atrigger({}), f"127.0.0.1:{server.port}"
    waiting = asyncio.ensure_future(run.await_for_completion(wait=QUICK))
    while points(reader, name).get("runs.waiting") != 1:
        await asyncio.sleep(0.05)
    await run.aresume("fine", approve=True)
    await waiting
    assert points(reader, name)["runs.waiting"] == 0
    again = await server.crew().atrigger({})
    with pytest.raises(pc.CrewTimeoutError):
        await again.await_for_completion(wait=pc.WaitPolicy(initial=0.1, factor=1, human_timeout=0.5))
    assert points(reader, name)["runs.waiting"] == 0, "nobody waits here any more"


# A program


PAGE = Path(__file__).parents[2] / "docs" / "guides" / "traces.md"


@pytest.mark.programs
def test_the_program_of_the_guide_exports_spans_and_metrics(crew_server: CrewServerFactory, prefect_api: PrefectServer):
    server = crew_server("echo", speed=100)
    with Collector() as collector:
        env = {"PREFECT_API_URL": prefect_api.api_url, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        program = PAGE.read_text().partition("```python\n")[2].partition("```")[0]
        assert 'run_crew("travel", trip)' in program
        ours = f"run_crew(DeployedCrew(url={server.url!r}, token={server.token!r}), {{'text': 'a'}})"
        program = program.replace('run_crew("travel", trip)', "from prefect_crew import DeployedCrew\n" + ours)
        subprocess.run([sys.executable, "-c", program], env={**os.environ, **env}, check=True, timeout=60)
    assert one(collector).attributes["crewai.execution_uuid"] == server.runs[0].id
    counted = {name: value for name, _, value in collector.points}
    assert counted["prefect_crew.runs"] == 1
    count, seconds = counted["prefect_crew.run.duration"]
    assert count == 1
    assert 0 < seconds < 30
