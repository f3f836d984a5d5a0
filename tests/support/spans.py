"""The spans of this process, as OpenTelemetry's exporter for tests keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.util._once import Once


class Spans:
    """Reads the spans that have ended, in the order of their starts."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()

    @contextmanager
    def traced(self) -> Iterator[Spans]:
        """Set the SDK up in this process, as a user's program does; nothing of it is left afterwards."""
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        trace.set_tracer_provider(provider)
        try:
            yield self
        finally:
            provider.shutdown()
            # A program sets it once: the API has no way back, and its own tests do this.
            trace._TRACER_PROVIDER, trace._TRACER_PROVIDER_SET_ONCE = None, Once()  # pyright: ignore

    def all(self) -> list[ReadableSpan]:
        return sorted(
            self._exporter.get_finished_spans(),
            key=lambda span: (span.start_time, facts(span).get("prefect_crew.task.number", 0)),
        )

    def run(self) -> ReadableSpan:
        """Return the span of the only run."""
        (run,) = self.runs()
        return run

    def runs(self) -> list[ReadableSpan]:
        return [span for span in self.all() if facts(span).get("gen_ai.operation.name") == "invoke_workflow"]

    def tasks(self, run: ReadableSpan) -> list[ReadableSpan]:
        assert run.context
        return [span for span in self.all() if span.parent and span.parent.span_id == run.context.span_id]

    def hides(self, text: str) -> bool:
        """Return whether a text stands on no span."""
        return all(text not in span.to_json() for span in self.all())


def facts(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})
