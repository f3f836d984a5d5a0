"""The Markdown artifact of a run, under a key per crew. It is updated while the run goes on.

An artifact is only a view: it may be missing or deleted without harm to its run, since only the crew database counts.
It belongs to the flow run that started the run.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import ObjectNotFound

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
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
from prefect_crew.client.encoding import as_text
from prefect_crew.client.models import CrewStatus, Review, TaskResult
from prefect_crew.prices import money
from prefect_crew.states import CrewState

SHOW_WITHIN = 10.0
"""Seconds for a whole update, in which Prefect's client repeats it while the API is busy: a Prefect API that does not
answer must not delay a result."""
NEWEST = 200
"""The number of newest artifacts under a key among which an artifact of another process is looked for."""
TASKS_CAP = 200
"""The most tasks of a run in an artifact."""
BAR = 12
_INPUTS = "### Inputs\n\n"
# Signs that every font has: some machines have no font for emoji.
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
    """One artifact: created once and then updated. Its description distinguishes it from others under its key.

    `id` is its id, None if unknown here. `is_new`: whether it surely does not exist yet. `earlier` is its text if
    another process has created it. `flow_run_id` is the flow run that it belongs to; default: the flow run around its
    first update.
    """

    def __init__(
        self,
        key: str,
        description: str,
        *,
        flow_run_id: str | None = None,
        is_new: bool = False,
    ) -> None:
        self.key = key
        self.description = description
        self.id: UUID | None = None
        self.earlier = ""
        self.is_new = is_new
        self._flow_run_id = flow_run_id
        self._in_trouble = False

    async def keep(self, data: str | Callable[[], str]) -> str | None:
        """Update the artifact, or create it if it does not exist. Return the problem or None.

        `data` is its text, or a function that returns the text once the artifact was looked for. This logs a problem
        once and raises none, since an artifact must not fail its run.
        """
        try:
            async with asyncio.timeout(SHOW_WITHIN), get_client() as client:
                is_there = await self.find() is not None
                text = data() if callable(data) else data
                if not (is_there and await self._update(client, text)):
                    await self._create(client, text)
        except TimeoutError:
            problem = f"the Prefect API did not accept it within {SHOW_WITHIN:g} s"
        except (*PREFECT_ERRORS, ValueError) as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            return None
        if not self._in_trouble:
            self._in_trouble = True
            run_logger().warning("The artifact %r could not be updated: %s", self.description, problem)
        return problem

    async def find(self) -> UUID | None:
        """Return the artifact's id, None if it does not exist. Ask the server if another process may have created it.

        Raises:
            PREFECT_ERRORS: The Prefect API cannot be reached.
        """
        if self.id is not None or self.is_new:
            return self.id
        of_run = ArtifactFilter(key=ArtifactFilterKey(any_=[self.key]))
        if self._flow_run_id is not None:
            of_run.flow_run_id = ArtifactFilterFlowRunId(any_=[UUID(self._flow_run_id)])
        async with get_client() as client:
            artifacts = await client.read_artifacts(
                artifact_filter=of_run, sort=ArtifactSort.CREATED_DESC, limit=NEWEST
            )
        artifact = next((artifact for artifact in artifacts if artifact.description == self.description), None)
        if artifact is not None:
            self.id, self.earlier = artifact.id, str(artifact.data)
        return self.id

    async def _update(self, client: PrefectClient, data: str) -> bool:
        """Update the artifact. Return False if somebody has deleted it."""
        try:
            await client.update_artifact(self.id, ArtifactUpdate(data=data))  # pyright: ignore[reportArgumentType]
        except ObjectNotFound:
            return False
        return True

    async def _create(self, client: PrefectClient, data: str) -> None:
        """Create the artifact for its flow run. If this call runs in that flow run, also for the task run."""
        flow, task = FlowRunContext.get(), TaskRunContext.get()
        around = flow.flow_run.id if flow and flow.flow_run else None
        owner = around if self._flow_run_id is None else UUID(self._flow_run_id)
        artifact = ArtifactCreate(
            key=self.key,
            type="markdown",
            description=self.description,
            data=data,
            flow_run_id=owner,
            task_run_id=task.task_run.id if task and owner == around else None,
        )
        self.is_new = False  # a request whose answer is lost may create it
        self.id = (await client.create_artifact(artifact)).id


@dataclass(frozen=True)
class RunView:
    """The content of a run's artifact, already masked. Times are UTC.

    `inputs` are encoded, None if they are unknown here. `page_url` is the crew's page for people. `notes` come first,
    with the commands in `to_do`. `read_result` is the command that writes the whole result.
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
    cost: float | None = None
    page_url: str | None = None
    flow_run_id: str | None = None
    read_result: str | None = None
    notes: Sequence[str] = ()
    to_do: Sequence[str] = ()
    reviews: Sequence[Review] = ()
    failed_task: str | None = None
    attempt: str | None = None
    advice: str | None = None
    current_id: str | None = None
    """The id under which the run goes on after an answer, if it has another one then."""


