"""Spans and metrics of runs, by the real SDK."""

import asyncio
import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import metrics, trace
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from opentelemetry.util._once import Once
from prefect import flow
from prefect.runtime import flow_run
from pydantic import SecretStr

import prefect_crew as pc
from prefect_crew.artifacts import telemetry
from prefect_crew.artifacts.run import RunView
from prefect_crew.crew import known_version
from prefect_crew.devserver._scripts import load_program
from prefect_crew.prices import Price
from prefect_crew.runs import run as run_module
from prefect_crew.testing import CrewServerFactory
from support.prefect_server import PrefectServer
from support.receiver import Listener
from support.records import key, new_record, record_of
from support.scripts import ASKS, script, slow
from support.waiting import until, wait_until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

QUICK = pc.WaitPolicy(initial=0.05, factor=1)
STEPS = script(
    {"name": "research", "agent": "Researcher", "seconds": 0.4, "output": "notes on {{ topic }}"},
    {"name": "write", "agent": "Writer", "seconds": 0.4, "output": "a page on {{ topic }}"},
    inputs=["topic"],
    usage={"total_tokens": 1200, "prompt_tokens": 1000, "completion_tokens": 200, "cached_prompt_tokens": 30},
)
GOLDEN = Path(__file__).parents[1] / "golden"
PRICE = Price(per_run=0.5, per_1k_input=0.25, per_1k_output=1.25)


class Spans(InMemorySpanExporter):
    """The spans that have ended, in the order of their starts."""

    def all(self) -> list[Any]:
        number = "prefect_crew.task.number"
        return sorted(self.get_finished_spans(), key=lambda span: (span.start_time, facts(span).get(number, 0)))

    def run(self) -> Any:
        """Return the span of the only run."""
        (run,) = self.runs()
        return run

    def runs(self) -> list[Any]:
        return [span for span in self.all() if facts(span).get("gen_ai.operation.name") == "invoke_workflow"]

    def tasks(self, run: Any) -> list[Any]:
        return [span for span in self.all() if span.parent and span.parent.span_id == run.context.span_id]

    def hides(self, text: str) -> bool:
        """Return whether a text stands on no span."""
        return all(text not in span.to_json() for span in self.all())


def facts(span: Any) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.fixture
def spans() -> Iterator[Spans]:
    """The SDK is set up in this process, as a user's program does; nothing of it is left afterwards."""
    spans, provider = Spans(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    yield spans
    provider.shutdown()
    # A program sets it once: the API has no way back, and its own tests do this.
    trace._TRACER_PROVIDER, trace._TRACER_PROVIDER_SET_ONCE = None, Once()


@pytest.fixture(scope="module")
def reader() -> InMemoryMetricReader:
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader]))  # once a process, and nothing else looks at it
    return reader


# Spans


def text_of(spans: Iterable[Any], names: Mapping[str, str]) -> str:
    """Return spans with their attributes, and names for the values that differ from one run to the next."""
    lines = list[str]()
    for span in spans:
        lines += [span.name, *(f"  {name}: {value!r}" for name, value in sorted(facts(span).items()))]
    text = "\n".join([*lines, ""])
    for name, value in names.items():
        text = text.replace(value, name)
    return re.sub(r"(_ms: |_time: )(?=.*[1-9])[\d.]+", r"\1TIME", text)


def test_a_run_and_its_tasks_are_golden_spans(
    crew_server: CrewServerFactory, spans: Spans, reader: InMemoryMetricReader
):
    server, idempotency_key, ids = crew_server(STEPS, response_format="live"), key(), list[str]()

    @flow
    async def trip(topic: str) -> None:
        ids.append(str(flow_run.id))
        await pc.arun_crew(server.crew(price=PRICE), {"topic": topic}, idempotency_key=idempotency_key)

    asyncio.run(trip("tea"))
    run = spans.run()
    research, write = spans.tasks(run)
    record = asyncio.run(record_of(server.runs[0].id))
    (around,) = [span for span in spans.all() if span.context.span_id == run.parent.span_id]
    assert facts(around)["prefect.run.type"] == "task", "Prefect's own span of the wait"
    names = {"CREW": record.crew, "RUN ID": server.runs[0].id, "VERSION": str(record.crew_version)}
    names |= {"KEY": idempotency_key, "FLOW RUN": ids[0], "TASK RUN": facts(around)["prefect.run.id"]}
    assert text_of([run, research, write], names) == (GOLDEN / "spans.txt").read_text()
    assert spans.hides("a page on tea")
    assert run.instrumentation_scope.name == "prefect_crew"
    assert run.status.status_code is not StatusCode.ERROR
    assert record.kicked_off_at is not None
    assert record.ended_at is not None
    assert run.start_time == pytest.approx(record.kicked_off_at.timestamp() * 1e9, abs=1e3)
    assert run.end_time == pytest.approx(record.ended_at.timestamp() * 1e9, abs=1e3)
    assert run.start_time <= research.start_time < write.start_time
    assert research.end_time == write.start_time
    assert write.end_time == run.end_time
    assert points(reader, record.crew) == {
        "runs completed": 1,
        "run.duration completed": 1,
        "tokens input": 1000,
        "tokens output": 200,
        "cost": pytest.approx(1.0),
    }


