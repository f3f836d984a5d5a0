"""The artifact of a pipeline: its steps, their states and times, kept up to date while it runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

import httpx
from prefect.exceptions import PrefectException

from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew.artifacts.escape import cell, code, duration, fenced, flow_run_link, link, prose, table
from prefect_crew.artifacts.run import MarkdownArtifact, artifact_key
from prefect_crew.pipelines.graph import PipelineGraph
from prefect_crew.records.model import RecordPhase
from prefect_crew.runs.run import OpenRun

WIDTH = 20
"""Characters of the timeline."""
SHOW_AFTER = 0.5
"""Seconds after which a pipeline that goes on is shown for the first time."""
SHOW_EVERY = 2.0
"""Seconds, at least, between two updates while the pipeline runs."""
StepState = Literal["waiting", "running", "suspended", "completed", "failed", "skipped", "cancelled"]
_MARKS: dict[StepState, str] = {
    "waiting": "○ waiting",
    "running": "● running",
    "suspended": "◌ running, the flow run is suspended",
    "completed": "✓ completed",
    "failed": "✗ failed",
    "skipped": "– not run",
    "cancelled": "■ cancelled",
}


@dataclass
class StepView:
    """A step as it is shown. Times are seconds since the epoch.

    `error` is why it failed, with what to do. `attempt` is which start under its key it was. `earlier` is how long a
    run took that had ended before this call; None for a run that this call waited for. `page_url` is the crew's page.
    """

    crew: str
    state: StepState = "waiting"
    started: float | None = None
    ended: float | None = None
    kickoff_id: str | None = None
    artifact_id: UUID | None = None
    earlier: float | None = None
    attempt: str | None = None
    error: str | None = None
    page_url: str | None = None


def render_pipeline(
    name: str,
    idempotency_key: str,
    graph: PipelineGraph,
    views: Mapping[str, StepView],
    now: float,
    *,
    run: str | None = None,
) -> str:
    """Return the Markdown of a pipeline. `run` is the id of its flow run."""
    order = [step for layer in graph.layers() for step in layer]
    begun = [view for view in views.values() if view.started is not None]
    start = min([view.started or now for view in begun], default=now)
    end = max([view.ended or now for view in begun], default=now)
    states = [views[step].state for step in order]
    done, failed = states.count("completed"), states.count("failed")
    head = f"## {prose(name)}: {done} of {len(order)} steps completed" + (f", {failed} failed" if failed else "")
    why = "".join(_failure(step, views[step]) for step in order if views[step].error is not None)
    facts = [("Idempotency key", code(idempotency_key)), ("Time", duration(end - start))]
    if run is not None:
        facts.append(("Flow run", flow_run_link(run)))
    rows = [_row(step, views[step], graph.needs[step], start, max(end - start, 1e-9), now) for step in order]
    steps = table(("Step", "After", "State", "Time", "Timeline", "Crew", "Run"), rows)
    return f"{head}\n\n{why}{table(('', ''), facts)}\n\n### Steps\n\n{steps}\n"


def _failure(step: str, view: StepView) -> str:
    attempt = f" ({view.attempt})" if view.attempt else ""
    return f"### Step {prose(step)} failed{attempt}\n\n{fenced(view.error or '')}\n\n"


def _row(step: str, view: StepView, needs: Set[str], start: float, span: float, now: float) -> list[str]:
    took, bar = "–", ""
    if view.earlier is not None:
        took, bar = duration(view.earlier), "started earlier"
    elif view.started is not None:
        ended = view.ended or now
        took = duration(ended - view.started)
        bar = f"`{_bar((view.started - start) / span, (ended - start) / span)}`"
    state = _MARKS[view.state].replace(" ", "\u00a0", 1)  # the newer interface would break the line there
    crew = link(view.crew, view.page_url) if view.page_url else cell(view.crew)
    return [f"**{cell(step)}**", ", ".join(map(cell, sorted(needs))), state, took, bar, crew, _link(view)]


def _link(view: StepView) -> str:
    """Return a link to the artifact of a step's run. Relative, since nobody here knows where the page is looked at."""
    if view.kickoff_id is None:
        return ""
    if view.artifact_id is None:
        return cell(view.kickoff_id, 8)
    return link(view.kickoff_id, f"../artifact/{view.artifact_id}", cap=8)


