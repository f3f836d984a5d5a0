"""An OpenTelemetry collector: an OTLP/HTTP endpoint in this process that keeps what real exporters send."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.util._once import Once

from support.receiver import Listener


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


class Collector(Listener):
    """Keeps what it gets. `bodies` are the requests as they came, for what must not stand in them; `points` are the
    metrics: name, attributes, and value, which is the count and the sum of a histogram."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[SeenSpan] = []
        self.points: list[tuple[str, dict[str, Any], Any]] = []
        self.bodies: list[bytes] = []
        self._flush: Any = None

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

    def take(self, path: str, headers: Mapping[str, str], body: bytes) -> int:
        body = gzip.decompress(body) if "Content-Encoding" in headers else body
        self.bodies.append(body)
        if path == "/v1/traces":
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in group.scope_spans:
                    self.spans += [_span(one, scope.scope.name) for one in scope.spans]
            return 200
        for group in ExportMetricsServiceRequest.FromString(body).resource_metrics:
            for scope in group.scope_metrics:
                for metric in scope.metrics:
                    self.points += _points(metric)
        return 200


def _span(span: Any, scope: str) -> SeenSpan:
    times, failed = (span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9), span.status.code == 2
    ids = (span.span_id, span.parent_span_id, span.trace_id)
    return SeenSpan(span.name, _values(span), *times, *ids, failed, span.status.message, scope)


def _points(metric: Any) -> Iterator[tuple[str, dict[str, Any], Any]]:
    kind = metric.WhichOneof("data")
    for point in getattr(metric, kind).data_points:
        value = (point.count, point.sum) if kind == "histogram" else point.as_double or point.as_int
        yield metric.name, _values(point), value


def _values(thing: Any) -> dict[str, Any]:
    return {one.key: _value(one.value) for one in thing.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)
