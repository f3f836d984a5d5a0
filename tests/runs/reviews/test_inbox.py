"""What a reviewer sees of a question whose status shows nothing: what the webhook brought, else where to look."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prefect import flow

from prefect_crew import CrewTimeoutError, DeployedCrew, Review, ReviewRequest, WaitPolicy, arun_crew
from prefect_crew.crew import Crew
from prefect_crew.devserver import CrewScript, CrewServer
from prefect_crew.receiver.app import create_receiver
from prefect_crew.records.notes import kept_output
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.reviews.answer import list_pending_reviews
from support.webhooks import SECRET, served

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")
SCRIPT = CrewScript.model_validate(
    {
        "name": "reviewed",
        "inputs": ["topic"],
        "tasks": [{"name": "draft", "human": True, "output": "Draft {{ round }} on {{ topic }}."}],
    }
)
PAGE = "https://app.example.com/crews/7"


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    async with served(create_receiver(SECRET)) as url:
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", url)
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
        yield url


async def reviewed(crew: DeployedCrew, review: Any, key: str, **policy: Any) -> None:
    @flow
    async def once() -> None:
        await arun_crew(crew, {"topic": "tea"}, idempotency_key=key, review=review, wait=WaitPolicy(**policy))

    await once()


async def test_a_function_sees_what_the_webhook_brought(receiver: str) -> None:
    seen: list[str | None] = []

    def judge(request: ReviewRequest) -> Review:
        seen.append(request.output)
        return Review(approve=request.round > 1, feedback="again")

    key = f"judged/{uuid.uuid4()}"
    with CrewServer(SCRIPT) as server:
        await reviewed(server.crew(), judge, key)
    assert seen == ["Draft 1 on tea.", "Draft 2 on tea."]
    (record,) = await PrefectRecords().attempts(key)
    assert [await kept_output(record, answers) for answers in (0, 1)] == [None, None], "nothing stays"


async def test_the_command_line_sees_it_as_well_and_of_secret_inputs_nothing_is_kept(receiver: str) -> None:
    key = f"judged/{uuid.uuid4()}"
    with CrewServer(SCRIPT) as server:
        for crew, expected in ((server.crew(), "Draft 1 on tea."), (server.crew(secret_inputs=["topic"]), None)):
            with pytest.raises(CrewTimeoutError):
                await reviewed(crew, None, f"{key}/{expected}", human_timeout=8)

            async def same(_: Any, crew: Crew = crew.crew) -> Crew:
                return crew

            lines = await list_pending_reviews([PrefectRecords()], same)
            (line,) = [one for one in lines if one.record.idempotency_key == f"{key}/{expected}"]
            assert line.output == expected


async def test_where_nothing_is_known_the_page_is_linked_and_nothing_is_promised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with CrewServer(SCRIPT) as server, caplog.at_level(logging.WARNING):
        with pytest.raises(CrewTimeoutError):
            await reviewed(server.crew(page_url=PAGE), None, f"judged/{uuid.uuid4()}", human_timeout=0.3)
        (said,) = [one.getMessage() for one in caplog.records if "waits for a person: task draft" in one.getMessage()]
        assert f"Look at the crew's page: {PAGE}" in said
        assert "reviews show" not in said
        assert f"--crew {server.url}" in said, "the crew is no stored block"


async def test_where_it_is_known_the_command_that_shows_it_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with (
        CrewServer(SCRIPT, response_format="union") as server,
        caplog.at_level(logging.WARNING),
        pytest.raises(CrewTimeoutError),
    ):
        await reviewed(server.crew(), None, f"judged/{uuid.uuid4()}", human_timeout=0.3)
    assert "See what is to be judged: prefect-crew reviews show" in caplog.text
