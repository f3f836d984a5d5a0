"""One answer for one question, whatever the ways and however many at the same moment."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest
from prefect.client.orchestration import get_client

import prefect_crew as pc
from prefect_crew.blocks import crew_of
from prefect_crew.devserver import CrewServer
from prefect_crew.receiver.app import create_receiver
from prefect_crew.runs.database import in_store
from prefect_crew.runs.reviews.answer import resume_run
from prefect_crew.runs.run import LiveRun
from prefect_crew.store import attempts
from support.links import QUICK, Chat, Shown, answers_of, notifying, running, send
from support.scripts import script
from support.waiting import until
from support.webhooks import SECRET, served

pytestmark = pytest.mark.usefixtures("prefect_api")
CLICKS = 20


async def see_form(flow_run_id: str) -> None:
    """Wait until the form is up on a flow run's page."""
    async with get_client() as client:

        async def is_up() -> bool:
            state = (await client.read_flow_run(uuid.UUID(flow_run_id))).state
            if state is None or not state.is_paused():
                return False
            keys: Any = state.state_details.run_input_keyset
            path: Any = f"/flow_runs/{flow_run_id}/input/filter"
            stored = await client.request("POST", path, json={"prefix": keys["schema"], "limit": 1})
            return bool(stored.json())  # its fields are stored a moment after the pause

        await until(is_up, "the form")


async def submit_form(flow_run_id: str) -> Any:
    path: Any = f"/flow_runs/{flow_run_id}/resume"
    async with get_client() as client:
        return await client.request("POST", path, json={"run_input": {"decision": "approve", "name": "the form"}})


@pytest.mark.parametrize("with_form", [False, True])
async def test_links_a_command_and_a_form_give_one_answer(with_form: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty clicks over two receivers, which share nothing but the Prefect server."""
    key = f"answers-{uuid.uuid4().hex[:12]}"
    crew = script({"name": "draft", "human": True, "output": "x"}, {"name": "print", "seconds": 3})
    with Chat() as chat, CrewServer(crew) as server:
        async with served(create_receiver(SECRET)) as url, served(create_receiver(SECRET)) as other, notifying(chat):
            monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_ANSWER_URL", url)
            monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
            options = {"review": "form"} if with_form else {}
            async with running(server.crew(wait=QUICK), key, **options) as flow_run:
                link = await chat.link()
                links = [link, link.replace(url, other)]
                form = (await in_store(attempts.of_key, key))[0].flow_run_id if with_form else None
                if with_form:
                    await see_form(str(form))
                run = LiveRun(crew_of(await pc.DeployedCrew.aload(key)), server.runs[0].id)
                given = await asyncio.gather(
                    *(submit_form(str(form)) for _ in range(with_form)),
                    *(send(links[n % 2], decision="approve", name=f"person {n}") for n in range(CLICKS)),
                    resume_run(run, feedback="", approve=True),
                    return_exceptions=True,
                )
                assert server.requests["resume"] == 1
                (answer,) = await answers_of(key)
                if with_form:
                    # Prefect refuses a form that another answer had taken down before it came.
                    status = given[0].json()["status"]
                    assert status == "ACCEPT" or (status == "ABORT" and answer.by != "the form"), (status, answer.by)
                pages = [page for page in given if isinstance(page, Shown)]
                assert len(pages) == CLICKS
                assert {page.status for page in pages} <= {200, 409}
                assert [page.status for page in pages].count(200) == answer.by.startswith("person")
                await flow_run
                assert server.requests["resume"] == 1