def render_run(view: RunView, earlier: str = "") -> str:
    """Return the Markdown of a run. The result comes last, so that its markup cannot affect our own text.

    If the view does not know the inputs, this takes them from the `earlier` Markdown.
    """
    status = view.status if view.show != "none" else None
    parts = [f"## {_STATES[view.state]} · {prose(view.crew)}"]
    if view.state is CrewState.FAILED:
        parts += _failure(view, status)
    parts += map(prose, view.notes)
    if view.to_do:
        parts.append(commands(*view.to_do))
    parts.append(_facts(view, status))
    if view.show == "full" and view.inputs:
        rows = [(f"**{cell(name)}**", cell(as_text(value))) for name, value in view.inputs.items()]
        parts.append(_INPUTS + table(("Input", "Value"), rows))
    elif view.show == "full" and view.inputs is None:
        parts.append(_inputs_shown(earlier))
    if view.reviews:
        parts.append(_reviews(view))
    if status is not None and status.tasks:
        parts.append(_tasks(status.tasks))
    if status is not None and status.usage is not None:
        counts = [(name.replace("_", " "), f"{count:,}") for name, count in status.usage if count is not None]
        if counts:
            parts.append("### Usage\n\n" + table([name for name, _ in counts], [[count for _, count in counts]]))
    if view.status is not None and view.status.output is not None and view.state is CrewState.COMPLETED:
        parts.append(_result(view, view.status.output))
    return "\n\n".join(filter(None, parts)) + "\n"


def _inputs_shown(markdown: str) -> str:
    """Return the part of a run's Markdown that shows the inputs; "" if there is none, or if a code block comes before.

    A code block may hold a text of the crew that forges this part.
    """
    before, heading, after = markdown.partition(_INPUTS)
    return heading + after.partition("\n\n")[0].strip() if heading and "```" not in before else ""


def _failure(view: RunView, status: CrewStatus | None) -> list[str]:
    """Return the error of a failed run, the task in which it failed, and the advice."""
    error = ["### Error", fenced(status.error or "The crew gave no reason.")] if status else []
    where = f"It failed in task **{cell(view.failed_task, 80)}**. " if status and view.failed_task else ""
    return [*error, where + prose(view.advice or "")]


def _facts(view: RunView, status: CrewStatus | None) -> str:
    latest = view.status
    rows = {
        "Run": code(view.kickoff_id),
        "Goes on as": code(view.current_id) if view.current_id not in (None, view.kickoff_id) else None,
        "Crew": view.page_url and link(view.crew, view.page_url),
        "Flow run": view.flow_run_id and flow_run_link(view.flow_run_id),
        "Idempotency key": view.idempotency_key and code(view.idempotency_key),
        "Attempt": view.attempt.removeprefix("attempt ") if view.attempt and view.state is CrewState.FAILED else None,
        "Kicked off": view.started_at and f"{view.started_at:%Y-%m-%d %H:%M:%S} UTC",
        "Ended": view.ended_at and f"{view.ended_at:%Y-%m-%d %H:%M:%S} UTC",
        "Execution time": duration(latest.execution_time) if latest and latest.execution_time is not None else None,
        "Current task": status and not view.state.ended and cell(status.current_task or ""),
        "Message": latest and view.show == "full" and cell(latest.message or ""),
        "Cost": None if view.cost is None else money(view.cost),
    }
    if view.state is CrewState.FAILED:
        del rows["Message"]  # the error contains it
    return table(("", ""), [(name, str(text)) for name, text in rows.items() if text])


def _tasks(tasks: Sequence[TaskResult]) -> str:
    total = sum(task.execution_time or 0 for task in tasks)
    rows: list[list[str]] = []
    for task in tasks[:TASKS_CAP]:
        row = [cell(task.name or "–", 80), cell(task.agent or "–", 60)]
        if total and task.execution_time is None:
            row += ["–", ""]
        elif total and task.execution_time is not None:
            full = round(task.execution_time / total * BAR)
            share = f"{'█' * full}{'░' * (BAR - full)} {task.execution_time / total:.0%}"
            row += [duration(task.execution_time), share]
        rows.append(row)
    more = f"\n\n_and {len(tasks) - TASKS_CAP:,} more_" if len(tasks) > TASKS_CAP else ""
    header = ("Task", "Agent", "Time", "Share") if total else ("Task", "Agent")
    return "### Tasks\n\n" + table(header, rows) + more


def _reviews(view: RunView) -> str:
    header = ["Task", "Round", "Answer", "By", "When"] + (["Feedback"] if view.show == "full" else [])
    rows: list[Sequence[str]] = []
    for review in view.reviews:
        answer = "approved" if review.approve else "rejected"
        row = [
            "–" if view.show == "none" else cell(review.task_id, 80),
            str(review.round),
            answer if review.outcome == "sent" else f"{answer} (nobody knows whether it arrived)",
            cell(review.by, 60),
            f"{review.at:%Y-%m-%d %H:%M:%S} UTC" if review.at else "",
        ]
        rows.append([*row, cell(review.feedback)] if view.show == "full" else row)
    return "### Answers\n\n" + table(header, rows)


def _result(view: RunView, output: str) -> str:
    about: list[str] = []
    if view.show == "full" and len(output) > OUTPUT_CAP:
        about.append(f"The first {OUTPUT_CAP:,} of {len(output):,} characters.")
    elif view.show == "summary":
        about.append(f"{len(output):,} characters.")
    if view.read_result is not None:
        about.append(f"The whole text:\n\n{commands(view.read_result)}")
    text = reading(output[:OUTPUT_CAP]) if view.show == "full" else ""
    markdown = "\n\n".join(filter(None, (" ".join(about), text)))
    return f"### Result\n\n{markdown}" if markdown else ""
