"""The span of a run, by the real SDK."""

import asyncio
import gzip
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from opentelemetry.util._once import Once
from prefect import flow
from prefect.runtime import flow_run

import prefect_crew as pc
from prefect_crew.prices import Price
from prefect_crew.testing import CrewServerFactory
from support.past import key, stored
from support.prefect_server import PrefectServer
from support.receiver import Listener
from support.scripts import script, slow

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

QUICK = pc.WaitPolicy(initial=0.05, factor=1)
STEPS = script(
    {"name": "research on {{ topic }}", "seconds": 0.4, "output": "notes on {{ topic }}"},
    inputs=["topic"],
    usage={"total_tokens": 1200, "prompt_tokens": 1000, "completion_tokens": 200, "cached_prompt_tokens": 30},
)
GOLDEN = Path(__file__).parents[1] / "golden"
PRICE = Price(per_run=0.5, per_1k_input=0.25, per_1k_output=1.25)


class Spans(InMemorySpanExporter):
    """The spans that have ended, in the order of their starts."""

    def all(self) -> list[Any]:
        return sorted(self.get_finished_spans(), key=lambda span: span.start_time)

    def run(self) -> Any:
        """Return the span of the only run."""
        (run,) = self.runs()
        return run

    def runs(self) -> list[Any]:
        return [span for span in self.all() if facts(span).get("gen_ai.operation.name") == "invoke_workflow"]

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


# Spans


def text_of(span: Any, names: Mapping[str, str]) -> str:
    """Return a span with its attributes, and names for the values that differ from one run to the next."""
    text = "\n".join([span.name, *(f"  {name}: {value!r}" for name, value in sorted(facts(span).items())), ""])
    for name, value in names.items():
        text = text.replace(value, name)
    return text


def test_a_run_is_a_golden_span(crew_server: CrewServerFactory, spans: Spans):
    server, idempotency_key, ids = crew_server(STEPS, response_format="live"), key(), list[str]()

    @flow
    async def trip(topic: str) -> None:
        ids.append(str(flow_run.id))
        await pc.arun_crew(server.crew(price=PRICE), {"topic": topic}, idempotency_key=idempotency_key)

    asyncio.run(trip("tea"))
    run = spans.run()
    (attempt,) = stored(idempotency_key)
    (around,) = [span for span in spans.all() if span.context.span_id == run.parent.span_id]
    assert facts(around)["prefect.run.type"] == "task", "Prefect's own span of the wait"
    names = {"CREW": attempt.crew, "RUN ID": server.runs[0].id}
    names |= {"KEY": idempotency_key, "FLOW RUN": ids[0], "TASK RUN": facts(around)["prefect.run.id"]}
    assert text_of(run, names) == (GOLDEN / "span.txt").read_text()
    assert spans.hides(" on tea")
    assert run.instrumentation_scope.name == "prefect_crew"
    assert run.status.status_code is not StatusCode.ERROR
    assert attempt.started_at is not None
    assert attempt.ended_at is not None
    assert run.start_time == pytest.approx(attempt.started_at * 1e9, abs=1e3)
    assert run.end_time == pytest.approx(attempt.ended_at * 1e9, abs=1e3)


def test_a_failed_run_is_an_error_without_a_text_of_the_crew(crew_server: CrewServerFactory, spans: Spans):
    with pytest.raises(pc.CrewFailedError):
        pc.run_crew(crew_server(script({"name": "fetch", "fail": "the site is down"})).crew(), {})
    span = spans.run()
    assert span.status.status_code is StatusCode.ERROR
    assert facts(span)["error.type"] == "failed"
    assert "the site is down" not in span.to_json(), "Prefect's own span of the wait says it"


@pytest.mark.parametrize(
    ("state", "faults", "wait", "error"),
    [
        ("stopped", [], pc.WaitPolicy(initial=0.05, timeout=0.3, on_timeout="stop"), pc.CrewTimeoutError),
        ("lost", ["status:forgotten@3"], pc.WaitPolicy(lost_after=0.5), pc.CrewLostError),
    ],
    ids=["stopped", "lost"],
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
    assert spans.hides("tea 3")


# A program


PAGE = Path(__file__).parents[2] / "docs" / "guides" / "traces.md"


class Collector(Listener):
    """Keeps what an OTLP exporter sends over HTTP."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: dict[str, list[bytes]] = {"/v1/traces": []}

    def take(self, path: str, headers: Mapping[str, str], body: bytes) -> int:
        self.bodies[path].append(gzip.decompress(body) if "Content-Encoding" in headers else body)
        return 200


@pytest.mark.programs
def test_the_guides_program_exports_spans(crew_server: CrewServerFactory, prefect_api: PrefectServer):
    server = crew_server("echo", speed=100)
    with Collector() as collector:
        env = {"PREFECT_API_URL": prefect_api.api_url, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        program = PAGE.read_text().partition("```python\n")[2].partition("```")[0]
        assert 'run_crew("travel", trip)' in program
        ours = f"run_crew(DeployedCrew(url={server.url!r}, token={server.token!r}), {{'text': 'a'}})"
        program = program.replace('run_crew("travel", trip)', "from prefect_crew import DeployedCrew\n" + ours)
        subprocess.run([sys.executable, "-c", program], env={**os.environ, **env}, check=True, timeout=60)
    assert server.runs[0].id.encode() in b"".join(collector.bodies["/v1/traces"])
