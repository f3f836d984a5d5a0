"""What people look at: one Markdown artifact a run, under a key per crew, updated as the run goes on.

An artifact is a view. It may be missing or cleaned away without any harm: the record is what counts.
"""

from __future__ import annotations

import asyncio
import re
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import PrefectException, PrefectHTTPStatusError

from prefect_crew.impatience import request_soon
from prefect_crew.patience import within
from prefect_crew.rendering import RunView, render_run

__all__ = ["MarkdownArtifact", "RunArtifact", "artifact_key"]


SHOW_FOR = 5.0
"""Seconds for which showing something outlasts a Prefect API that is busy."""
PATIENCE = 15.0
"""Seconds for all of it: one that is away must not keep a wait from looking at its run."""
PAGE, PAGES = 200, 5
"""How many artifacts under a key are looked through, the newest first, for one that another process made."""


def artifact_key(label: str, *, prefix: str = "crew") -> str:
    """Return the artifact key of a crew: lower-case letters, digits and dashes, as Prefect demands."""
    return f"{prefix}-" + (re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or "run")


class MarkdownArtifact:
    """One artifact that is made once and then updated, told from others under its key by its description.

    Its methods never fail what they show: they return the trouble as text, or None.
    """

    def __init__(self, key: str, description: str, *, flow_run_id: str | None = None) -> None:
        self.key = key
        self.description = description
        self._flow_run_id = flow_run_id
        self._id: UUID | None = None

    async def put(self, data: str, *, new: bool = False) -> str | None:
        """Bring the artifact to `data`; make it if there is none (any more). `new`: it surely is not there yet."""
        try:
            await within(PATIENCE, self._put(data, new))
        except (httpx.HTTPError, PrefectException, ValueError) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        except (TimeoutError, asyncio.TimeoutError):
            return f"the Prefect API did not take it in {PATIENCE:g} s"
        return None

    async def _put(self, data: str, new: bool) -> None:
        if self._id is None and not new:
            self._id = await self._find()
        if self._id is not None and not await self._update(data):
            self._id = None
        if self._id is None:
            await self._create(data)

    async def _update(self, data: str) -> bool:
        """Update the artifact; False if somebody has removed it."""
        async with get_client() as client:
            try:
                await request_soon(client, "PATCH", f"/artifacts/{self._id}", json={"data": data}, patience=SHOW_FOR)
            except PrefectHTTPStatusError as error:
                if error.response.status_code != 404:
                    raise
                return False
        return True

    async def _create(self, data: str) -> None:
        """Make the artifact, of the flow and task run that this is called from."""
        flow_context, task_context = FlowRunContext.get(), TaskRunContext.get()
        flow_run = None if flow_context is None else flow_context.flow_run
        async with get_client() as client:
            made = await client.create_artifact(
                ArtifactCreate(
                    key=self.key,
                    type="markdown",
                    description=self.description,
                    data=data,
                    flow_run_id=None if flow_run is None else flow_run.id,
                    task_run_id=None if task_context is None else task_context.task_run.id,
                )
            )
        self._id = made.id

    async def _find(self) -> UUID | None:
        """Return the artifact that another process, or an earlier attempt of this flow run, made for the same."""
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[self.key]))
        if self._flow_run_id is not None:
            wanted.flow_run_id = ArtifactFilterFlowRunId(any_=[UUID(self._flow_run_id)])
        async with get_client() as client:
            for page in range(PAGES):
                found = await client.read_artifacts(
                    artifact_filter=wanted, sort=ArtifactSort.CREATED_DESC, limit=PAGE, offset=page * PAGE
                )
                for artifact in found:
                    if artifact.description == self.description:
                        return artifact.id
                if len(found) < PAGE:
                    break
        return None


class RunArtifact:
    """The artifact of one run."""

    def __init__(self, crew: str, kickoff_id: str, *, flow_run_id: str | None) -> None:
        self._artifact = MarkdownArtifact(
            artifact_key(crew), f"Run {kickoff_id} of crew {crew}", flow_run_id=flow_run_id
        )

    async def create(self, view: RunView) -> str | None:
        """Make the artifact; return the trouble, if any."""
        return await self._artifact.put(render_run(view), new=True)

    async def update(self, view: RunView) -> str | None:
        """Bring the artifact up to date, or make it; return the trouble, if any."""
        return await self._artifact.put(render_run(view))
