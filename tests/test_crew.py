"""A crew as plain values, and its session: a client that changes to a rotated token."""

import asyncio
import pickle
import uuid
from dataclasses import asdict, replace
from typing import Any

import pytest
from pydantic import SecretStr
from pydantic_core import to_json

from prefect_crew import AuthenticationError, DeployedCrew, Price
from prefect_crew.blocks import crew_of, load_crew
from prefect_crew.client._client import CrewClient
from prefect_crew.client.inputs import Inputs
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.runs.request import RunOptions, RunRequest
from prefect_crew.runs.run import LiveRun
from prefect_crew.testing import CrewServerFactory


def block_of(**fields: Any) -> DeployedCrew:
    return DeployedCrew(**{"url": "https://travel.test", "token": SecretStr("the-token"), **fields})


def crew(**fields: Any) -> Crew:
    return crew_of(block_of(**fields))


def test_it_has_every_field_of_its_block():
    block = block_of(show="summary", secret_inputs=["pin"], price=Price(per_run=0.5))
    for name in DeployedCrew.model_fields:
        kept = getattr(crew_of(block), name)
        assert (list(kept) if isinstance(kept, tuple) else kept) == getattr(block, name), name


def test_the_token_shows_nowhere():
    block = block_of(secret_inputs=["pin"])
    crew = crew_of(block).with_token(SecretStr("the-new-token"))
    of_block = (repr(block), str(block), block.model_dump_json(), repr(block.client()), block.label)
    of_crew = (repr(crew), str(crew), str(asdict(crew)), to_json(crew, fallback=repr).decode())
    for shown in (*of_block, *of_crew):
        assert "the-token" not in shown
        assert "the-new-token" not in shown
    assert pickle.loads(pickle.dumps(crew)) == crew


async def test_an_unstored_crew_is_called_by_its_address():
    one = crew(url="https://travel.test:444/crews/1/")
    assert one.label == "travel.test:444/crews/1"
    assert crew().label == "travel.test"
    assert one.called("travel").label == "travel"
    assert await load_crew(one) is one
    assert await load_crew(DeployedCrew(url=one.url, token=one.token)) == one


def test_a_title_shows_no_secret_input():
    inputs = Inputs.of({"dsn": "postgresql://u:hunter22@db/x", "password": SecretStr("hunter22")})
    title, untitled = (
        LiveRun(one, request=RunRequest.of(one, inputs, RunOptions())).title for one in (crew(), crew(show="summary"))
    )
    assert title.startswith(f"{crew().label} · postgresql://u:")
    assert "hunter22" not in title
    assert untitled == crew().label


# The session


async def stored(server: Any, name: str | None = None, **fields: Any) -> Crew:
    """Store a block, again if it has a name, and return its crew as a fresh process would load it."""
    name = name or f"session-{uuid.uuid4().hex[:8]}"
    await server.crew(**fields).asave(name, overwrite=True)
    return await load_crew(name)


@pytest.mark.usefixtures("prefect_api")
async def test_refused_calls_are_repeated_with_the_stored_token(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    server, reads, read = crew_server("echo"), 0, Crew.reloaded
    crew = replace(await stored(server, secret_inputs=["password"]), secret_inputs=("pin",))
    assert crew.block == crew.label
    assert crew.called("other").label == crew.label
    assert await crew.reloaded() is None
    server.token = "the-new-token"
    await stored(server, crew.label, secret_inputs=["password"])

    async def reloaded(crew: Crew) -> Crew | None:
        nonlocal reads
        reads += 1
        return await read(crew)

    monkeypatch.setattr(Crew, "reloaded", reloaded)
    async with CrewSession(crew) as session:
        answers = await asyncio.gather(*(session.call(lambda client: client.inputs()) for _ in range(5)))
        assert session.crew.token.get_secret_value() == "the-new-token"
        assert session.crew.secret_inputs == ("pin",), "the token alone is new"
        await session.client.inputs()
    assert [[item.name for item in answer] for answer in answers] == [["text"]] * 5
    assert server.unauthorized == 5
    assert reads == 1, "the first of them renews the token"


@pytest.mark.usefixtures("prefect_api")
async def test_a_refusal_stands_where_there_is_no_other_token(crew_server: CrewServerFactory):
    server = crew_server("echo")
    crew = await stored(server)
    async with CrewSession(crew_of(server.crew(token="not-stored"))) as session:
        assert not await session.renew(session.client)
    await stored(server, crew.label, token="no header can carry this")
    async with CrewSession(crew) as session:
        assert not await session.renew(session.client)
        await session.client.inputs()
    await stored(server, crew.label)
    server.token = "the-new-token"
    async with CrewSession(crew) as session:
        with pytest.raises(AuthenticationError):
            await session.call(lambda client: client.inputs())
    await asyncio.to_thread(lambda: DeployedCrew.delete(crew.label))
    async with CrewSession(crew) as session:
        assert not await session.renew(session.client)


class SlowClient(CrewClient):
    """Opens once `is_open` is set."""

    def __init__(self, crew: Crew, is_open: asyncio.Event, opened: list[CrewClient]) -> None:
        super().__init__(crew.url, crew.token)
        self.is_open, self.opened = is_open, opened

    async def __aenter__(self) -> CrewClient:
        self.opened.append(self)
        await self.is_open.wait()
        return await super().__aenter__()


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_two_that_enter_a_session_at_once_share_a_client(is_cancelled: bool):
    is_open, opened = asyncio.Event(), list[CrewClient]()
    session = CrewSession(crew(), lambda crew: SlowClient(crew, is_open, opened))
    first, second = [asyncio.ensure_future(session.__aenter__()) for _ in range(2)]
    await asyncio.sleep(0)
    if is_cancelled:
        second.cancel()
        await asyncio.wait({second})
    is_open.set()
    await first
    if not is_cancelled:
        await second
        await session.__aexit__(None, None, None)
    assert opened == [session.client], "it stays open for the other one, and whoever was cancelled does not count"
    await session.__aexit__(None, None, None)
    with pytest.raises(ConfigurationError, match="not open"):
        _ = session.client


# The version of the deployed crew


async def test_version_that_comes_too_late_is_unknown(crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("prefect_crew.client._client.VERSION_WITHIN", 0.05)
    server = crew_server("echo", faults=["inspect:timeout"])
    async with CrewSession(crew_of(server.crew())) as session:
        assert await session.version() is None
