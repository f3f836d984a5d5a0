"""A client that changes to a rotated token."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest

from prefect_crew import AuthenticationError, DeployedCrew
from prefect_crew.sessions import CrewSession
from prefect_crew.testing import CrewServerFactory

pytestmark = pytest.mark.usefixtures("prefect_api")


async def stored(server: Any, **fields: Any) -> DeployedCrew:
    """Store a block and return it as a fresh process would load it."""
    name = f"session-{uuid.uuid4().hex[:8]}"
    await server.crew(**fields).asave(name)
    return await DeployedCrew.aload(name)


async def store_anew(crew: DeployedCrew, server: Any, **fields: Any) -> None:
    await server.crew(**fields).asave(crew.label, overwrite=True)


async def test_a_call_is_made_once_more_with_the_stored_token(crew_server: CrewServerFactory):
    server = crew_server("echo")
    crew = await stored(server)
    server.token = "the-new-token"
    await store_anew(crew, server)
    async with CrewSession(crew) as session:
        assert [known.name for known in await session.asked(lambda client: client.inputs())] == ["text"]
        assert session.crew.token.get_secret_value() == "the-new-token"
        await session.client.inputs()
    assert server.counters.unauthorized == 1


async def test_a_refusal_stands_where_there_is_no_other_token(crew_server: CrewServerFactory):
    server = crew_server("echo")
    crew = await stored(server)
    server.token = "the-new-token"
    async with CrewSession(crew) as session:
        with pytest.raises(AuthenticationError):
            await session.asked(lambda client: client.inputs())
    async with CrewSession(server.crew(token="not-stored")) as session:
        assert not await session.renew()


async def test_a_block_that_is_gone_or_cannot_be_used_renews_nothing(crew_server: CrewServerFactory):
    server = crew_server("echo")
    crew = await stored(server)
    await store_anew(crew, server, token="no header can carry this")
    async with CrewSession(crew) as session:
        assert not await session.renew()
        await session.client.inputs()
    await asyncio.to_thread(lambda: DeployedCrew.delete(crew.label))
    async with CrewSession(crew) as session:
        assert not await session.renew()


async def test_what_the_caller_has_made_secret_stays_so(crew_server: CrewServerFactory):
    server = crew_server("echo")
    crew = (await stored(server, secret_inputs=["password"])).hiding(["pin"])
    server.token = "the-new-token"
    await store_anew(crew, server, secret_inputs=["password"])
    async with CrewSession(crew) as session:
        assert await session.renew()
        assert session.crew.secret_inputs == ["password", "pin"]


def test_it_has_to_be_opened(crew_server: CrewServerFactory):
    with pytest.raises(RuntimeError, match="async with CrewSession"):
        _ = CrewSession(crew_server("echo").crew()).client