def test_record_and_span_have_the_version_of_the_crew(
    crew_server: CrewServerFactory, spans: Spans, monkeypatch: pytest.MonkeyPatch
):
    server = crew_server(slow(1.5, "one"))
    results = [pc.run_crew(server.crew(), {}) for _ in range(2)]
    assert server.requests["inspect"] == 1, "the process has read it"
    monkeypatch.setattr("prefect_crew.crew.VERSION_AGE", 0)
    server.crews[""].program = load_program(slow(1.5, "two"))
    results.append(pc.run_crew(server.crew(), {}))
    first, again, changed = [asyncio.run(record_of(result.kickoff_id)).crew_version for result in results]
    assert first == again is not None
    assert first != changed == known_version(server.url, since=datetime.min.replace(tzinfo=UTC))
    assert [facts(span)["gen_ai.agent.version"] for span in spans.runs()] == [first, again, changed]


def test_a_task_that_was_not_seen_has_no_times(crew_server: CrewServerFactory, spans: Spans):
    server = crew_server(STEPS, speed=100)
    run = server.crew().trigger({"topic": "tea"})
    wait_until(lambda: server.runs[0].state.ended)
    run.wait_for_completion()
    span = spans.run()
    tasks = spans.tasks(span)
    assert [facts(task)["prefect_crew.task.times"] for task in tasks] == ["unknown", "unknown"]
    assert all(task.start_time == task.end_time == span.end_time for task in tasks)


def test_a_failed_run_says_why_and_in_which_tasks(crew_server: CrewServerFactory, spans: Spans):
    broken = script({"name": "look", "seconds": 0.5}, {"name": "fetch", "seconds": 1.0, "fail": "the site is down"})
    with pytest.raises(pc.CrewFailedError):
        pc.run_crew(crew_server(broken).crew(), {})
    span = spans.run()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "the site is down"
    assert facts(span)["error.type"] == "failed"
    assert [task.name for task in spans.tasks(span)] == ["execute_task look", "execute_task fetch"]


@pytest.mark.parametrize(
    ("state", "faults", "wait", "error"),
    [
        ("stopped", [], pc.WaitPolicy(initial=0.05, timeout=0.3, on_timeout="stop"), pc.CrewTimeoutError),
        ("unknown", ["status:forgotten@3"], pc.WaitPolicy(lost_after=0.5), pc.CrewLostError),
    ],
    ids=["stopped", "unknown"],
)
async def test_a_run_without_an_end_has_one_span(
    crew_server: CrewServerFactory, spans: Spans, state: str, faults: list[str], wait: Any, error: type[Exception]
):
    run = await crew_server(slow(60), faults=faults).crew().atrigger({})
    with pytest.raises(error):
        await run.await_for_completion(wait=wait)
    assert spans.run().status.status_code is StatusCode.ERROR
    assert facts(spans.run())["prefect_crew.state"] == state


async def test_a_run_that_several_wait_for_has_one_span(crew_server: CrewServerFactory, spans: Spans):
    crew, idempotency_key = crew_server(slow(1.5)).crew(), key()

    async def wait() -> str:
        return (await pc.arun_crew(crew, {}, idempotency_key=idempotency_key)).kickoff_id

    ids = [*await asyncio.gather(wait(), wait()), await wait()]
    assert {*ids} == {facts(spans.run())["crewai.execution_uuid"]}