def _bar(begin: float, end: float) -> str:
    first = min(int(begin * WIDTH), WIDTH - 1)
    last = max(first + 1, min(WIDTH, round(end * WIDTH)))
    return f"{'░' * first}{'█' * (last - first)}{'░' * (WIDTH - last)}"


class PipelineArtifact:
    """The artifact of one pipeline run, updated while it runs; an async context manager.

    It never fails the pipeline; trouble is logged once.
    """

    def __init__(self, name: str, idempotency_key: str, graph: PipelineGraph) -> None:
        self._name = name
        self._idempotency_key = idempotency_key
        self._graph = graph
        self._views = {step.name: StepView(_label(step.crew)) for step in graph.steps}
        self._runs: dict[str, OpenRun] = {}
        self._artifact = MarkdownArtifact(
            artifact_key(name, prefix="pipeline"),
            f"Pipeline {name}, idempotency key {idempotency_key}",
            flow_run_id=flow_run_id(),
        )
        self._changed = asyncio.Event()
        self._over = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._troubled = False

    async def __aenter__(self) -> PipelineArtifact:
        self._keeper = asyncio.ensure_future(self._keep())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._keeper is not None  # noqa: S101  __aenter__ made it
        # What waits while the flow run is suspended is for when it goes on.
        suspended = any(view.state == "suspended" for view in self._views.values())
        for view in self._views.values():
            if view.state == "waiting" and not suspended:
                view.state = "skipped"
        self._over.set()
        self._changed.set()
        await self._keeper
        await self._find_artifacts()
        await self._put()

    def started(self, step: str) -> None:
        """Note that a step runs."""
        self._views[step].state, self._views[step].started = "running", time.time()
        self._changed.set()

    def opened(self, step: str, run: OpenRun) -> None:
        """Note which run a step's is."""
        view, record = self._views[step], run.record
        self._runs[step], view.kickoff_id, view.page_url = run, run.kickoff_id, run.crew.page_url
        view.attempt = run.attempt
        if record is not None and not run.owned and record.phase is RecordPhase.ENDED:
            seconds = (record.ended_at or record.claimed_at) - (record.kicked_off_at or record.claimed_at)
            view.earlier, view.started = seconds.total_seconds(), None
        self._changed.set()

    def ended(self, step: str, state: StepState, error: str | None = None) -> None:
        """Note what came of a step, and why it failed."""
        self._views[step].error = error
        self._views[step].state = state
        self._views[step].ended = None if state == "suspended" else time.time()
        self._changed.set()

    async def _keep(self) -> None:
        over = asyncio.ensure_future(self._over.wait())
        # Not at once: the first kickoffs go before it.
        await asyncio.wait({over}, timeout=SHOW_AFTER)
        while not over.done():
            await self._changed.wait()
            self._changed.clear()
            if not over.done():
                await self._put()
                await asyncio.wait({over}, timeout=SHOW_EVERY)

    async def _put(self) -> None:
        for step, run in self._runs.items():
            self._views[step].artifact_id = run.artifact.id
        now, run = time.time(), flow_run_id()
        data = render_pipeline(self._name, self._idempotency_key, self._graph, self._views, now, run=run)
        trouble = await self._artifact.put(data)
        if trouble and not self._troubled:
            self._troubled = True
            run_logger().warning("The artifact of pipeline %s could not be updated: %s", self._name, trouble)

    async def _find_artifacts(self) -> None:
        """Find what other processes have made for the runs that were found."""
        try:
            await asyncio.gather(*(run.artifact.find() for run in self._runs.values()))
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().debug("The artifacts of earlier runs are not linked: %s", error)


def _label(crew: object) -> str:
    return crew if isinstance(crew, str) else str(getattr(crew, "label", crew))
