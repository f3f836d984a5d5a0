"""What the span and the metrics of one run cost: microseconds of CPU time, without an SDK and with one.

A completed run of three tasks, so four spans, of a crew with a secret input, as `runs/wait.py` closes it. Making its
record is in each figure. Spans go to a collector in this process that throws them away, whose time is counted as well.
Goal: without an SDK at most 20 us more than the record alone.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from figures import report, used
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from pydantic import SecretStr

from prefect_crew import DeployedCrew
from prefect_crew.artifacts.telemetry import end_run
from prefect_crew.client.inputs import Inputs
from prefect_crew.client.models import CrewStatus, TaskResult, TokenUsage
from prefect_crew.records.model import RecordPhase, RunRecord, utcnow
from prefect_crew.runs.options import RunRequest
from prefect_crew.runs.run import LiveRun
from prefect_crew.settings import CrewSettings
from prefect_crew.states import CrewState

INPUTS = {"topic": "tea", "password": "hunter22-secret"}
USAGE = TokenUsage(total_tokens=1200, prompt_tokens=1000, completion_tokens=200)


class Drain(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def closing(settings: CrewSettings, *, write: bool = True) -> Callable[[], None]:
    """Return what makes the record of one more run that has ended, and tells OpenTelemetry of it if `write`."""
    crew = DeployedCrew(
        url="https://travel.test", token=SecretStr("the-token-of-travel"), secret_inputs=["password"]
    ).crew
    now = utcnow()
    tasks = [TaskResult(name=f"task_{n}", agent="Writer", output="words " * 200, execution_time=9.5) for n in range(3)]
    status = CrewStatus(
        kickoff_id="k", state=CrewState.COMPLETED, tasks=tasks, output="words " * 500, execution_time=30.0, usage=USAGE
    )

    def close() -> None:
        record = RunRecord(
            idempotency_key="k", attempt=1, crew="travel", crew_url=crew.url, inputs_digest="d", owner="o",
            claimed_at=now - timedelta(seconds=31), kicked_off_at=now - timedelta(seconds=30), ended_at=now,
            kickoff_id="k", phase=RecordPhase.ENDED, state=CrewState.COMPLETED, usage=USAGE, cost=0.4,
        )  # fmt: skip
        run = LiveRun(crew, "k", record, RunRequest(crew, crew.take(Inputs.of(INPUTS))))
        for task in tasks:
            run.see_task(task.name)
        if write:
            end_run(record, lambda: run.view(status), settings=settings)

    return close


def measure(what: str, close: Callable[[], None], runs: int, flush: Callable[[], object] = lambda: None) -> None:
    close()
    flush()
    with used() as took:
        for _ in range(runs):
            close()
        flush()
    report(what, us_a_run=took.cpu_seconds / runs * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    runs = parser.parse_args().runs
    close = closing(CrewSettings())
    measure("the record alone", closing(CrewSettings(), write=False), runs)
    measure("no SDK", close, runs)
    metrics.set_meter_provider(MeterProvider([InMemoryMetricReader()]))
    measure("metrics alone", close, runs)
    drain = ThreadingHTTPServer(("127.0.0.1", 0), Drain)
    threading.Thread(target=drain.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{drain.server_port}/v1/traces"
    for what, sampler, settings in (
        ("metrics, spans that are not sampled", ALWAYS_OFF, CrewSettings()),
        ("metrics, spans exported", None, CrewSettings()),
        ("metrics, spans exported with content", None, CrewSettings(trace_content=True)),
    ):
        provider = TracerProvider(sampler=sampler)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url), max_queue_size=100_000))
        trace._TRACER_PROVIDER = provider  # noqa: SLF001  a program sets it once
        measure(what, closing(settings), runs, provider.force_flush)
        provider.shutdown()
    drain.shutdown()


if __name__ == "__main__":
    main()