async def test_a_run_that_somebody_stops_has_one_span(crew_server: CrewServerFactory, spans: Spans):
    server = crew_server(slow(60), response_format="live")
    run = await server.crew().atrigger({})
    waiting = asyncio.ensure_future(run.await_for_completion(wait=QUICK))
    await until(lambda: server.requests["status"])
    await pc.stop_crew(server.crew(), run.kickoff_id)
    with pytest.raises(pc.CrewStoppedError):
        await waiting
    assert facts(spans.run())["error.type"] == "stopped"


def test_a_run_that_is_taken_over_names_both_flow_runs(crew_server: CrewServerFactory, spans: Spans):
    crew, idempotency_key, ids = crew_server("echo").crew(), key(), list[str]()

    @flow
    async def trip(call: Any) -> None:
        ids.append(str(flow_run.id))
        await call(crew, {"text": "a"}, idempotency_key=idempotency_key)

    for call in (pc.kickoff_crew, pc.arun_crew):
        asyncio.run(trip.with_options(validate_parameters=False)(call))
    attributes = facts(spans.run())
    assert [attributes["prefect_crew.kickoff.flow_run_id"], attributes["prefect.flow_run.id"]] == ids


def test_each_row_of_a_batch_has_its_span(crew_server: CrewServerFactory, spans: Spans, tmp_path: Path):
    server = crew_server(STEPS, response_format="live", speed=20)
    rows = [{"topic": f"tea {number}"} for number in range(5)]
    pc.run_batch(server.crew(price=PRICE), rows, name=key(), export=str(tmp_path / "out.jsonl"))
    runs = spans.runs()
    assert {facts(span)["crewai.execution_uuid"] for span in runs} == {run.id for run in server.runs}
    assert [facts(span)["prefect_crew.cost"] for span in runs] == [pytest.approx(1.0)] * 5
    assert [len(spans.tasks(span)) for span in runs] == [2] * 5
    assert spans.hides("tea 3")


# What may stand on them

LOG_IN = {
    "name": "log in as {{ user }}",
    "agent": "{{ password }}",
    "output": "{{ password }}, {{ pin }} for {{ user }}",
}
SECRETS = script({**LOG_IN, "seconds": 0.3}, inputs=["user", "password", "pin"])


@pytest.fixture
def _content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_TRACE_CONTENT", "true")


@pytest.mark.usefixtures("_content")
def test_content_stands_on_spans_without_secrets(crew_server: CrewServerFactory, spans: Spans):
    server = crew_server(SECRETS)
    secrets = {"password": SecretStr("hunter22-secret"), "pin": "4711471"}
    pc.run_crew(server.crew(secret_inputs=["pin"]), {"user": "ada", **secrets})
    run = spans.run()
    (asked,), (answered,) = (json.loads(facts(run)[f"gen_ai.{way}.messages"]) for way in ("input", "output"))
    assert asked["role"] == "user"
    assert json.loads(asked["parts"][0]["content"]) == {"user": "ada", "password": "********", "pin": "********"}
    text = "********, ******** for ada"
    parts = [{"type": "text", "content": text}]
    assert answered == {"role": "assistant", "parts": parts, "finish_reason": "stop"}
    assert [facts(task)["crewai.task.output"] for task in spans.tasks(run)] == [text]
    for secret in ("hunter22", "4711471", server.token):
        assert spans.hides(secret)


@pytest.mark.usefixtures("_content")
def test_unknown_secrets_hide_all_text(crew_server: CrewServerFactory, spans: Spans, monkeypatch: pytest.MonkeyPatch):
    server = crew_server(SECRETS)
    crew = server.crew(secret_inputs=["password"])
    run = crew.trigger({"user": "ada", "password": "hunter22-secret", "pin": "1"})
    monkeypatch.setattr(run_module, "_kicked_off", {})  # as in another process
    asyncio.run(pc.wait_for_crew.acall(crew, run.kickoff_id, wait=QUICK))
    assert facts(spans.run())["prefect_crew.state"] == "completed"
    assert spans.tasks(spans.run()) == []
    assert spans.hides("hunter22")


@pytest.mark.usefixtures("_content")
@pytest.mark.parametrize(("show", "tasks"), [("summary", 1), ("none", 0)])
def test_hidden_content_stands_on_no_span(crew_server: CrewServerFactory, spans: Spans, show: str, tasks: int):
    server = crew_server(script({"name": "fetch", "seconds": 2.0, "fail": "no answer from tea.test"}, inputs=["topic"]))
    with pytest.raises(pc.CrewFailedError):
        pc.run_crew(server.crew(show=show), {"topic": "oolong"})
    assert len(spans.tasks(spans.run())) == tasks
    assert spans.run().status.description == (None if show == "none" else "no answer from tea.test")
    assert spans.hides("oolong")


