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

from prefect_crew._internal.background import Beside, beside_here
from prefect_crew._internal.prefect_api import Rank, busy, request_soon, run_logger
from prefect_crew.artifacts.markdown import RunView, prose, render_run

SHOW_FOR = 5.0
"""Seconds for which showing something outlasts a Prefect API that is busy."""
SOON = 0.5
"""Seconds after which a new artifact is made beside the work: what is over by then costs one request, not two."""
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
            async with asyncio.timeout(PATIENCE):
                await self._put(data, new)
        except (httpx.HTTPError, PrefectException, ValueError) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        except TimeoutError:
            return f"the Prefect API did not take it in {PATIENCE:g} s"
        return None

    @property
    def known_id(self) -> UUID | None:
        """Its id, as far as it is known here."""
        return self._id

    async def find(self) -> UUID | None:
        """Return its id; None where there is none. Raises what the Prefect API does."""
        if self._id is None:
            self._id = await self._find()
        return self._id

    async def _put(self, data: str, new: bool) -> None:
        if not new:
            await self.find()
        if self._id is not None and not await self._update(data):
            self._id = None
        if self._id is None:
            await self._create(data)

    async def _update(self, data: str) -> bool:
        """Update the artifact; False if somebody has removed it."""
        async with get_client() as client:
            try:
                path, json = f"/artifacts/{self._id}", {"data": data}
                await request_soon(client, "PATCH", path, json=json, patience=SHOW_FOR, rank=Rank.VIEW)
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
            made = await request_soon(
                client, "POST", "/artifacts/", json=body, patience=SHOW_FOR, rank=Rank.VIEW, again=busy
            )
        self._id = UUID(made.json()["id"])

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
        self._kickoff_id = kickoff_id
        self._artifact = MarkdownArtifact(
            artifact_key(crew), f"Run {prose(kickoff_id)} of crew {prose(crew)}", flow_run_id=flow_run_id
        )
        self._next: tuple[str, bool] | None = None
        self._job: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self._told: set[str] = set()

    async def create(self, view: RunView) -> str | None:
        """Make the artifact; return the trouble, if any."""
        return await self._show(view, new=True)

    async def update(self, view: RunView) -> str | None:
        """Bring the artifact up to date, or make it; return the trouble, if any."""
        return await self._show(view, new=False)

    @property
    def known_id(self) -> UUID | None:
        """Its id, as far as it is known here."""
        return self._artifact.known_id

    async def artifact_id(self) -> UUID | None:
        """Return its id, asking the server where another process made it; None where there is none.

        Raises:
            httpx.HTTPError, PrefectException: The Prefect API is away.
        """
        return await self._artifact.find()

    async def _show(self, view: RunView, *, new: bool) -> str | None:
        beside, data = beside_here(), render_run(view)
        if beside is None:
            return await self._artifact.put(data, new=new)
        # Of what is not written yet, the newest will do.
        self._next = (data, new or (self._next is not None and self._next[1]))
        if self._job is None or self._job.done():
            self._over = asyncio.Event()
            self._job = beside.show(self._catch_up(beside, self._over))
        if view.state.ended:
            self._over.set()
        return None

    async def _catch_up(self, beside: Beside, over: asyncio.Event) -> None:
        while self._next is not None:
            if self._next[1]:
                await beside.rest(SOON, over)
            (data, new), self._next = self._next, None
            trouble = await self._artifact.put(data, new=new)
            said = "Run %s has no artifact: %s" if new else "The artifact of run %s could not be updated: %s"
            if trouble and said not in self._told:
                self._told.add(said)
                run_logger().warning(said, self._kickoff_id, trouble)
