"""No request whatsoever makes the server answer with a 5xx, or start a run that it does not count."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_crew.devserver import InProcessCrewServer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KNOWN = [
    "inputs",
    "meta",
    "taskWebhookUrl",
    "crewWebhookUrl",
    "humanInputWebhook",
    "webhooks",
    "execution_id",
    "task_id",
]
BODIES = st.dictionaries(st.sampled_from([*KNOWN, "human_feedback", "is_approve"]), JSON).map(json.dumps)


@pytest.fixture(scope="module")
def server() -> Iterator[InProcessCrewServer]:
    with InProcessCrewServer("name: x\ntasks: [{name: t, seconds: 60}]") as running:
        yield running


async def send(server: InProcessCrewServer, method: str, path: str, content: bytes) -> httpx.Response:
    async with httpx.AsyncClient(transport=server.transport, base_url=server.url, headers=server.headers) as client:
        return await client.send(client.build_request(method, path, content=content))


@settings(max_examples=150)
@given(path=st.sampled_from(["/kickoff", "/resume"]), content=BODIES | st.text())
def test_bodies(server: InProcessCrewServer, path: str, content: str) -> None:
    before = server.kickoffs
    answer = asyncio.run(send(server, "POST", path, content.encode()))
    assert answer.status_code in (200, 400, 404, 422)
    assert server.kickoffs - before == (path == "/kickoff" and answer.status_code == 200)
    body: Any = answer.json()
    assert ("kickoff_id" in body) == (answer.status_code == 200)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_paths(server: InProcessCrewServer, path: str) -> None:
    answer = asyncio.run(send(server, "GET", f"/status/{quote(path, safe='').replace('.', '%2E')}", b""))
    assert answer.status_code == 404