# Without an SDK


def test_without_an_sdk_nothing_is_made_of_a_run():
    def view() -> RunView:
        raise AssertionError("nobody has asked for it")

    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    telemetry.end_run(new_record(), view)


# Metrics


def points(reader: InMemoryMetricReader, crew: str) -> dict[str, Any]:
    """Return the metrics of one crew: by name and what tells its points apart."""
    values: dict[str, Any] = {}
    data = reader.get_metrics_data()
    for group in data.resource_metrics if data else ():
        for metric in (metric for scope in group.scope_metrics for metric in scope.metrics):
            for point in metric.data.data_points:
                labels = dict(point.attributes or {})
                if labels.pop("crewai.crew.name") == crew:
                    name = " ".join([metric.name.removeprefix("prefect_crew."), *map(str, labels.values())])
                    values[name] = getattr(point, "value", None) if hasattr(point, "value") else point.count
    return values


def test_an_uncertain_kickoff_is_counted_once(crew_server: CrewServerFactory, reader: InMemoryMetricReader):
    server, idempotency_key = crew_server("echo", faults=["kickoff:500@1"]), key()
    for _ in range(2):
        with pytest.raises(pc.KickoffUncertainError):
            pc.run_crew(server.crew(), {"text": "a"}, idempotency_key=idempotency_key)
    assert points(reader, f"127.0.0.1:{server.port}") == {"kickoffs.uncertain": 1}


async def test_a_run_counts_as_waiting_for_a_person(crew_server: CrewServerFactory, reader: InMemoryMetricReader):
    server = crew_server(ASKS)
    run, name = await server.crew().atrigger({}), f"127.0.0.1:{server.port}"
    waiting = asyncio.ensure_future(run.await_for_completion(wait=QUICK))
    await until(lambda: points(reader, name).get("runs.waiting") == 1)
    await run.aresume("fine", approve=True)
    await waiting
    assert points(reader, name)["runs.waiting"] == 0
    again = await server.crew().atrigger({})
    with pytest.raises(pc.CrewTimeoutError):
        await again.await_for_completion(wait=pc.WaitPolicy(initial=0.1, factor=1, human_timeout=0.5))
    assert points(reader, name)["runs.waiting"] == 0, "nobody waits here any more"


# A program


PAGE = Path(__file__).parents[2] / "docs" / "guides" / "traces.md"


class Collector(Listener):
    """Keeps what OTLP exporters send over HTTP, by its path."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: dict[str, list[bytes]] = {"/v1/traces": [], "/v1/metrics": []}

    def take(self, path: str, headers: Mapping[str, str], body: bytes) -> int:
        self.bodies[path].append(gzip.decompress(body) if "Content-Encoding" in headers else body)
        return 200


@pytest.mark.programs
def test_the_guides_program_exports_spans_and_metrics(crew_server: CrewServerFactory, prefect_api: PrefectServer):
    server = crew_server("echo", speed=100)
    with Collector() as collector:
        env = {"PREFECT_API_URL": prefect_api.api_url, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        program = PAGE.read_text().partition("```python\n")[2].partition("```")[0]
        assert 'run_crew("travel", trip)' in program
        ours = f"run_crew(DeployedCrew(url={server.url!r}, token={server.token!r}), {{'text': 'a'}})"
        program = program.replace('run_crew("travel", trip)', "from prefect_crew import DeployedCrew\n" + ours)
        subprocess.run([sys.executable, "-c", program], env={**os.environ, **env}, check=True, timeout=60)
    assert server.runs[0].id.encode() in b"".join(collector.bodies["/v1/traces"])
    counted = {
        metric.name: getattr(metric, metric.WhichOneof("data")).data_points[0]
        for body in collector.bodies["/v1/metrics"]
        for group in ExportMetricsServiceRequest.FromString(body).resource_metrics
        for scope in group.scope_metrics
        for metric in scope.metrics
    }
    assert counted["prefect_crew.runs"].as_int == 1
    assert counted["prefect_crew.run.duration"].count == 1
    assert 0 < counted["prefect_crew.run.duration"].sum < 30
