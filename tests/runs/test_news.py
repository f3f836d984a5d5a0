"""News of webhooks: what ends the pauses of a wait early, and what is known where they do not come."""

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest

from prefect_crew import DeployedCrew, arun_crew
from prefect_crew.client.models import CrewResult, TokenUsage
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import CrewFailedError
from prefect_crew.runs import news
from prefect_crew.testing import CrewServerFactory
from support.flow_runs import acall_in_flow
from support.held import Held
from support.scripts import script, slow
from support.waiting import soon, until

# Polling alone would not look again before this is over.
RARELY = WaitPolicy(initial=3600, max_interval=3600, timeout=7200)
OFTEN = WaitPolicy(initial=0.2, factor=1, max_interval=0.2, jitter=0)
USAGE: dict[str, Any] = {"total_tokens": 1200}


async def run(crew: DeployedCrew, *, keys: Sequence[str | None] = (None,), **options: Any) -> list[CrewResult]:
    """Run a crew in a flow, once for each key at the same time, in less time than polling alone would need."""
    together = acall_in_flow(lambda: asyncio.gather(*(arun_crew(crew, idempotency_key=key, **options) for key in keys)))
    return (await soon(together))[1]


@pytest.mark.parametrize("ends", ["completed", "failed", "flow"])
async def test_a_webhook_ends_the_pause(receiver: str, crew_server: CrewServerFactory, key: str, ends: str) -> None:
    task = {"seconds": 1.5, "fail": "no idea" if ends == "failed" else ""}
    # Of a Flow, the stream alone tells the end.
    server = crew_server(script(task, flow=ends == "flow"), faults=["webhook-crew:lose"] if ends == "flow" else [])
    keys = [key, key, f"another {key}"] if ends == "completed" else [key]
    with pytest.raises(CrewFailedError, match="no idea") if ends == "failed" else nullcontext():
        await run(server.crew(wait=RARELY), keys=keys)
    assert server.requests["status"] <= 1 + 2 * len(keys)
    assert server.kickoffs == len({*keys})


async def test_news_come_after_an_error_that_nobody_foresaw(
    receiver: str, crew_server: CrewServerFactory, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors, read = [RuntimeError("the disk is odd")], news.in_store

    async def odd(*args: Any) -> Any:
        if errors:
            raise errors.pop()
        return await read(*args)

    monkeypatch.setattr(news, "in_store", odd)
    server = crew_server(held := Held())
    never = WaitPolicy(initial=3600, max_interval=3600, timeout=None)
    running = asyncio.ensure_future(run(server.crew(wait=never), keys=[key]))
    await until(lambda: server.kickoffs and not errors, "the news could not be read")
    held.release()
    await running


async def test_a_run_without_news_is_polled(receiver: str, crew_server: CrewServerFactory) -> None:
    server = crew_server(slow(1.5), faults=["webhook:lose"])
    await run(server.crew(wait=OFTEN))
    assert server.requests["status"] > 3


@pytest.mark.parametrize(
    "faults",
    [
        ["webhook-crew:lose"],
        ["webhook-stream:lose"],
        ["webhook-crew:lose", "webhook-stream:double"],
        ["webhook:double"],
    ],
    ids=["stream alone", "webhook alone", "stream twice", "all twice"],
)
async def test_usage_comes_from_webhooks(receiver: str, crew_server: CrewServerFactory, faults: list[str]) -> None:
    server = crew_server(script({"seconds": 1.5}, usage=USAGE), faults=faults)
    (result,) = await run(server.crew(wait=RARELY))
    assert "token_usage" not in result.raw, "the status does not tell it"
    assert result.usage == TokenUsage(**USAGE)
    assert server.requests["status"] <= 2
