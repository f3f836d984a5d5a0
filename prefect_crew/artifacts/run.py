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

from prefect_crew._internal.prefect_api import is_busy, request_soon
from prefect_crew.artifacts.markdown import RunView, prose, render_run

SHOW_FOR = 5.0
"""Seconds for which showing something outlasts a Prefect API that is busy."""
SHOW_WITHIN = 15.0
"""Seconds for all of it: one that is away must not keep a wait from looking at its run."""
PAGE, PAGES = 200, 5
"""How many artifacts under a key are looked through, the newest first, for one that another process made."""


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
