"""What people look at: one Markdown artifact a run, under a key per crew, updated as the run goes on.

An artifact is a view. It may be missing or cleaned away without any harm: the record is what counts.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import PrefectException, PrefectHTTPStatusError

from prefect_crew._internal.prefect_api import is_busy, request_soon
from prefect_crew.artifacts.escape import (
    OUTPUT_CAP,
    cell,
    code,
    commands,
    duration,
    fenced,
    flow_run_link,
    link,
    prose,
    reading,
    table,
)
from prefect_crew.client.inputs import encode_inputs
from prefect_crew.client.models import CrewStatus, TaskResult, TokenUsage
from prefect_crew.client.redaction import MASK
from prefect_crew.prices import money
from prefect_crew.records.model import SentReview
from prefect_crew.states import CrewState

SHOW_FOR = 5.0
"""Seconds for which showing something outlasts a Prefect API that is busy."""
SHOW_WITHIN = 15.0
"""Seconds for all of it: one that is away must not keep a wait from looking at its run."""
PAGE, PAGES = 200, 5
"""How many artifacts under a key are looked through, the newest first, for one that another process made."""
TASKS_CAP = 200
"""Tasks of a run that an artifact lists."""
BAR = 12
# Signs that every font has: not every machine has one for emoji.
_STATES = {
    CrewState.PENDING: "○ pending",
    CrewState.RUNNING: "● running",
    CrewState.WAITING: "◆ waits for a person",
    CrewState.COMPLETED: "✓ completed",
    CrewState.FAILED: "✗ failed",
    CrewState.STOPPED: "■ stopped",
    CrewState.UNKNOWN: "? not known to the server",
}


def artifact_key(label: str, *, prefix: str = "crew") -> str:
    """Return the artifact key of a crew: lower-case letters, digits and dashes, as Prefect demands."""
    return f"{prefix}-" + (re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or "run")


class MarkdownArtifact:
    """One artifact that is made once and then updated, distinguished from others under its key by its description.

    `id` is its id, as far as it is known here.
    """

    def __init__(self, key: str, description: str, *, flow_run_id: str | None = None) -> None:
        self.key = key
        self.description = description
        self.id: UUID | None = None
        self._flow_run_id = flow_run_id

    async def put(self, data: str, *, new: bool = False) -> str | None:
        """Bring the artifact to `data`; make it if there is none (any more). Return the trouble, if any.

        `new`: it surely is not there yet.
        """
        try:
            async with asyncio.timeout(SHOW_WITHIN):
                if (None if new else await self.find()) is None or not await self._update(data):
                    await self._create(data)
        except (httpx.HTTPError, PrefectException, ValueError) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        except TimeoutError:
            return f"the Prefect API did not accept it within {SHOW_WITHIN:g} s"
        return None

    async def find(self) -> UUID | None:
        """Return its id, asking the server where another process made it; None where there is none.

        Raises:
            httpx.HTTPError, PrefectException: The Prefect API is away.
        """
        if self.id is not None:
            return self.id
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[self.key]))
        if self._flow_run_id is not None:
            wanted.flow_run_id = ArtifactFilterFlowRunId(any_=[UUID(self._flow_run_id)])
        async with get_client() as client:
            for page in range(PAGES):
                found = await client.read_artifacts(
                    artifact_filter=wanted, sort=ArtifactSort.CREATED_DESC, limit=PAGE, offset=page * PAGE
                )
                self.id = next((one.id for one in found if one.description == self.description), None)
                if self.id is not None or len(found) < PAGE:
                    break
        return self.id

    async def _update(self, data: str) -> bool:
        """Update the artifact; False if somebody has removed it."""
        async with get_client() as client:
            try:
                path, json = f"/artifacts/{self.id}", {"data": data}
                await request_soon(client, "PATCH", path, json=json, give_up_after=SHOW_FOR)
            except PrefectHTTPStatusError as error:
                if error.response.status_code != 404:
                    raise
                return False
        return True

    async def _create(self, data: str) -> None:
        """Make the artifact, of the flow and task run that this is called from."""
        flow_context, task_context = FlowRunContext.get(), TaskRunContext.get()
        flow_run = None if flow_context is None else flow_context.flow_run
        artifact = ArtifactCreate(
            key=self.key,
            type="markdown",
            description=self.description,
            data=data,
            flow_run_id=None if flow_run is None else flow_run.id,
            task_run_id=None if task_context is None else task_context.task_run.id,
        )
        body = artifact.model_dump(mode="json", exclude_unset=True)
        async with get_client() as client:
            # Nothing but busy is repeated: who knows whether a request that was lost has made one.
            made = await request_soon(client, "POST", "/artifacts/", json=body, give_up_after=SHOW_FOR, again=is_busy)
        self.id = UUID(made.json()["id"])


@dataclass(frozen=True)
class RunView:
    """What may be shown of a run, in its artifact and its span. Times are UTC; `inputs` are the caller's own values.

    `page_url` is the crew's page for people. `notes` are what stands first, `to_do` the commands that go with them.
    `read_result` is the command that writes the whole result.
    """

    crew: str
    kickoff_id: str
    idempotency_key: str | None
    state: CrewState
    started_at: datetime | None = None
    ended_at: datetime | None = None
    inputs: Mapping[str, Any] | None = None
    status: CrewStatus | None = None
    show: str = "full"
    secret_inputs: Sequence[str] = ()
    cost: float | None = None
    page_url: str | None = None
    flow_run_id: str | None = None
    read_result: str | None = None
    notes: Sequence[str] = ()
    to_do: Sequence[str] = ()
    reviews: Sequence[SentReview] = ()
    failed_task: str | None = None
    attempt: str | None = None
    advice: str | None = None
    tasks_seen: Mapping[str, datetime] = field(default_factory=dict[str, datetime])
    """When each task was first seen at work, by its name."""

    def shown_inputs(self) -> dict[str, Any]:
        """Return the inputs as they are sent, with the secret ones masked."""
        given = self.inputs or {}
        return encode_inputs({name: MASK if name in self.secret_inputs else value for name, value in given.items()})


def render_run(view: RunView) -> str:
    """Return the Markdown of a run. The result comes last, so that nothing in it can swallow what is ours."""
    parts = [f"## {_STATES[view.state]} · {prose(view.crew)}"]
    if view.state is CrewState.FAILED:
        parts += _failure(view)
    parts += [prose(note) for note in view.notes]
    if view.to_do:
        parts.append(commands(*view.to_do))
    parts.append(_facts(view))
    if view.inputs is not None and view.show == "full" and view.inputs:
        parts.append(_inputs(view))
    if view.reviews:
        parts.append(_reviews(view))
    status = view.status
    if status is not None and view.show != "none":
        if status.tasks:
            parts.append(_tasks(status.tasks))
        if status.usage is not None:
            parts.append(_usage(status.usage))
    if status is not None and status.output is not None and view.state is CrewState.COMPLETED:
        parts.append(_result(view, status.output))
    return "\n\n".join(filter(None, parts)) + "\n"


def _failure(view: RunView) -> list[str]:
    """Return why a run failed, where, and what to do: that is what people come for."""
    shown = view.status is not None and view.show != "none"
    error = (view.status.error if shown and view.status else None) or "The crew gave no reason."
    parts = ["### Error", fenced(error)] if shown else []
    where = f"It failed in task **{cell(view.failed_task, 80)}**." if shown and view.failed_task else ""
    parts.append(" ".join(filter(None, (where, prose(view.advice or "")))))
    return [part for part in parts if part]


def _facts(view: RunView) -> str:
    rows = [("Run", code(view.kickoff_id))]
    if view.page_url:
        rows.append(("Crew", link(view.crew, view.page_url)))
    if view.flow_run_id:
        rows.append(("Flow run", flow_run_link(view.flow_run_id)))
    if view.idempotency_key:
        rows.append(("Idempotency key", code(view.idempotency_key)))
    if view.attempt and view.state is CrewState.FAILED:
        rows.append(("Attempt", view.attempt.removeprefix("attempt ")))
    if view.started_at:
        rows.append(("Kicked off", f"{view.started_at:%Y-%m-%d %H:%M:%S} UTC"))
    if view.ended_at:
        rows.append(("Ended", f"{view.ended_at:%Y-%m-%d %H:%M:%S} UTC"))
    status = view.status
    if status is not None and status.execution_time is not None:
        rows.append(("Execution time", duration(status.execution_time)))
    if status is not None and status.current_task and not view.state.ended and view.show != "none":
        rows.append(("Current task", cell(status.current_task)))
    if status is not None and status.message and view.state is not CrewState.FAILED and view.show == "full":
        rows.append(("Message", cell(status.message)))
    if view.cost is not None:
        rows.append(("Cost", money(view.cost)))
    return table(("", ""), rows)


def _inputs(view: RunView) -> str:
    rows = [(f"**{cell(name)}**", cell(str(text))) for name, text in view.shown_inputs().items()]
    return "### Inputs\n\n" + table(("Input", "Value"), rows)


def _tasks(tasks: Sequence[TaskResult]) -> str:
    times = [task.execution_time for task in tasks]
    total = sum(seconds for seconds in times if seconds)
    header = ["Task", "Agent"]
    timed = total > 0
    if timed:
        header += ["Time", "Share"]
    rows: list[Sequence[str]] = []
    for task, seconds in zip(tasks[:TASKS_CAP], times, strict=False):
        row = [cell(task.name or "–", 80), cell(task.agent or "–", 60)]
        if timed:
            row += ["–", ""] if seconds is None else [duration(seconds), _bar(seconds / total)]
        rows.append(row)
    more = f"\n\n_and {len(tasks) - TASKS_CAP:,} more_" if len(tasks) > TASKS_CAP else ""
    return "### Tasks\n\n" + table(header, rows) + more


def _reviews(view: RunView) -> str:
    header = ["Task", "Round", "Answer", "By", "When"] + (["Feedback"] if view.show == "full" else [])
    rows: list[Sequence[str]] = []
    for review in view.reviews:
        answer = "approved" if review.approve else "rejected"
        unsure = "" if review.outcome == "sent" else " (nobody knows whether it arrived)"
        row = [
            "–" if view.show == "none" else cell(review.task_id, 80),
            str(review.round),
            answer + unsure,
            cell(review.by, 60),
            f"{review.at:%Y-%m-%d %H:%M:%S} UTC",
        ]
        rows.append([*row, cell(review.feedback)] if view.show == "full" else row)
    return "### Answers\n\n" + table(header, rows)


def _usage(usage: TokenUsage) -> str:
    counts = [(name.replace("_", " "), count) for name, count in usage if count is not None]
    if not counts:
        return ""
    return "### Usage\n\n" + table([name for name, _ in counts], [[f"{count:,}" for _, count in counts]])


def _result(view: RunView, output: str) -> str:
    said: list[str] = []
    if view.show == "full" and len(output) > OUTPUT_CAP:
        said.append(f"The first {OUTPUT_CAP:,} of {len(output):,} characters.")
    elif view.show == "summary":
        said.append(f"{len(output):,} characters.")
    if view.read_result is not None:
        said.append(f"The whole text:\n\n{commands(view.read_result)}")
    text = reading(output[:OUTPUT_CAP]) if view.show == "full" else ""
    shown = "\n\n".join(filter(None, (" ".join(said), text)))
    return f"### Result\n\n{shown}" if shown else ""


def _bar(share: float) -> str:
    full = round(share * BAR)
    return f"{'█' * full}{'░' * (BAR - full)} {share:.0%}"


class RunArtifact(MarkdownArtifact):
    """The artifact of one run."""

    def __init__(self, crew: str, kickoff_id: str, *, flow_run_id: str | None) -> None:
        super().__init__(artifact_key(crew), f"Run {prose(kickoff_id)} of crew {prose(crew)}", flow_run_id=flow_run_id)

    async def create(self, view: RunView) -> str | None:
        """Make the artifact; return the trouble, if any."""
        return await self.put(render_run(view), new=True)

    async def update(self, view: RunView) -> str | None:
        """Bring the artifact up to date, or make it; return the trouble, if any."""
        return await self.put(render_run(view))
