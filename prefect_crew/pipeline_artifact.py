"""What people look at of a pipeline: its steps, what needs what, and a timeline of what ran beside what.

It is a Markdown table with a timeline of characters, since only the newest of Prefect's interfaces draws Mermaid.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from prefect_crew.artifacts import MarkdownArtifact, artifact_key
from prefect_crew.logs import run_logger
from prefect_crew.pipeline_graph import PipelineGraph
from prefect_crew.rendering import cell, code, duration, prose, table
from prefect_crew.stopping import flow_run_id

__all__ = ["PipelineArtifact", "StepTimes", "render_pipeline"]

WIDTH = 32
"""Characters of the timeline."""
SHOW_EVERY = 2.0
"""Seconds, at least, between two updates while the pipeline runs."""
StepState = Literal["waiting", "running", "suspended", "completed", "failed", "skipped"]
_MARKS: dict[StepState, str] = {
    "waiting": "○ waiting",
    "running": "● running",
    "suspended": "◌ running, the flow run is suspended",
    "completed": "✓ completed",
    "failed": "✗ failed",
    "skipped": "– not run",
}


@dataclass
class StepTimes:
    """When a step ran, in seconds since the epoch, and what came of it."""

    state: StepState = "waiting"
    started: float | None = None
    ended: float | None = None
    kickoff_id: str | None = None

    def start(self) -> None:
        """Note that the step runs."""
        self.state, self.started = "running", time.time()

    def end(self, state: StepState, *, kickoff_id: str | None) -> None:
        """Note what came of it."""
        self.state, self.ended, self.kickoff_id = state, time.time(), kickoff_id


def render_pipeline(name: str, run_key: str, graph: PipelineGraph, times: Mapping[str, StepTimes], now: float) -> str:
    """Return the Markdown of a pipeline."""
    order = [step for layer in graph.layers() for step in layer]
    begun = [entry.started for entry in times.values() if entry.started is not None]
    start = min(begun, default=now)
    end = max([entry.ended or now for entry in times.values() if entry.started is not None], default=now)
    rows = [_row(step, graph, times[step], start, max(end - start, 1e-9), now) for step in order]
    states = [times[step].state for step in order]
    done = states.count("completed")
    failed = states.count("failed")
    head = f"## {prose(name)}: {done} of {len(order)} steps completed" + (f", {failed} failed" if failed else "")
    facts = table(("", ""), [("Run key", code(run_key)), ("Time", duration(end - start))])
    header = ("Step", "Crew", "Needs", "State", "Time", "Timeline", "Run")
    return f"{head}\n\n{facts}\n\n### Steps\n\n{table(header, rows)}\n"


def _row(step: str, graph: PipelineGraph, times: StepTimes, start: float, span: float, now: float) -> list[str]:
    crew = next(one.crew for one in graph.steps if one.name == step)
    label = crew if isinstance(crew, str) else crew.label
    took, bar = "–", ""
    if times.started is not None:
        ended = times.ended or now
        took = duration(ended - times.started)
        bar = f"`{_bar((times.started - start) / span, (ended - start) / span)}`"
    run = code(times.kickoff_id) if times.kickoff_id else ""
    needs = ", ".join(cell(name) for name in sorted(graph.needs[step])) or "–"
    return [f"**{cell(step)}**", cell(label), needs, _MARKS[times.state], took, bar, run]


def _bar(begin: float, end: float) -> str:
    first = min(int(begin * WIDTH), WIDTH - 1)
    last = max(first + 1, min(WIDTH, round(end * WIDTH)))
    return f"{'·' * first}{'█' * (last - first)}{'·' * (WIDTH - last)}"


class PipelineArtifact:
    """The artifact of one pipeline run. It never fails the pipeline; trouble is logged once."""

    def __init__(self, name: str, run_key: str, graph: PipelineGraph) -> None:
        self._name = name
        self._run_key = run_key
        self._graph = graph
        self._artifact = MarkdownArtifact(
            artifact_key(name, prefix="pipeline"), f"Pipeline {name}, run key {run_key}", flow_run_id=flow_run_id()
        )
        self._lock = asyncio.Lock()
        self._shown_at = 0.0
        self._troubled = False

    async def show(self, times: Mapping[str, StepTimes], *, last: bool = False) -> None:
        """Bring it up to date, every few seconds at most."""
        if not last and time.monotonic() - self._shown_at < SHOW_EVERY:
            return
        self._shown_at = time.monotonic()
        async with self._lock:
            data = render_pipeline(self._name, self._run_key, self._graph, times, time.time())
            trouble = await self._artifact.put(data)
        if trouble and not self._troubled:
            self._troubled = True
            run_logger().warning("The artifact of pipeline %s could not be updated: %s", self._name, trouble)
