"""An OpenTelemetry collector: an OTLP/HTTP endpoint in this process that keeps what real exporters send."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.util._once import Once


@dataclass(frozen=True)
class SeenSpan:
    """A span as it arrived. Times are seconds since the epoch, ids are bytes."""

    name: str
    attributes: dict[str, Any]
    start: float
    end: float
    id: bytes
    parent: bytes
    trace_id: bytes
    failed: bool
    message: str
    scope: str


@dataclass
class Collector:
    """Listens on a free loopback port. `bodies` are the requests as they came, for what must not stand in them."""

    spans: list[SeenSpan] = field(default_factory=list[SeenSpan])
    points: list[tuple[str, dict[str, Any], Any]] = field(default_factory=list[Any])
    """The metrics: name, attributes, value. A histogram's value is its count and its sum."""
    bodies: list[bytes] = field(default_factory=list[bytes])

    def __post_init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._flush: Any = None

    def __enter__(self) -> Collector:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def traced(self) -> Iterator[Collector]:
        """Set the SDK up in this process, as a user's program does; nothing of it is left afterwards."""
        provider = TracerProvider(resource=Resource.create({"service.name": "tests"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{self.url}/v1/traces")))
        trace.set_tracer_provider(provider)
        self._flush = provider.force_flush
        try:
            yield self
        finally:
            provider.shutdown()
            # A program sets it once: the API has no way back, and its own tests do this.
            trace._TRACER_PROVIDER, trace._TRACER_PROVIDER_SET_ONCE = None, Once()  # pyright: ignore

    def runs(self) -> list[SeenSpan]:
        """Return the spans of runs that have arrived, in the order of their starts."""
        return [span for span in self.all() if span.attributes.get("gen_ai.operation.name") == "invoke_workflow"]

    def tasks(self, run: SeenSpan) -> list[SeenSpan]:
        """Return the spans of a run's tasks."""
        return [span for span in self.all() if span.parent == run.id]

    def all(self) -> list[SeenSpan]:
        """Return all spans that have arrived, in the order of their starts."""
        if self._flush is not None:
            self._flush()
        return sorted(self.spans, key=lambda span: (span.start, span.attributes.get("prefect_crew.task.number", 0)))

    def hides(self, text: str) -> bool:
        """Return whether a text stands in nothing that has arrived."""
        self.all()
        return all(text.encode() not in body for body in self.bodies)

    def _take(self, path: str, body: bytes) -> None:
        self.bodies.append(body)
        if path == "/v1/traces":
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in group.scope_spans:
                    self.spans += [_span(one, scope.scope.name) for one in scope.spans]
        elif path == "/v1/metrics":
            for group in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                for scope in group.scope_metrics:
                    for metric in scope.metrics:
                        self.points += _points(metric)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector._take(self.path, gzip.decompress(body) if self.headers["Content-Encoding"] else body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  its own name
                pass

        return Handler


def _span(span: Any, scope: str) -> SeenSpan:
    return SeenSpan(
        name=span.name,
        attributes={one.key: _value(one.value) for one in span.attributes},
        start=span.start_time_unix_nano / 1e9,
        end=span.end_time_unix_nano / 1e9,
        id=span.span_id,
        parent=span.parent_span_id,
        trace_id=span.trace_id,
        failed=span.status.code == 2,
        message=span.status.message,
        scope=scope,
    )


def _points(metric: Any) -> Iterator[tuple[str, dict[str, Any], Any]]:
    kind = metric.WhichOneof("data")
    for point in getattr(metric, kind).data_points:
        attributes = {one.key: _value(one.value) for one in point.attributes}
        value = (point.count, point.sum) if kind == "histogram" else point.as_double or point.as_int
        yield metric.name, attributes, value


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)
