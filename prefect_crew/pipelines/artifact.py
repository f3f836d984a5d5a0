"""The artifact of a pipeline: its steps, their states and times, kept up to date while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Literal

from prefect_crew._internal.prefect_api import flow_run_id
from prefect_crew.artifacts.escape import cell, code, duration, fenced, flow_run_link, link, prose, table
from prefect_crew.artifacts.run import MarkdownArtifact, artifact_key
from prefect_crew.pipelines.graph import PIPELINE, Pipeline
from prefect_crew.runs.run import LiveRun

SHOW_AFTER = 0.5
"""Seconds after which a running pipeline is shown for the first time."""
SHOW_EVERY = 2.0
"""Seconds, at least, between two updates while the pipeline runs."""
StepState = Literal["waiting", "running", "interrupted", "completed", "failed", "skipped"]
_MARKS: dict[StepState, str] = {
    "waiting": "○ waiting",
    "running": "● running",
    "interrupted": "■ interrupted",
    "completed": "✓ completed",
    "failed": "✗ failed",
    "skipped": "– not run",
}


@dataclass
class StepView:
    """A step in the artifact. Times are seconds since the epoch.

    `error` is the error of a failed step, with advice. `page_url` is the crew's page.
    """

    crew: str
    state: StepState = "waiting"
    started: float | None = None
    ended: float | None = None
    error: str | None = None
    page_url: str | None = None
    run: LiveRun | None = None


def render_pipeline(
    name: str,
    idempotency_key: str,
    pipeline: Pipeline,
    views: Mapping[str, StepView],
    seconds: float,
    *,
    flow_run: str | None = None,
) -> str:
    """Return the Markdown of a pipeline. `flow_run` is the id of its flow run."""
    states = [view.state for view in views.values()]
    failed = f", {states.count('failed')} failed" if "failed" in states else ""
    head = f"## {prose(name)}: {states.count('completed')} of {len(states)} steps completed{failed}"
    errors: list[str] = []
    facts = [("Idempotency key", code(idempotency_key)), ("Time", duration(seconds))]
    if flow_run is not None:
        facts.append(("Flow run", flow_run_link(flow_run)))
    rows: list[list[str]] = []
    for step in pipeline.order:
        view, needs = views[step], ", ".join(map(cell, sorted(pipeline.needs[step])))
        if view.error is not None:
            attempt = f" ({view.run.attempt_number})" if view.run and view.run.attempt_number else ""
            errors.append(f"### Step {prose(step)} failed{attempt}\n\n{fenced(view.error)}")
        state = _MARKS[view.state].replace(" ", "\u00a0", 1)  # so that the newer interface does not break the line
        crew = link(view.crew, view.page_url) if view.page_url else cell(view.crew)
        rows.append([f"**{cell(step)}**", needs, state, _time(view), crew, _link(view)])
    steps = table(("Step", "After", "State", "Time", "Crew", "Run"), rows)
    return "\n\n".join([head, *errors, table(("", ""), facts), "### Steps", steps]) + "\n"


def _time(view: StepView) -> str:
    """Return the duration of a step: of its run, also if an earlier call has started that."""
    attempt = view.run and view.run.attempt
    if attempt and attempt.started_at and attempt.ended_at:
        return duration(attempt.ended_at - attempt.started_at)
    return "–" if view.started is None else duration((view.ended or time.time()) - view.started)


def _link(view: StepView) -> str:
    """Return a link to the artifact of a step's run, relative since the page's address is unknown here."""
    if view.run is None:
        return ""
    artifact = view.run.artifact.id
    return link(view.run.kickoff_id, f"../artifact/{artifact}", cap=8) if artifact else cell(view.run.kickoff_id, 8)


class PipelineArtifact:
    """The artifact of one pipeline run, updated while it runs."""

    def __init__(self, name: str, idempotency_key: str, pipeline: Pipeline) -> None:
        self._name = name
        self._idempotency_key = idempotency_key
        self._pipeline = pipeline
        self._views = {step: StepView(crew.label, page_url=crew.page_url) for step, crew in pipeline.crews.items()}
        self._began = time.monotonic()
        description = f"Pipeline {name}, idempotency key {idempotency_key}"
        key = PIPELINE if name == PIPELINE else artifact_key(name, prefix=PIPELINE)
        self._artifact = MarkdownArtifact(key, description, flow_run_id=flow_run_id())
        self._changed = False

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncGenerator[None]:
        """Keep the artifact up to date in this block, and put its last state at the end."""
        over = asyncio.Event()
        keeper = asyncio.create_task(self._keep(over))
        try:
            yield
        finally:
            over.set()
            await asyncio.wait({keeper})  # a cut-off creation may still arrive, beside the next one
            for view in self._views.values():
                if view.state == "waiting":
                    view.state = "skipped"
            await self._put()

    def opened(self, step: str, run: LiveRun) -> None:
        """Note the run of a step."""
        self._views[step].run = run
        self._changed = True

    def note(self, step: str, state: StepState, error: str | None = None) -> None:
        """Note that a step runs, or its outcome, and its error if it failed."""
        view = self._views[step]
        view.state, view.error = state, error
        if state == "running":
            view.started = time.time()
        else:
            view.ended = time.time()
        self._changed = True

    async def _keep(self, over: asyncio.Event) -> None:
        pause = SHOW_AFTER  # not at once: the first kickoffs have priority
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), pause)
            if self._changed and not over.is_set():
                self._changed = False
                await self._put()
            pause = SHOW_EVERY

    async def _put(self) -> None:
        seconds = time.monotonic() - self._began
        view = (self._name, self._idempotency_key, self._pipeline, self._views, seconds)
        await self._artifact.keep(render_pipeline(*view, flow_run=flow_run_id()))
